"""Builds the initrd: busybox, ``init.sh``, the few modules that the root file system needs, and the agent.

One initrd serves microVMs (virtio-mmio) and the machine (virtio-pci). All modules that every VM uses are loaded here,
decompressed, rather than later by modprobe: it is faster, and a snapshot then has them.
"""

from collections.abc import Iterable
from pathlib import Path

from fcvm.setup import cpio, index, modules

DIRECTORIES = ("bin", "dev", "proc", "sys", "lower", "scratch", "root", "modules")


def build(
    destination: Path, *, busybox: Path, agent: Path, module_directory: Path | None, wanted: Iterable[str] | None = None
) -> None:
    """Write the initrd.

    Arguments:
        agent: the packed agent, ``fc_agent.pyz``.
        module_directory: the kernel's ``modules/VERSION``; None for a kernel that has everything built in.
        wanted: the modules to load, if not those of every VM.
    """
    entries = [cpio.directory(name) for name in DIRECTORIES]
    entries += [
        cpio.character_device("dev/console", 5, 1),
        cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
        cpio.file("init", index.INITRD_INIT.read_bytes(), 0o755),
        cpio.file("fc_agent.pyz", agent.read_bytes()),
    ]
    names: list[str] = []
    if module_directory is not None:
        known = modules.read(module_directory)
        names = modules.order(known, index.INITRD_MODULES if wanted is None else wanted)
        entries += [
            cpio.file(f"modules/{name}.ko", modules.load(module_directory / known.paths[name])) for name in names
        ]
    entries.append(cpio.file("modules/order", "".join(f"{name}.ko\n" for name in names).encode()))
    with destination.open("wb") as file:
        cpio.write(file, entries)
