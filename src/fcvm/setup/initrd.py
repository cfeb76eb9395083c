"""Builds the initrd: busybox, ``init.sh``, the few modules that the root file system needs, and the agent.

One initrd serves microVMs (virtio-mmio) and the machine (virtio-pci). All modules that every VM uses are loaded here,
decompressed, rather than later by modprobe: it is faster, and a snapshot then has them.
"""

from importlib.resources import files
from pathlib import Path

from fcvm.setup import cpio, keys, modules

RECIPE = 1  # raise it when the same inputs shall give another initrd

# Loaded in this order. What only some VMs need (tun, bridge, nftables, KVM, btrfs) is loaded on demand.
MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "erofs",
    "overlay",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
)

DIRECTORIES = ("bin", "dev", "proc", "sys", "lower", "scratch", "root", "modules")


def init() -> bytes:
    """The initrd's ``/init``."""
    return files("fcvm.setup").joinpath("init.sh").read_bytes()


def agent_key() -> str:
    """The key of the agent's sources: of all that ``fcvm.agent.pack`` packs."""
    sources = Path(__file__).parent.parent.parent
    return keys.of_sources([sources / "fc_agent", sources / "fuse_pipe"])


def key(kernel: str, busybox: str) -> str:
    """The initrd's key, from those of its kernel and of the busybox binary, the agent's sources and our recipe."""
    return keys.of([RECIPE, kernel, busybox, agent_key(), keys.of([init().decode(), MODULES, DIRECTORIES])])


def build(destination: Path, *, busybox: Path, agent: Path, module_directory: Path | None) -> None:
    """Write the initrd.

    Arguments:
        agent: the packed agent, ``fc_agent.pyz``.
        module_directory: the kernel's ``modules/VERSION``; None for a kernel that has everything built in.
    """
    entries = [cpio.directory(name) for name in DIRECTORIES]
    entries += [
        cpio.character_device("dev/console", 5, 1),
        cpio.file("bin/busybox", busybox.read_bytes(), 0o755),
        cpio.file("init", init(), 0o755),
        cpio.file("fc_agent.pyz", agent.read_bytes()),
    ]
    names: list[str] = []
    if module_directory is not None:
        index = modules.read(module_directory)
        names = modules.order(index, MODULES)
        entries += [cpio.file(f"modules/{name}.ko", modules.load(module_directory / index.paths[name])) for name in names]
    entries.append(cpio.file("modules/order", "".join(f"{name}.ko\n" for name in names).encode()))
    with destination.open("wb") as file:
        cpio.write(file, entries)
