"""Operations on locks: record locks (fcntl, lockf) and flock, both held on the host's file itself."""

import errno
import fcntl
import stat
from time import time_ns
from typing import Any

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.nodes import Fd, Node
from fuse_pipe.records import END, Owner, lock_path
from fuse_pipe.volume import Handle, Volume
from fuse_pipe.worker import Worker

_KIND_AT = m.LK_IN.fields.index("type")
_FLOCK = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}


def _range(start: int, end: int, kind: int) -> None:
    if kind not in _FLOCK or start > end or start > END:
        raise OSError(errno.EINVAL, "not a lock")


def lock_fd(volume: Volume, node: Node) -> Fd:
    """Something to lock through: writable wherever that can be had, because a lock may be changed later."""
    path = volume.table.fd(node)
    if not volume.read_only:
        try:
            return lock_path(path, True)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY):
                raise
    return lock_path(path, False)


def _owner(volume: Volume, number: int, handle: Handle, owner: int, pid: int) -> Owner:
    known = volume.records.owner(handle.node.id, owner)
    if known is None:
        known = volume.records.add(handle.node.id, owner, lock_fd(volume, handle.node), pid)
    if owner not in handle.owners:
        handle.owners.add(owner)
        if volume.journal is not None:
            volume.journal.add(("owner", number, owner))
    return known


def _file(volume: Volume, worker: Worker, number: int) -> Handle:
    handle = volume.handle(number)
    if handle.node.id != worker.nodeid:
        raise OSError(errno.EBADF, "a handle of another file")
    return handle


def flock(volume: Volume, number: int, handle: Handle, kind: int, wait: bool) -> None:
    """Lock a whole file for an open of it, as flock(2) does; the lock is one of the host's own flocks."""
    while True:
        with volume.lock:  # so that what is noted is what is held
            try:
                linux.flock(handle.fd.n, _FLOCK[kind] | fcntl.LOCK_NB)
            except OSError as error:
                _note_flock(volume, number, handle, fcntl.F_UNLCK)  # Linux gives up the old lock first
                if not wait or error.errno != errno.EAGAIN:
                    raise
            else:
                _note_flock(volume, number, handle, kind)
                return
        linux.flock(handle.fd.n, _FLOCK[kind])


def _note_flock(volume: Volume, number: int, handle: Handle, kind: int) -> None:
    if handle.flock != kind:
        handle.flock = kind
        if volume.journal is not None:
            volume.journal.add(("flock", number, kind))


def takes(message: memoryview) -> bool:
    """Whether a SETLK or SETLKW asks for a lock, rather than to give one up."""
    kind: int = m.LK_IN.unpack_from(message, m.IN_HEADER.size)[_KIND_AT]
    return kind != fcntl.F_UNLCK


def is_news(volume: Volume, nodeid: int) -> bool:
    """Whether the data of a file may be other than the kernel has it, which is about to be told if so."""
    try:
        info = volume.table.stat(volume.table.get(nodeid))
    except OSError:  # it is not where it was
        return True
    now = info.st_ctime_ns, info.st_size
    state, noted = volume.records.seen.get(nodeid, (None, 0))
    volume.records.seen[nodeid] = now, time_ns()
    return state != now or noted - info.st_ctime_ns <= volume.table.tick(info)


def getlk(
    volume: Volume,
    worker: Worker,
    number: int,
    owner: int,
    start: int,
    end: int,
    kind: int,
    pid: int,
    flags: int,
    _: int,
) -> bytes:
    _range(start, end, kind)
    handle = _file(volume, worker, number)
    if handle.node.kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, "only files have record locks")
    known = volume.records.owner(handle.node.id, owner)
    fd = known.fd if known is not None else lock_fd(volume, handle.node)
    found = volume.records.test(handle.node.id, owner, fd, kind, start, end)
    if found is None:
        return m.LK_OUT.pack(start, end, fcntl.F_UNLCK, 0)
    return m.LK_OUT.pack(*found)


def setlk(
    volume: Volume,
    worker: Worker,
    number: int,
    owner: int,
    start: int,
    end: int,
    kind: int,
    pid: int,
    flags: int,
    _: int,
    wait: bool = False,
) -> bytes:
    _range(start, end, kind)
    handle = _file(volume, worker, number)
    if flags & m.LK_FLOCK:
        flock(volume, number, handle, kind, wait)
        return b""
    if handle.node.kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, "only files have record locks")
    if kind == fcntl.F_UNLCK and volume.records.owner(handle.node.id, owner) is None:
        return b""
    volume.records.set(handle.node.id, owner, _owner(volume, number, handle, owner, pid), kind, start, end, wait)
    return b""


def setlkw(volume: Volume, worker: Worker, *fields: Any) -> bytes:
    """Wait for a lock; this blocks the thread until it is there or a signal comes (EINTR)."""
    return setlk(volume, worker, *(*fields, True))


def setlk_at_once(volume: Volume, worker: Worker, *fields: Any) -> bytes | None:
    """The answer to SETLKW if it can be had at once, or None."""
    try:
        return setlk(volume, worker, *fields)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
    return None
