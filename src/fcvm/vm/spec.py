"""What a VM shall be: every choice of `fcvm podman run`, checked, with paths absolute; plain JSON both ways."""

from __future__ import annotations

from fc_agent.structs import Struct, asdict, field
from fcvm.errors import UsageError
from fcvm.volumes.spec import Volume

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_CPU = 32  # Firecracker's own limit (machine-config.vcpu_count)
MIN_MEMORY = 128  # MiB; below this the guest OS and Podman do not fit
MAX_MEMORY = 1 << 20


class ImageUse(Struct):
    """The image disk a VM runs.

    Attributes:
        reference: the name as the user gave it.
        id: the image's config digest, ``sha256:...``: what Podman in the guest runs.
        digest: the manifest's digest.
        path: the image disk on the user's host.
        user: as whom its containers run (``USER`` of a Dockerfile), empty for root.
    """

    reference: str
    id: str
    digest: str
    path: str
    user: str = ""


class RunSpec(Struct):
    """One `fcvm podman run`.

    Attributes:
        command: None for the image's own; ``entrypoint`` likewise.
        memory: MiB. ``scratch_size`` as well.
        stop_timeout: seconds.
        health_check: ``None`` (the image's HEALTHCHECK or "it runs") or a URL asked in the guest.
        kernel: path of a vmlinux on the user's host; None for the one from setup.
        log_prefix: None: on those of stdout and stderr that are terminals.
        owner: the container's user as ``UID:GID``, by what the image knows of it, if volumes are to be that user's.
        nested: path on the user's host of the disk for a VM that runs VMs itself; None for any other VM.
        snapshot: whether to start from a boot snapshot; ``warm``: from one with the application up (vm/warm.py).
    """

    name: str
    image: ImageUse
    command: list[str] | None = None
    entrypoint: list[str] | None = None
    env: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    workdir: str | None = None
    privileged: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    cpu: int = 2
    memory: int = 1024
    scratch_size: int = 10240
    kernel: str | None = None
    firecracker_args: list[str] = field(default_factory=list)
    tty: bool = False
    interactive: bool = False
    detach: bool = False
    remove: bool = True
    stop_timeout: int = 10
    health_check: str | None = None
    log_prefix: bool | None = None
    network: str | None = None
    publish: list[str] = field(default_factory=list)
    forward_localhost: list[str] = field(default_factory=list)
    dns: list[str] = field(default_factory=list)
    volumes: list[Volume] = field(default_factory=list)
    timings: bool = False
    snapshot: bool = True
    nested: str | None = None
    warm: bool = False
    owner: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunSpec:
        volumes = [Volume(**volume) for volume in values.get("volumes", ())]
        return cls(**{**values, "image": ImageUse(**values["image"]), "volumes": volumes})


def check_cpu(count: int) -> int:
    """``count`` if a VM can have so many CPUs; raises UsageError."""
    if not 1 <= count <= MAX_CPU:
        raise UsageError(f"A VM has 1 to {MAX_CPU} CPUs, not {count}.", hint="--cpu 2")
    return count


def check_memory(mib: int) -> int:
    """``mib`` if a VM can have so much memory; raises UsageError."""
    if not MIN_MEMORY <= mib <= MAX_MEMORY:
        raise UsageError(
            f"A VM has {MIN_MEMORY} MiB to {MAX_MEMORY >> 10} GiB of memory, not {mib} MiB.", hint="--mem 1g"
        )
    return mib
