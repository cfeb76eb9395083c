"""What setup has built and fetched, as small JSON files that point to it; read by every command, so all of it is light.

    guest/<key>.json           Image: the guest image and kernel for a recipe, by content
    kernels/<key>.json         Kata: the kernel for a release archive
    bin/firecracker.json       Firecracker: the binary chosen
    initrd/<key>/initrd.img    needs no pointer: what it is made of is known without building it

A key is the hash of what the thing is built from (recipe, sources, settings), so a change of those means "not there yet"
and never a stale file.
"""

import json
import os
import re
from pathlib import Path

from fc_agent.structs import Struct, asdict, replace
from fcvm.config import Config
from fcvm.errors import HostError, UsageError
from fcvm.setup import keys, recipe
from fcvm.storage import records

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

KATA_VERSION = "3.32.0"
KATA_URL = "https://github.com/kata-containers/kata-containers/releases/download/{version}/kata-static-{version}-{arch}.tar.zst"
KATA_SHA256 = {"amd64": "1449ecea50bd91fa73a94648db195d18950fe869ba4b1f12d05f55f1fa7c1b01"}

INITRD_RECIPE = 2  # raise it when the same inputs shall give another initrd

# Loaded in this order. What only some VMs need (tun, bridge, nftables, KVM, btrfs) is loaded on demand.
INITRD_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "erofs",
    "overlay",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
)
INITRD_INIT = Path(__file__).with_name("init.sh")
SOURCES = Path(__file__).parent.parent.parent


def architecture() -> str:
    """Debian's name of this host's architecture.

    Raises:
        HostError: Firecracker does not run on it.
    """
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise HostError(f"Firecracker runs on x86_64 and aarch64, not on {machine}.")
    return ARCHITECTURES[machine]


class Image(Struct):
    """A guest image and its kernel: ``id`` under ``guest/``, ``kernel`` under ``kernels/``; ``busybox`` is its key."""

    id: str
    kernel: str
    kernel_version: str
    busybox: str
    suite: str

    def complete(self, base: Path) -> bool:
        """Whether all of it is in data directory ``base``."""
        parts = (f"guest/{self.id}/root.img", f"kernels/{self.kernel}/vmlinux", f"kernels/{self.kernel}/vmlinuz")
        return all((base / part).exists() for part in parts)


def image_pointer(config: Config, base: Path) -> Path:
    """The file that names the image for these settings."""
    arch = architecture()
    inputs = [recipe.VERSION, recipe.PACKAGES, recipe.EXCLUDED, recipe.script(arch), config.debian_suite, arch]
    return base / "guest" / f"{keys.of(inputs)}.json"


def image(config: Config, base: Path) -> Image | None:
    """The image in data directory ``base``; None if it is not there as a whole."""
    try:
        found = records.read(Image, image_pointer(config, base))
    except (OSError, ValueError):
        return None
    return found if found.complete(base) else None


class Kata(Struct):
    """A kernel out of a Kata Containers release: ``id`` under ``kernels/``."""

    id: str
    version: str


def kata_archive(config: Config) -> tuple[str, str]:
    """URL and SHA-256 of the release archive to take the kernel from.

    Raises:
        UsageError: there is a URL without a checksum, or none is known for this architecture.
    """
    url, sha256 = config.kernel_url, config.kernel_sha256
    if not url:
        url = KATA_URL.format(version=KATA_VERSION, arch=architecture())
        sha256 = sha256 or KATA_SHA256.get(architecture(), "")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(
            f"The kernel archive {url} needs a SHA-256 checksum of 64 hexadecimal digits.",
            hint="set kernel_sha256 beside kernel_url, or FCVM_KERNEL_SHA256",
        )
    return url, sha256.lower()


def kata_pointer(config: Config, base: Path) -> Path:
    """The file that names the kata kernel for these settings."""
    return base / "kernels" / f"{keys.of(kata_archive(config))}.json"


def kata(config: Config, base: Path) -> Kata | None:
    """The kata kernel in data directory ``base``; None if it is not there."""
    try:
        found = records.read(Kata, kata_pointer(config, base))
    except (OSError, ValueError):
        return None
    return found if (base / "kernels" / found.id / "vmlinux").exists() else None


def initrd(base: Path, kernel: str, busybox: str) -> Path:
    """Where the initrd for a kernel is or will be, given the keys of that and of the image's busybox."""
    agent = keys.of_sources([SOURCES / "fc_agent", SOURCES / "fuse_pipe"])
    made_by = [(SOURCES / "fcvm/agent/pack.py").read_text(), INITRD_INIT.read_text(), INITRD_MODULES]
    key = keys.of([INITRD_RECIPE, kernel, busybox, agent, made_by])
    return base / "initrd" / key / "initrd.img"


class Firecracker(Struct):
    """A binary that was found good. ``size`` and ``mtime_ns`` tell whether it is still the same.

    ``pinned``: it is the release that setup fetched, and the path in the file is relative to the data directory.
    """

    path: str
    version: str
    size: int
    mtime_ns: int
    pinned: bool

    def valid(self, config: Config) -> bool:
        """Whether the binary is unchanged, and still the one that the settings ask for."""
        if config.firecracker and os.path.realpath(named(config.firecracker)) != os.path.realpath(self.path):
            return False
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


def named(program: str) -> str:
    """The file that the setting ``firecracker`` names: a path, or a program on PATH."""
    import shutil  # only for those who have the setting

    path = os.path.expanduser(program)
    return shutil.which(path) or path


def firecracker(config: Config, base: Path) -> Firecracker | None:
    """The binary chosen for data directory ``base``; None if there is none, or it has changed."""
    try:
        stored = records.read(Firecracker, base / "bin/firecracker.json")
    except (OSError, ValueError):
        return None
    choice = replace(stored, path=str(base / stored.path))
    return choice if choice.valid(config) else None


def to_json(value: Image | Kata | Firecracker) -> str:
    """The content of a pointer file."""
    return json.dumps(asdict(value), indent=2) + "\n"
