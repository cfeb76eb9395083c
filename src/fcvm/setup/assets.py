"""What setup provides, as one value: found in milliseconds by every command, built by ``fcvm setup`` (build.py).

An ordinary user also gets the assets of the system's data directory (root's), where these fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from fc_agent.structs import Struct, asdict
from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.setup import index
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    Found = TypeVar("Found")

SYSTEM_BASE = Path("/mnt/fcvm-btrfs")

# Where the machine's host says which assets the machine's VMs use: a file with ``Assets.to_json()``.
OVERRIDE = "FCVM_ASSETS"


def tool(tools: Path, name: str) -> list[str]:
    """The start of a command line that runs a program out of a guest image on the host, with the image's libraries."""
    return [str(tools / "ld.so"), "--library-path", str(tools), str(tools / name)]


class Assets(Struct):
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
        """The start of a command line that runs a program of ``tools`` on the host."""
        return tool(self.tools, name)

    @classmethod
    def from_json(cls, text: str) -> Assets:
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
    try:
        return gather(config, layout)
    except SetupError:
        from fcvm.setup import storage

        if not storage.remount(layout.base):
            raise
        return gather(config, layout)


def gather(config: Config, layout: Layout) -> Assets:
    """Look for each of the assets in this data directory, then in the system's.

    Raises:
        SetupError: one is missing.
    """
    missing = f"fcvm is not set up in {layout.base}: {{}} missing."
    image_base, image = image_of(config, layout)
    if image is None:
        raise SetupError(missing.format("the guest image is"), hint="fcvm setup")
    vmlinux = image_base / "kernels" / image.kernel / "vmlinux"
    initrd = machine_initrd = initrd_of(layout, image.kernel, image)
    if config.kernel_profile == "kata":
        kata_base, kata = kata_of(config, layout)
        if kata is None:
            raise SetupError(missing.format("the kata kernel is"), hint="fcvm setup")
        vmlinux = kata_base / "kernels" / kata.id / "vmlinux"
        initrd = initrd_of(layout, kata.id, image)
    if initrd is None or machine_initrd is None:
        raise SetupError(missing.format("the initrd of this version is"), hint="fcvm setup")
    _, firecracker = firecracker_of(config, layout)
    if firecracker is None:
        raise SetupError(missing.format("Firecracker is"), hint="fcvm setup")
    return Assets(
        vmlinux=vmlinux,
        vmlinuz=image_base / "kernels" / image.kernel / "vmlinuz",
        kernel_version=image.kernel_version,
        root_image=image_base / "guest" / image.id / "root.img",
        initrd=initrd,
        machine_initrd=machine_initrd,
        tools=image_base / "guest" / image.id / "tools",
        firecracker=Path(firecracker.path),
        firecracker_version=firecracker.version,
    )


def image_of(config: Config, layout: Layout) -> tuple[Path, index.Image | None]:
    """The guest image, and the data directory that it is in (None: in none)."""
    return _first(layout, lambda base: index.image(config, base))


def kata_of(config: Config, layout: Layout) -> tuple[Path, index.Kata | None]:
    """The kata kernel, and the data directory that it is in."""
    return _first(layout, lambda base: index.kata(config, base))


def firecracker_of(config: Config, layout: Layout) -> tuple[Path, index.Firecracker | None]:
    """The Firecracker binary, and the data directory that knows of it."""
    return _first(layout, lambda base: index.firecracker(config, base))


def initrd_of(layout: Layout, kernel: str, image: index.Image) -> Path | None:
    """The initrd for a kernel; None if it is in no data directory."""

    def look(base: Path) -> Path | None:
        path = index.initrd(base, kernel, image.busybox)
        return path if os.path.exists(path) else None  # which, unlike pathlib's, is so as well where we may not look

    return _first(layout, look)[1]


def _first(layout: Layout, look: Callable[[Path], Found | None]) -> tuple[Path, Found | None]:
    for base in (layout.base, SYSTEM_BASE):
        found = look(base)
        if found is not None:
            return base, found
    return layout.base, None
