"""Make a VM from a snapshot: its directory, and ``PUT /snapshot/load``.

Before it loads, the directory (Firecracker's working directory) must hold every file that the VM had, under the same
relative names: the disks, and nothing at ``vsock.sock``. Any failed load makes Firecracker useless, so it is killed.

Two backends provide the memory. *file*: Firecracker maps ``memory.bin`` privately, the kernel reads it in and shares
the page cache between all clones. *uffd*: memory is anonymous, and every first touch of a page is answered by our
page-fault server (memory.py), whose socket lies in the directory as ``memory.sock``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fcvm.errors import FirecrackerError, SnapshotError
from fcvm.firecracker.api import Api, encode
from fcvm.firecracker.boot import SCRATCH_DISK
from fcvm.firecracker.process import VSOCK, Firecracker
from fcvm.snapshots import create, manifest
from fcvm.snapshots.store import Snapshot
from fcvm.storage import disks as storage
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Literal

    Backend = Literal["file", "uffd"]

BACKENDS: tuple[Backend, ...] = ("file", "uffd")
MEMORY_SOCKET = "memory.sock"

RESUME = encode("PATCH", "/vm", {"state": "Resumed"})  # made once: resuming is what a clone consists of


def find_disks(snapshot: Snapshot, layout: Layout) -> dict[str, Path]:
    """The read-only disks that a snapshot's VMs share: name in the VM's directory -> file.

    Raises:
        SnapshotError: one of them is gone.
    """
    found = {}
    for name, relative in snapshot.manifest.disks.items():
        found[name] = layout.base / relative
        if not found[name].exists():
            reference = snapshot.manifest.image.get("reference")
            image = relative.startswith("images/") and reference
            raise SnapshotError(
                f"The snapshot {snapshot.tag!r} needs {found[name]}, which is not there.",
                hint=f"fcvm images pull {reference}" if image else f"fcvm setup; or fcvm snapshots rm {snapshot.tag}",
            )
    return found


def furnish(
    directory: Path, snapshot: Snapshot, disks: Mapping[str, Path], *, memory_socket: Path | None = None
) -> None:
    """Put what a restored VM needs into its ``directory``: the shared disks by symlink, its own by reflink.

    Arguments:
        disks: of ``find_disks``; names that are there already are left as they are.
        memory_socket: the page-fault server's, for the uffd backend.

    Raises:
        HostError: there is no space left.
    """
    for name, path in disks.items():
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(path)
    storage.clone(snapshot.scratch, directory / SCRATCH_DISK)
    if memory_socket is not None:
        (directory / MEMORY_SOCKET).symlink_to(memory_socket)


def check(snapshot: Snapshot, vmm: Firecracker) -> None:
    """Whether the snapshot restores here in this Firecracker; raises SnapshotError."""
    version = vmm.api.get("/version")["firecracker_version"]
    manifest.check(snapshot.tag, snapshot.manifest, firecracker=version, host=manifest.this_host())


def load(
    vmm: Firecracker,
    snapshot: Snapshot,
    *,
    backend: Backend = "file",
    resume: bool = False,
    dirty_tracking: bool = True,
) -> None:
    """Load the snapshot into a fresh Firecracker, whose directory is furnished.

    Arguments:
        resume: let it run at once; otherwise it stands still until ``resume``, and drives can be replaced.
        dirty_tracking: needed for small later snapshots of this VM; a first write to a page then costs a fault.

    Raises:
        SnapshotError: it cannot be restored; Firecracker is dead then.
    """
    send_load(vmm, snapshot, backend=backend, resume=resume, dirty_tracking=dirty_tracking)
    receive_load(vmm, snapshot)


def send_load(
    vmm: Firecracker,
    snapshot: Snapshot,
    *,
    backend: Backend = "file",
    resume: bool = False,
    dirty_tracking: bool = True,
) -> None:
    """Only send: most of a load is one sleeping ioctl, so many clones load in the time of one."""
    (vmm.directory / VSOCK).unlink(missing_ok=True)  # one that is there makes the load fail
    if dirty_tracking:
        create.relative_to(vmm.directory, snapshot.memory)
    memory = MEMORY_SOCKET if backend == "uffd" else str(snapshot.memory)
    request: dict[str, Any] = {
        "snapshot_path": str(snapshot.vmstate),
        "mem_backend": {"backend_type": "Uffd" if backend == "uffd" else "File", "backend_path": memory},
        "enable_diff_snapshots": dirty_tracking,
        "resume_vm": resume,
    }
    try:
        vmm.api.send("PUT", "/snapshot/load", request)
    except FirecrackerError as error:
        raise _failed(vmm, snapshot, error) from error


def receive_load(vmm: Firecracker, snapshot: Snapshot) -> None:
    """Wait for the load that was sent."""
    try:
        vmm.api.receive("PUT /snapshot/load")
    except FirecrackerError as error:
        raise _failed(vmm, snapshot, error) from error


def resume(api: Api) -> None:
    """Let a loaded VM run; raises FirecrackerError when the VMM has died."""
    try:
        api.socket.sendall(RESUME)
    except OSError as error:
        raise FirecrackerError(f"Firecracker does not answer PATCH /vm: {error}.") from error
    api.receive("PATCH /vm")


def replace_drive(api: Api, drive: str, path: str) -> None:
    """Give a loaded VM, before it runs, another file for a drive: a boot snapshot's placeholders become real disks.

    Arguments:
        drive: its id, as ``boot.configure`` gave it: ``scratch``, ``image``.
        path: the new file, relative to the VM's directory. The guest sees its content and size.
    """
    api.patch(f"/drives/{drive}", {"drive_id": drive, "path_on_host": path})


def _failed(vmm: Firecracker, snapshot: Snapshot, error: FirecrackerError) -> SnapshotError:
    vmm.kill()
    return SnapshotError(
        f"The snapshot {snapshot.tag!r} cannot be restored: {error.message}{vmm.console.quote()}",
        hint=f"fcvm snapshots rm {snapshot.tag}, then make it again",
    )
