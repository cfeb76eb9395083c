"""What a VM needs to run VMs itself, and whether it can be had here.

x86-64: nothing but the CPU's extension, which stock Firecracker passes through where the host's KVM may nest, and KVM's
modules, which Debian's kernel has. arm64: FEAT_NV2, a fork of Firecracker that asks KVM for it (``--enable-nv2``), and
Linux 6.18 or later on both sides.
"""

import os
import re
from pathlib import Path

from fcvm import host
from fcvm.config import Config
from fcvm.errors import HostError, UsageError
from fcvm.setup.kernel import NV2_OPTION
from fcvm.storage.layout import Layout
from fcvm.volumes.spec import Volume

ARM_KERNEL = (6, 18)
FURTHER = Path("/mnt/fcvm-btrfs")  # in the VM: a data directory of the host's, or at least its images
DEFAULT_MEMORY = 3  # times that of other VMs: room for one inside, and for the system around it


def firecracker_args(words: list[str], config: Config, machine: str | None = None) -> list[str]:
    """The user's words for Firecracker's command line, and those that the setting ``nv2`` stands for.

    Arguments:
        machine: the host's architecture as uname(2) says it; None for this one's.

    Raises:
        UsageError: the setting is made on another architecture than arm64.
    """
    if not config.nv2:
        return words
    if (machine or os.uname().machine) != "aarch64":
        raise UsageError(
            "The setting nv2 is for arm64; on x86-64 a VM needs nothing of Firecracker to run VMs.",
            hint="leave out FCVM_NV2, and nv2 in the configuration file",
        )
    return words if NV2_OPTION in words else [*words, NV2_OPTION]


def check(config: Config, kernel: str | None, kernel_version: str, words: list[str], machine: str | None = None) -> None:
    """Whether these choices of the user's make a VM that can run VMs.

    Arguments:
        kernel: the user's own kernel, which is not looked at; None for setup's, of version ``kernel_version``.
        words: for Firecracker's command line.

    Raises:
        UsageError: they do not, and what to choose.
    """
    if (machine or os.uname().machine) == "aarch64":
        if NV2_OPTION not in words:
            raise UsageError(
                f"On arm64 a VM can run VMs only under a Firecracker that knows {NV2_OPTION}.",
                hint=f"FCVM_FIRECRACKER=PATH FCVM_NV2=1, or --firecracker-args={NV2_OPTION}",
            )
        if kernel is None and _series(kernel_version) < ARM_KERNEL:
            raise UsageError(
                f"On arm64 a VM that runs VMs needs Linux {ARM_KERNEL[0]}.{ARM_KERNEL[1]} or later; setup's is {kernel_version}.",
                hint="--kernel FILE, one with KVM built in",
            )
    elif kernel is None and config.kernel_profile != "debian":
        raise UsageError(
            f"The kernel of the profile {config.kernel_profile} has no KVM.",
            hint="FCVM_KERNEL_PROFILE=debian, or --kernel FILE with one that has KVM built in",
        )


def with_images(volumes: list[Volume], layout: Layout) -> list[Volume]:
    """``volumes``, and this host's images where fcvm in the VM looks for more, unless the user has mapped something there."""
    place = FURTHER / "images"
    if any(place.is_relative_to(volume.guest) or Path(volume.guest).is_relative_to(place) for volume in volumes):
        return volumes
    return [*volumes, Volume(os.path.realpath(layout.images), str(place), read_only=True)]


def require_nesting() -> None:
    """Raise HostError unless guests of this host can use KVM; called where the VMs run."""
    state = host.nesting()
    if not state.usable:
        raise HostError(state.reason, hint=state.hint)


def _series(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
