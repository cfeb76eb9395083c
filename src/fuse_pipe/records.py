"""Record locks (fcntl) of the other side's processes, held for real on the host's files.

Every owner, which is a process of the other side, locks through an open file description of its own (``F_OFD_SETLK``),
so owners exclude each other and the host's processes, and closing it gives up all that the owner held on the file. What
is held is also noted, to name the owner of a conflicting lock and to take the locks again in a restored server.
"""

import errno
import fcntl
import os
import threading
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

from fuse_pipe import linux

if TYPE_CHECKING:
    from fuse_pipe.journal import Journal
    from fuse_pipe.nodes import Fd

END = (1 << 63) - 1  # the last byte of a lock "to the end of the file"
RANGES = 65536  # that one mount may hold locks on

Range = tuple[int, int, int]  # first byte, last byte, F_RDLCK or F_WRLCK
State = tuple[int, int]  # of a file's data: ctime in ns, size


def set_range(held: list[Range], start: int, end: int, kind: int) -> list[Range]:
    """What is held after locking ``start`` to ``end`` (inclusive) as ``kind``; F_UNLCK gives it up.

    Sorted, without overlaps; neighbours of one kind are one range, as the kernel has it.
    """
    touched = slice(
        bisect_left(held, start, key=lambda one: one[1] + 1), bisect_right(held, end + 1, key=lambda one: one[0])
    )
    result: list[Range] = []
    for first, last, what in held[touched]:
        if first < start:
            result.append((first, min(last, start - 1), what))
        if last > end:
            result.append((max(first, end + 1), last, what))
    if kind != fcntl.F_UNLCK:
        result.append((start, end, kind))
    result.sort()
    merged: list[Range] = []
    for first, last, what in result:
        if merged and merged[-1][2] == what and merged[-1][1] + 1 >= first:
            merged[-1] = (merged[-1][0], last, what)
        else:
            merged.append((first, last, what))
    return [*held[: touched.start], *merged, *held[touched.stop :]]


def _length(start: int, end: int) -> int:
    """Of a range as ``struct flock`` has it: 0 is to the end of the file."""
    return 0 if end >= END else end - start + 1


class Owner:
    """One process's locks on one file. ``waits``: how many threads wait for one."""

    __slots__ = ("fd", "held", "pid", "waits")

    def __init__(self, fd: "Fd", pid: int) -> None:
        self.fd = fd
        self.pid = pid
        self.held: list[Range] = []
        self.waits = 0


class RecordLocks:
    """The record locks of a mount: node id -> owner -> locks. ``most``: owners, each of which takes a descriptor.

    ``seen``: of every file that was locked, record locks or not, what it was like (``state``) when the kernel last had its
    data as it is, and when that was noted in ns. Opening a file does not count: what the kernel then drops it drops later.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.owners = self.ranges = 0  # in ``nodes``
        self.nodes: dict[int, dict[int, Owner]] = {}
        self.seen: dict[int, tuple[State, int]] = {}
        self.lock = threading.Lock()
        self.journal: Journal | None = None

    def owner(self, node: int, owner: int) -> Owner | None:
        """The owner's locks on the node, if it ever had one there."""
        return self.nodes.get(node, {}).get(owner)

    def add(self, node: int, owner: int, fd: "Fd", pid: int) -> Owner:
        """A new owner, that locks through ``fd``; the first of two that come at once wins. ENOLCK: too many."""
        with self.lock:
            return self._put(node, owner, Owner(fd, pid))

    def _put(self, node: int, number: int, owner: Owner) -> Owner:
        owners = self.nodes.get(node, {})
        if number not in owners:
            if self.owners >= self.most:
                raise OSError(errno.ENOLCK, "too many owners of locks")
            self.owners += 1
            owners[number] = owner
            self.nodes[node] = owners
        return owners[number]

    def set(self, node: int, number: int, owner: Owner, kind: int, start: int, end: int, wait: bool) -> None:
        """Lock, change or unlock a range; EAGAIN if it conflicts and ``wait`` is not set, EINTR if a signal came, ENOLCK
        if there are too many.
        """
        end = min(end, END)
        with self.lock:
            owner = self._put(node, number, owner)  # unless everything of it was given up just now
            if self.ranges >= RANGES and len(set_range(owner.held, start, end, kind)) > len(owner.held):
                raise OSError(errno.ENOLCK, "too many locks")
            if self._set(node, number, owner, kind, start, end, wait):
                return
            owner.waits += 1
        try:
            while True:
                linux.ofd_lock(owner.fd.n, linux.F_OFD_SETLKW, kind, start, _length(start, end))
                with self.lock:  # held by now, unless another thread of the owner has just unlocked it
                    if self._set(node, number, owner, kind, start, end, wait):
                        return
        finally:
            with self.lock:
                owner.waits -= 1

    def _set(self, node: int, number: int, owner: Owner, kind: int, start: int, end: int, wait: bool) -> bool:
        """Do it and note it, so that what is noted is what is held; False if ``wait`` is set and it must wait."""
        try:
            linux.ofd_lock(owner.fd.n, linux.F_OFD_SETLK, kind, start, _length(start, end))
        except OSError as error:
            if wait and error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        if self.owner(node, number) is owner:  # else the file is not known any more
            held = set_range(owner.held, start, end, kind)
            self.ranges += len(held) - len(owner.held)
            owner.held = held
            if self.journal is not None:
                self.journal.add(("lock", node, number, owner.pid, start, end, kind))
        return True

    def test(
        self, node: int, owner: int, fd: "Fd", kind: int, start: int, end: int
    ) -> tuple[int, int, int, int] | None:
        """The first lock in the way of this one as (start, end, type, pid), pid 0 if it is not ours to name; or
        None.
        """
        found, begin, size, pid = linux.ofd_lock(fd.n, linux.F_OFD_GETLK, kind, start, _length(start, end))
        if found == fcntl.F_UNLCK:
            return None
        last = END if size == 0 else begin + size - 1
        with self.lock:
            for number, other in self.nodes.get(node, {}).items():
                if number != owner and any(
                    first <= last and begin <= to and what == found for first, to, what in other.held
                ):
                    return begin, last, found, other.pid
        return begin, last, found, 0 if pid < 0 else pid

    def release(self, node: int, owner: int) -> None:
        """Give up everything of the owner on this file; one that waits for a lock there stays, to have it then."""
        if node not in self.nodes:
            return
        with self.lock:
            gone = self.owner(node, owner)
            if gone is None:
                return
            self.ranges -= len(gone.held)
            gone.held = []
            if not gone.waits:
                self.owners -= 1
                del self.nodes[node][owner]
                if not self.nodes[node]:
                    del self.nodes[node]
            if self.journal is not None:
                self.journal.add(("unlock", node, owner))
            try:
                linux.ofd_lock(gone.fd.n, linux.F_OFD_SETLK, fcntl.F_UNLCK, 0, 0)
            except OSError as error:
                if error.errno != errno.ENOLCK:
                    raise

    def forget(self, node: int) -> None:
        """The file is not known any more."""
        with self.lock:
            for gone in self.nodes.pop(node, {}).values():
                self.owners -= 1
                self.ranges -= len(gone.held)
                gone.held = []
            self.seen.pop(node, None)

    def close(self) -> None:
        """Give up everything."""
        with self.lock:
            self.nodes.clear()
            self.seen.clear()
            self.owners = self.ranges = 0


def lock_path(fd: "Fd", writable: bool) -> "Fd":
    """A descriptor to lock through, of the file that ``fd`` stands for; writing ranges need a writable one."""
    path = b"/proc/self/fd/%d" % fd.n
    from fuse_pipe.nodes import Fd

    return Fd(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))
