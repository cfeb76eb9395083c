"""What other commands may ask a VM's supervisor to do, besides ending it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fc_agent.structs import asdict
from fcvm import host
from fcvm.agent import session
from fcvm.errors import AgentError, ConflictError, SnapshotError, UsageError
from fcvm.firecracker import boot
from fcvm.vm import sessions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from fcvm.snapshots.create import Timings
    from fcvm.vm.supervisor import Supervisor

    Operation = Callable[["Supervisor", dict[str, Any]], dict[str, Any]]

COUNT_LIMIT = 120.0  # seconds in which a guest has to tell what runs in it: an emulated one that runs a VM is slow
# Prints how many processes of a guest have a VM open, whoever's it is.
COUNT_VMS = "ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c 'anon_inode:kvm-vm$'"


def perform(vm: Supervisor, request: dict[str, Any]) -> dict[str, Any]:
    """Carry out ``request["op"]`` and return the answer; raises FcvmError."""
    operation = OPERATIONS.get(str(request.get("op")))
    if operation is None:
        raise UsageError(f"The VM's supervisor does not know the request {request.get('op')!r}.", hint="fcvm --version")
    return {"ok": True, **operation(vm, request)}


def snapshot(vm: Supervisor, request: dict[str, Any]) -> dict[str, Any]:
    """Take the snapshot ``request["tag"]``; the VM goes on. The answer holds the times of ``create.Timings``."""
    return {"timings": asdict(take(vm, str(request.get("tag"))))}


def take(
    vm: Supervisor, tag: str, *, kind: str = "user", fill: Callable[[Path], None] = lambda directory: None
) -> Timings:
    """Take a snapshot of the VM, which goes on; raises FcvmError. ``fill`` as in ``create.take``."""
    from fcvm.snapshots import create
    from fcvm.snapshots.manifest import Manifest, this_host
    from fcvm.vm.start import hardware

    if not vm.running:
        raise ConflictError(f"The VM {vm.spec.name!r} is not running yet.", hint="fcvm ls")
    shared = [boot.ROOT_DISK, boot.IMAGE_DISK]
    if vm.spec.nested is not None:
        shared.append(boot.NESTED_DISK)
        _refuse_running_vms(vm)
    manifest = Manifest(
        hardware=hardware(vm.spec, vm.network.tap, vm.network.mac),
        disks={name: _shared(vm, name) for name in shared},
        firecracker=vm.firecracker.api.get("/version")["firecracker_version"],
        host=this_host(),
        created_at=time.time(),
        image={"reference": vm.spec.image.reference, "id": vm.spec.image.id, "digest": vm.spec.image.digest},
        spec=vm.spec.to_json(),
        network=vm.network.spec.mode,
        kind=kind,
        parent=vm.entry.record.snapshot,
    )
    still = vm.freezing.frozen(vm.firecracker.pidfd)
    return create.take(vm.layout, tag, vm.firecracker, manifest, vm.volumes.save, still=still, fill=fill)


def _refuse_running_vms(vm: Supervisor) -> None:
    """Raise ConflictError if VMs run in this one.

    Firecracker (1.12) does not save KVM's nested state, so a vCPU of this VM that happens to be running a VM's code when it
    is paused would go on, in a clone, with that VM's registers as its own.
    """
    count = _count_vms(vm)
    if count:
        raise ConflictError(
            f"{count} VM{'s run' if count > 1 else ' runs'} in the VM {vm.spec.name!r}, and Firecracker does not save that "
            "state: a snapshot would not restore.",
            hint=f"fcvm exec {vm.spec.name} --vm -- fcvm ls; take snapshots of those VMs inside, stop them, try again",
        )


def _count_vms(vm: Supervisor) -> int:
    """How many VMs run in this one; raises AgentError if it does not tell: it may hang, and the supervisor would with it."""
    answers: list[bytes] = []

    def ask() -> None:
        request = session.Request(["/bin/sh", "-c", COUNT_VMS], target="vm", cwd="/")
        with contextlib.suppress(AgentError, OSError):
            answers.append(sessions.output(vm.directory, request)[1].strip())

    asking = threading.Thread(target=ask, name="count VMs", daemon=True)  # a guest that hangs keeps it until its end
    asking.start()
    asking.join(host.patience(COUNT_LIMIT))
    if not answers or not answers[0].isdigit():
        raise AgentError(
            f"The VM {vm.spec.name!r} does not tell whether VMs run in it; with one there would be no snapshot that restores.",
            hint=f"fcvm logs --console {vm.spec.name}",
        )
    return int(answers[0])


def _shared(vm: Supervisor, name: str) -> str:
    """The file behind a shared disk, relative to the data directory."""
    path = Path(os.readlink(vm.directory / name))
    if not path.is_relative_to(vm.layout.base):
        raise SnapshotError(
            f"The VM's {name} lies outside of the data directory, in {path}.",
            hint=f"FCVM_BASE_DIR={vm.layout.base} fcvm setup",
        )
    return str(path.relative_to(vm.layout.base))


OPERATIONS: dict[str, Operation] = {"snapshot": snapshot}
