"""What setup provides, as one value: found in milliseconds by every command, built by ``fcvm setup`` (build.py).

An ordinary user also gets the assets of the system's data directory (root's), where these fit.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.setup import index
from fcvm.storage.layout import Layout

SYSTEM_BASE = Path("/mnt/fcvm-btrfs")

# Where the machine's host says which assets the machine's VMs use: a file with ``Assets.to_json()``.
OVERRIDE = "FCVM_ASSETS"


@dataclass(frozen=True, slots=True)
class Assets:
    """Everything that a VM is started from. All paths are absolute and named by content, so equal paths mean equal files.

    Attributes:
        vmlinux: the ELF kernel, for Firecracker; of the setting ``kernel_profile``.
        vmlinuz: the Debian kernel as QEMU boots it, for the machine.
        kernel_version: as in ``/usr/lib/modules``, of ``vmlinuz``.
        root_image: the guest's root file system, erofs.
        initrd: for ``vmlinux``, with the agent in it.
        machine_initrd: for ``vmlinuz``; the same file unless the profile is another than ``debian``.
        tools: programs of the image for the host; ``tool`` makes the command line.
        firecracker: the VMM; ``jailer`` lies beside it if it is the pinned release.
        firecracker_version: as it says itself, ``"1.12.1"``.
    """

    vmlinux: Path
    vmlinuz: Path
    kernel_version: str
    root_image: Path
    initrd: Path
    machine_initrd: Path
    tools: Path
    firecracker: Path
    firecracker_version: str

    def to_json(self) -> str:
        return json.dumps({name: str(value) for name, value in asdict(self).items()})

    def tool(self, name: str) -> list[str]:
        """The start of a command line that runs a program of the image, with the image's libraries, on the host."""
        return [str(self.tools / "ld.so"), "--library-path", str(self.tools), str(self.tools / name)]

    @classmethod
    def from_json(cls, text: str) -> "Assets":
        """Raises ValueError or TypeError if ``text`` is not from ``to_json`` of this version."""
        values: dict[str, Any] = json.loads(text)
        plain = ("kernel_version", "firecracker_version")
        parsed: dict[str, Any] = {name: value if name in plain else Path(value) for name, value in values.items()}
        return cls(**parsed)


def find(config: Config, layout: Layout) -> Assets:
    """The assets for these settings.

    Raises:
        SetupError: some are missing; the message says which.
        UsageError: a setting about the kernel is wrong.
    """
    override = os.environ.get(OVERRIDE)
    if override:
        try:
            return Assets.from_json(Path(override).read_text())
        except (OSError, ValueError, TypeError) as error:
            raise SetupError(f"The file {override}, named by {OVERRIDE}, cannot be used: {error}.") from error
    missing: list[str] = []
    for base in dict.fromkeys((layout.base, SYSTEM_BASE)):
        found = look(config, base, missing)
        if found is not None:
            return found
    from fcvm.setup import storage

    if storage.remount(layout.base):
        return find(config, layout)
    raise SetupError(f"fcvm is not set up in {layout.base}: {missing[0]} is missing.", hint="fcvm setup")


def look(config: Config, base: Path, missing: list[str]) -> Assets | None:
    """The assets in data directory ``base``; None, and the first thing missing is noted, if they are not all there."""
    image = index.image(config, base)
    if image is None:
        missing.append("the guest image")
        return None
    vmlinux = base / "kernels" / image.kernel / "vmlinux"
    initrd = machine_initrd = index.initrd(base, image.kernel, image.busybox)
    if index.profile(config) == "kata":
        kata = index.kata(config, base)
        if kata is None:
            missing.append("the kata kernel")
            return None
        vmlinux = base / "kernels" / kata.id / "vmlinux"
        initrd = index.initrd(base, kata.id, image.busybox)
    if not (initrd.exists() and machine_initrd.exists()):
        missing.append("the initrd")
        return None
    firecracker = index.firecracker(config, base)
    if firecracker is None:
        missing.append("Firecracker")
        return None
    return Assets(
        vmlinux=vmlinux,
        vmlinuz=base / "kernels" / image.kernel / "vmlinuz",
        kernel_version=image.kernel_version,
        root_image=base / "guest" / image.id / "root.img",
        initrd=initrd,
        machine_initrd=machine_initrd,
        tools=base / "guest" / image.id / "tools",
        firecracker=Path(firecracker.path),
        firecracker_version=firecracker.version,
    )
