"""Take a snapshot of a running VM: memory, devices and disk of one moment, and let it run on.

Firecracker writes only the pages that are dirty since ... what? That is this module's concern. A VM that was booted
with dirty tracking has touched all of its memory's content, so its first snapshot, as *Diff*, is complete. Every
later one is relative to the memory file before, or to the one it was restored from; Firecracker writes a Diff *into*
an existing file, so given a reflink of that file it makes a complete one that shares all unchanged blocks (seen with
1.12: tests/host/test_snapshots_create.py). The file that the dirty pages are relative to is kept as a hard link,
``memory.base``, in the VM's directory, once its content is on the disk; where it is not known, ``memory.unknown`` lies
there and a Full one is taken. All snapshots of a VM without dirty tracking are Full, and it keeps no such file.

Slow work is done before the pause: writing back the disk's dirty pages (a reflink waits for that), and copying the
base where the file system has no reflinks.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.agent import vsock
from fcvm.errors import FirecrackerError, SnapshotError
from fcvm.firecracker.boot import SCRATCH_DISK
from fcvm.firecracker.process import VSOCK, Firecracker
from fcvm.linux import files, holes
from fcvm.snapshots import store
from fcvm.snapshots.manifest import Manifest
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    SaveVolumes = Callable[[], list[dict[str, Any]]]

BASE = "memory.base"
UNKNOWN = "memory.unknown"
WRITE_TIMEOUT = 1800.0  # seconds; 64 GiB to a slow disk take a while


class Timings(Struct):
    """How a snapshot was taken and how long each step took, in seconds; the VM stood still for ``paused``.

    Attributes:
        kind: ``Diff`` or ``Full``.
        prepare: before the pause.
        write: Firecracker writing memory and device state.
        disk: cloning the writable disk.
    """

    kind: str
    prepare: float
    write: float
    disk: float
    paused: float


def take(
    layout: Layout,
    tag: str,
    vmm: Firecracker,
    manifest: Manifest,
    volumes: SaveVolumes = list,
    *,
    still: AbstractContextManager[None] | None = None,
    fill: Callable[[Path], None] = lambda directory: None,
) -> Timings:
    """Take and publish the snapshot ``tag`` of a running VM, which goes on, whatever happens here.

    Arguments:
        manifest: what it is of.
        volumes: gives the state of its mapped host directories, while it stands still.
        still: entered before it is paused, left when it runs again.
        fill: puts more files into the snapshot's directory, once the VM runs again and before it is published.

    Raises:
        ConflictError: the tag is taken. Those of ``create``.
    """
    with store.creating(layout, tag) as destination:
        timings = create(vmm, vmm.directory, destination, volumes, still=still)
        try:
            manifest.write(destination)
            fill(destination)
        except OSError as error:
            raise store.write_error(error, destination) from error
    return timings


def create(
    vmm: Firecracker,
    directory: Path,
    destination: Path,
    volumes: SaveVolumes = list,
    *,
    still: AbstractContextManager[None] | None = None,
) -> Timings:
    """Put memory, device state, disk and volumes' state of the VM that runs in ``directory`` into ``destination``.

    The VM runs on afterwards, whatever happens here; after an error ``destination`` is incomplete and to be thrown
    away. Its vsock connections are reset (Firecracker does that), its listeners stay.

    Raises:
        HostError: there is no space left. SnapshotError: it cannot be taken. FirecrackerError: the VMM died.
    """
    try:
        started = time.monotonic()
        memory = destination / store.MEMORY
        tracked = vmm.api.get("/machine-config")["track_dirty_pages"]
        kind = _prepare(directory, memory, tracked=tracked)
        relative_to(directory, None)  # whatever is written from now on counts as clean, and is in this snapshot alone
        begin = time.monotonic()
        with still or contextlib.nullcontext():
            try:
                with paused(vmm):
                    frozen = time.monotonic()
                    _write(vmm, kind, destination)
                    wrote = time.monotonic()
                    files.clone(directory / SCRATCH_DISK, destination / store.SCRATCH)
                    cloned = time.monotonic()
                    states = volumes()
            finally:  # Firecracker may have reset them, even if the snapshot has failed
                vsock.announce_reset(directory / VSOCK)
        end = time.monotonic()
        (destination / store.VOLUMES).write_text(json.dumps(states) + "\n")
        if kind == "Full":
            holes.dig(memory)
        files.sync(memory)
        if tracked:
            relative_to(directory, memory)
    except OSError as error:
        raise store.write_error(error, destination) from error
    return Timings(kind, prepare=begin - started, write=wrote - frozen, disk=cloned - wrote, paused=end - begin)


@contextlib.contextmanager
def paused(vmm: Firecracker) -> Iterator[None]:
    """The VM stands still inside the block; one that stood still already is left so."""
    running = vmm.api.get("/")["state"] == "Running"
    try:
        if running:
            vmm.api.patch("/vm", {"state": "Paused"})
        yield
    finally:
        if running and not vmm.ended():
            vmm.api.patch("/vm", {"state": "Resumed"})


def relative_to(directory: Path, memory: Path | None) -> None:
    """Note what the dirty pages of the VM in ``directory`` are relative to from now on; None: not known."""
    (directory / UNKNOWN).touch()  # first: on a full disk, where this fails, it is still what it was
    (directory / BASE).unlink(missing_ok=True)
    if memory is not None:
        with contextlib.suppress(OSError):  # another file system
            os.link(memory, directory / BASE)
            (directory / UNKNOWN).unlink()


def _prepare(directory: Path, memory: Path, *, tracked: bool) -> str:
    """All that can be done while the VM runs; returns the kind of snapshot to ask for."""
    disk = os.open(directory / SCRATCH_DISK, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(disk)
    finally:
        os.close(disk)
    if not tracked or (directory / UNKNOWN).exists():
        return "Full"
    if (directory / BASE).exists():
        files.clone(directory / BASE, memory)
    return "Diff"


def _write(vmm: Firecracker, kind: str, destination: Path) -> None:
    request = {
        "snapshot_type": kind,
        "snapshot_path": str(destination / store.VMSTATE),
        "mem_file_path": str(destination / store.MEMORY),
    }
    try:
        vmm.api.put("/snapshot/create", request, timeout=WRITE_TIMEOUT)
    except FirecrackerError as error:
        if "os error 28" in error.message:  # ENOSPC
            raise store.full(destination) from error
        if vmm.ended():
            raise
        raise SnapshotError(f"The snapshot cannot be taken: {error.message}") from error
