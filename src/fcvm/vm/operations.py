"""What other commands may ask a VM's supervisor to do, besides ending it."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fc_agent.protocol import PROTOCOL
from fcvm.errors import ConflictError, SnapshotError, UsageError
from fcvm.firecracker import boot

if TYPE_CHECKING:
    from fcvm.vm.supervisor import Supervisor

Operation = Callable[["Supervisor", dict[str, Any]], dict[str, Any]]


def perform(vm: "Supervisor", request: dict[str, Any]) -> dict[str, Any]:
    """Carry out ``request["op"]`` and return the answer; raises FcvmError."""
    operation = OPERATIONS.get(str(request.get("op")))
    if operation is None:
        raise UsageError(f"The VM's supervisor does not know the request {request.get('op')!r}.", hint="fcvm --version")
    return {"ok": True, **operation(vm, request)}


def snapshot(vm: "Supervisor", request: dict[str, Any]) -> dict[str, Any]:
    """Take the snapshot ``request["tag"]``; the VM goes on. The answer holds the times of ``create.Timings``."""
    from fcvm.snapshots import create
    from fcvm.snapshots.manifest import Manifest, this_host
    from fcvm.vm.start import hardware

    if not vm.running:
        raise ConflictError(f"The VM {vm.spec.name!r} is not running yet.", hint="fcvm ls")
    manifest = Manifest(
        hardware=hardware(vm.spec, vm.network.tap, vm.network.mac),
        disks={name: _shared(vm, name) for name in (boot.ROOT_DISK, boot.IMAGE_DISK)},
        firecracker=vm.firecracker.api.get("/version")["firecracker_version"],
        host=this_host(),
        created_at=time.time(),
        image={"reference": vm.spec.image.reference, "id": vm.spec.image.id, "digest": vm.spec.image.digest},
        spec=vm.spec.to_json(),
        network=vm.network.spec.mode,
        protocol=PROTOCOL,
        parent=vm.entry.record.snapshot,
    )
    took = create.take(vm.layout, str(request["tag"]), vm.firecracker, manifest, vm.volumes.save)
    return {"timings": asdict(took)}


def _shared(vm: "Supervisor", name: str) -> str:
    """The file behind a shared disk, relative to the data directory."""
    path = Path(os.readlink(vm.directory / name))
    if not path.is_relative_to(vm.layout.base):
        raise SnapshotError(
            f"The VM's {name} lies outside of the data directory, in {path}.",
            hint=f"FCVM_BASE_DIR={vm.layout.base} fcvm setup",
        )
    return str(path.relative_to(vm.layout.base))


OPERATIONS: dict[str, Operation] = {"snapshot": snapshot}
