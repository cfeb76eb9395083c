"""What a snapshot is of: ``config.json``, and whether this host can restore it.

Paths in it are relative to the data directory (``guest/<key>/root.img``), so the data directory can move and a
snapshot can be carried to another host that has the same guest image and container image.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from fc_agent.protocol import PROTOCOL
from fc_agent.structs import Struct, asdict, field, fields
from fcvm.errors import SnapshotError
from fcvm.firecracker.boot import Hardware
from fcvm.storage import records

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SCHEMA = 1
NAME = "config.json"


class Host(Struct):
    """What of a host matters to a restored VM: it goes on using the CPU's features that it found when it booted.

    Attributes:
        kernel: release of the host's kernel, ``6.12.1-amd64``: KVM's saved state may grow with it.
        cpu: vendor and model, for people.
        vendor: a snapshot restores on CPUs of the same vendor only.
        flags: the CPU's features, sorted.
    """

    kernel: str
    cpu: str
    vendor: str
    flags: tuple[str, ...]


class Manifest(Struct):
    """A snapshot's ``config.json``.

    Attributes:
        hardware: what the VM was booted with.
        disks: name of a read-only disk in the VM's directory -> its file, relative to the data directory.
        kernel: key of the guest's kernel; ``initrd`` likewise.
        image: the container image: ``reference``, ``id``, ``digest``; empty for a boot snapshot.
        spec: the VM's RunSpec as JSON; empty for a boot snapshot.
        network: ``rootless``, ``bridged`` or ``none``: the mode it ran in, the default for its clones.
        firecracker: version of the VMM, ``1.12.1``.
        protocol: of the guest agent.
        created_at: seconds since the epoch.
        kind: ``user`` (made by `fcvm snapshot create`), or a cache of ours: ``boot`` or ``warm``.
        parent: tag of the snapshot that its VM was restored from, for people.
    """

    hardware: Hardware
    disks: Mapping[str, str]
    firecracker: str
    host: Host
    created_at: float
    kernel: str = ""
    initrd: str = ""
    image: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    network: str = "none"
    protocol: int = PROTOCOL
    kind: str = "user"
    parent: str | None = None
    schema: int = SCHEMA

    def write(self, directory: Path) -> None:
        """Put it into a snapshot that is being made."""
        _check_disks(self.disks)
        (directory / NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """That of the snapshot in ``directory``.

        Raises:
            SnapshotError: it is missing, damaged, or of another schema.
        """
        try:
            values = records.load(directory / NAME)
            if values.get("schema") != SCHEMA:
                raise SnapshotError(
                    f"The snapshot {directory.name!r} has format {values.get('schema')}, this fcvm reads {SCHEMA}.",
                    hint=f"fcvm snapshots rm {directory.name}, then make it again",
                )
            values["hardware"] = records.checked(Hardware, values["hardware"])
            host = values["host"]
            values["host"] = records.checked(Host, {**host, "flags": tuple(host["flags"])})
            known = set(fields(cls))
            manifest = records.checked(cls, {name: value for name, value in values.items() if name in known})
            _check_disks(manifest.disks)
            if not records.is_time(manifest.created_at):
                raise ValueError(f"created_at is {manifest.created_at!r}")
            return manifest
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(
                f"The snapshot {directory.name!r} is damaged: its {NAME} cannot be read: {error}.",
                hint=f"fcvm snapshots rm {directory.name}, then make it again",
            ) from error


def _check_disks(disks: Mapping[str, Any]) -> None:
    """Raise ValueError unless every disk is a file of the data directory: who made the snapshot may be anyone."""
    for name, path in disks.items():
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} cannot name a disk")
        if not isinstance(path, str) or os.path.isabs(path) or ".." in Path(path).parts:
            raise ValueError(f"{path!r} is not relative to the data directory")


def this_host(cpuinfo: Path = Path("/proc/cpuinfo")) -> Host:
    """The host that we run on, from the first CPU in ``/proc/cpuinfo`` (proc(5))."""
    values: dict[str, str] = {}
    with open(cpuinfo) as file:
        for line in file:
            name, _, value = line.partition(":")
            if not line.strip():
                break
            values[name.strip()] = value.strip()
    system = os.uname()
    return Host(
        kernel=system.release,
        cpu=values.get("model name") or values.get("CPU part") or system.machine,
        vendor=f"{system.machine} {values.get('vendor_id') or values.get('CPU implementer') or ''}".strip(),
        flags=tuple(sorted((values.get("flags") or values.get("Features") or "").split())),
    )


def check(tag: str, manifest: Manifest, *, firecracker: str, host: Host) -> None:
    """Whether a snapshot restores on ``host`` with this version of Firecracker, and its agent and we understand each other.

    Its vCPUs' state is only valid on a CPU of the same vendor that has every feature the guest may be using, on a
    kernel whose KVM is not older, and in the Firecracker series (major and minor version) whose format it has.

    Raises:
        SnapshotError: it does not, and why.
    """
    again = f"fcvm snapshots rm {tag}, then make it again on this host"
    if manifest.protocol != PROTOCOL:
        raise SnapshotError(
            f"The guest agent of {tag!r} speaks version {manifest.protocol} of the protocol, this fcvm version {PROTOCOL}.",
            hint=again,
        )
    if _series(manifest.firecracker) != _series(firecracker):
        raise SnapshotError(
            f"The snapshot {tag!r} was made by Firecracker {manifest.firecracker}, and here is {firecracker}.",
            hint=f"give the other one by FCVM_FIRECRACKER; or {again}",
        )
    if manifest.host.vendor != host.vendor:
        raise SnapshotError(
            f"The snapshot {tag!r} was made on another kind of CPU: {manifest.host.cpu}, and this is {host.cpu}.",
            hint=again,
        )
    missing = sorted(set(manifest.host.flags) - set(host.flags))
    if missing:
        raise SnapshotError(
            f"The snapshot {tag!r} was made on {manifest.host.cpu}, which has CPU features that "
            f"{host.cpu} lacks: {' '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}.",
            hint=again,
        )
    if _series(manifest.host.kernel) > _series(host.kernel):
        raise SnapshotError(
            f"The snapshot {tag!r} was made under Linux {manifest.host.kernel}, newer than this host's {host.kernel}.",
            hint=again,
        )


def _series(version: str) -> tuple[int, ...]:
    """Major and minor number of a version like ``6.12.1-amd64``."""
    numbers = []
    for word in version.split(".")[:2]:
        digits = word[: len(word) - len(word.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)
