"""The snapshots on disk: ``snapshots/<tag>/``, published whole or not at all, and never changed afterwards.

    config.json         what it is of                                     (manifest.py)
    vmstate.bin         Firecracker's own state: vCPUs, devices
    memory.bin          the guest's memory, sparse
    scratch.img         the VM's writable disk at that moment
    volumes.json        the state of its mapped host directories
    working-set.json    optional, added later: pages to have ready at a restore (working_set.py)
    written.json        optional, added later: pages to make a VM's own at a restore (written.py)
    output.log          optional: what a warm start's container had written (vm/warm.py)

It holds whatever the guest had in memory, so nobody but its owner can read it. It is made in ``<tag>.creating`` and
renamed. All locks are flocks on the directories themselves: its maker holds the exclusive one, everyone who restores
from it a shared one, and removal needs the exclusive one, so a snapshot in use cannot be removed and a maker that was
killed leaves nothing but a directory that nobody holds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.errors import ConflictError, FcvmError, HostError, NotFoundError, SnapshotError
from fcvm.linux import files
from fcvm.snapshots import manifest as manifests
from fcvm.snapshots.manifest import Manifest
from fcvm.snapshots.tags import CREATING, REMOVING, check_tag, is_tag
from fcvm.storage.layout import Layout
from fcvm.storage.layout import remove as remove_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VMSTATE = "vmstate.bin"
MEMORY = "memory.bin"
SCRATCH = "scratch.img"
VOLUMES = "volumes.json"
WORKING_SET = "working-set.json"
WRITTEN = "written.json"
OUTPUT = "output.log"
REQUIRED = (manifests.NAME, VMSTATE, MEMORY, SCRATCH, VOLUMES)


class Snapshot(Struct):
    """A published snapshot."""

    tag: str
    path: Path
    manifest: Manifest

    @property
    def vmstate(self) -> Path:
        return self.path / VMSTATE

    @property
    def memory(self) -> Path:
        return self.path / MEMORY

    @property
    def scratch(self) -> Path:
        return self.path / SCRATCH

    def volumes(self) -> list[dict[str, Any]]:
        """The state of its mapped directories, as ``volumes`` wrote it."""
        values: list[dict[str, Any]] = json.loads((self.path / VOLUMES).read_text())
        return values

    def bytes_on_disk(self) -> int:
        """What its files take; blocks shared with other files by reflink count in full."""
        return _bytes_on_disk(self.path)


@contextlib.contextmanager
def creating(layout: Layout, tag: str) -> Iterator[Path]:
    """Make the snapshot ``tag``: yields its directory to be filled, and publishes it when the block ends well.

    Everything written is on the disk before the snapshot has its name, and read-only. After an error, or a kill, there
    is no snapshot; what a killed maker left is removed by the next one or by ``sweep``.

    Raises:
        ConflictError: there is one of that name, or it is being made.
        SnapshotError: the block left out a file. HostError: there is no space left.
    """
    path = layout.snapshots / check_tag(tag)
    temporary = layout.snapshots / (tag + CREATING)
    with _looking(layout):
        try:
            temporary.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise write_error(error, temporary) from error
        fd = _lock(temporary, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if fd is None:
        raise ConflictError(f"A snapshot named {tag!r} is being made.", hint="fcvm snapshots")
    try:
        if path.exists():
            raise ConflictError(f"A snapshot named {tag!r} exists already.", hint=f"fcvm snapshots rm {tag}")
        _empty(temporary)
        yield temporary
        missing = [name for name in REQUIRED if not (temporary / name).is_file()]
        if missing:
            raise SnapshotError(f"The snapshot {tag!r} is incomplete: {', '.join(missing)} missing.")
        try:
            for file in temporary.iterdir():
                files.sync(file)
                file.chmod(0o400)
            files.sync(temporary)
            temporary.rename(path)
            files.sync(layout.snapshots)
        except OSError as error:
            raise write_error(error, temporary) from error
    finally:
        if temporary.exists() and _is(fd, temporary):
            remove_path(temporary, ignore_errors=True)
        os.close(fd)


@contextlib.contextmanager
def use(layout: Layout, tag: str) -> Iterator[Snapshot]:
    """The snapshot ``tag``, which nobody can remove inside the block (by a shared lock, so also in other processes).

    Raises:
        NotFoundError: there is none. SnapshotError: it cannot be read.
    """
    path = layout.snapshots / check_tag(tag)
    fd = _lock(path, fcntl.LOCK_SH)
    if fd is None:
        raise _unknown(tag)
    try:
        yield find(layout, tag)
    finally:
        os.close(fd)


def find(layout: Layout, tag: str) -> Snapshot:
    """The snapshot ``tag``.

    Raises:
        NotFoundError: there is none. SnapshotError: it cannot be read.
    """
    path = layout.snapshots / check_tag(tag)
    if not path.is_dir():
        raise _unknown(tag)
    return Snapshot(tag, path, Manifest.read(path))


def tags(layout: Layout) -> list[str]:
    """The names of all snapshots, readable or not; what cannot be a snapshot's is somebody else's."""
    return sorted(p.name for p in layout.snapshots.iterdir() if is_tag(p.name) and p.is_dir())


def snapshots(layout: Layout) -> list[Snapshot]:
    """All snapshots that can be read, the oldest first."""
    found = []
    for tag in tags(layout):
        with contextlib.suppress(FcvmError):
            found.append(find(layout, tag))
    return sorted(found, key=lambda s: s.manifest.created_at)


def in_use(layout: Layout, tag: str) -> bool:
    """Whether somebody restores from it, runs a server of it, or makes it."""
    with _looking(layout):
        fd = _lock(layout.snapshots / tag, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if fd is not None:
            os.close(fd)
    return fd is None and (layout.snapshots / tag).exists()


def remove(layout: Layout, tag: str) -> int:
    """Remove the snapshot ``tag``; returns the bytes it took.

    Raises:
        NotFoundError: there is none. ConflictError: it is in use. SnapshotError: it may not be removed.
    """
    path = layout.snapshots / check_tag(tag)
    with _looking(layout):
        fd = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if fd is None:
        if not path.is_dir():
            raise _unknown(tag)
        raise ConflictError(
            f"The snapshot {tag!r} is in use.", hint="fcvm snapshot ls shows its servers, fcvm ls its clones"
        )
    try:
        size = _bytes_on_disk(path)
        gone = path.with_name(tag + REMOVING)
        if gone.exists():
            remove_path(gone)
        path.rename(gone)
        remove_path(gone)
        return size
    except OSError as error:
        raise SnapshotError(f"The snapshot {tag!r} cannot be removed: {error.strerror}.", hint=f"ls -ld {path}") from error
    finally:
        os.close(fd)


def prune(layout: Layout, *, everything: bool = False) -> list[tuple[str, int]]:
    """Remove what can be made again: boot and warm snapshots, damaged ones, leftovers; in-use ones stay.

    Arguments:
        everything: those that the user made as well.

    Returns the names with the bytes that each took.
    """
    removed = sweep(layout)
    for tag in tags(layout):
        with contextlib.suppress(ConflictError, NotFoundError):  # it is in use, or somebody has removed it
            try:
                wanted = everything or find(layout, tag).manifest.kind != "user"
            except SnapshotError:
                wanted = True
            if wanted:
                removed.append((tag, remove(layout, tag)))
    return removed


def sweep(layout: Layout) -> list[tuple[str, int]]:
    """Remove what killed makers and removers left; returns the names with the bytes that each took."""
    removed = []
    for path in filter(_is_temporary, layout.snapshots.iterdir()):
        with _looking(layout):  # also while it is removed, which its next maker has to wait for
            fd = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fd is not None:
                removed.append((path.name, _bytes_on_disk(path)))
                remove_path(path, ignore_errors=True)
                os.close(fd)
    return removed


def add(snapshot: Snapshot, name: str, content: str) -> None:
    """Add (or replace, in one step) an optional file, such as a recorded working set."""
    temporary = snapshot.path / f".{name}.{os.getpid()}"
    try:
        temporary.write_text(content)
        temporary.chmod(0o400)
        temporary.rename(snapshot.path / name)
    finally:
        temporary.unlink(missing_ok=True)


def full(directory: Path) -> HostError:
    """The error for a full disk below ``directory``."""
    return HostError(
        f"There is no space left in {directory.parent}.",
        hint=f"df -h {directory.parent}; fcvm snapshots prune; fcvm images prune",
    )


def write_error(error: OSError, directory: Path) -> FcvmError:
    """The error for a failed write into ``directory``, a snapshot's."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(directory)
    return SnapshotError(f"The snapshot cannot be written to {directory}: {error.strerror or error}.")


def _unknown(tag: str) -> NotFoundError:
    return NotFoundError(f"There is no snapshot named {tag!r}.", hint="fcvm snapshots")


def _is_temporary(path: Path) -> bool:
    return path.name.endswith((CREATING, REMOVING)) or path.name.startswith(".")


@contextlib.contextmanager
def _looking(layout: Layout) -> Iterator[None]:
    """Only one at a time looks whether somebody holds a snapshot."""
    fd = os.open(layout.snapshots, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _lock(path: Path, operation: int) -> int | None:
    """A descriptor of directory ``path`` with the lock on it; None if somebody else has it, or ``path`` is not there."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(fd, operation)
            if _is(fd, path):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # renamed while we waited for the lock: look again


def _is(fd: int, path: Path) -> bool:
    """Whether ``path`` is what ``fd`` has open."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except OSError:
        return False


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if stat.S_ISDIR(path.lstat().st_mode):
            remove_path(path)
        else:
            path.unlink()


def _bytes_on_disk(directory: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):  # somebody removes it at this moment
        for path in directory.iterdir():
            total += path.lstat().st_blocks * 512
    return total
