"""What changes on the host is told to the kernel on the other side: inotify events become FUSE notifications.

Every directory that the kernel has looked into is watched, and a file that is served by itself. The kernel's own requests raise events too: those that
change names are expected, one for one; a write is known by the state in which it left the file.
"""

import contextlib
import errno
import logging
import os
import select
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from time import monotonic, time_ns
from typing import TYPE_CHECKING

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.nodes import Node, same, state_of

if TYPE_CHECKING:
    from fuse_pipe.volume import Volume

log = logging.getLogger("fuse_pipe")

IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 2, 4, 0x40, 0x80, 0x100, 0x200
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
IN_ONLYDIR, IN_EXCL_UNLINK = 0x01000000, 0x04000000
NAMES = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
MASK = NAMES | IN_MODIFY | IN_ATTRIB | IN_EXCL_UNLINK
_EVENT = struct.Struct("iIII")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # what a name that leads nowhere fails with

# Events within this time are taken together: a file being written raises one for every write.
GATHER = 0.004

# A file that the other side is writing is looked at when it has not for this long, in seconds.
DEFER = 0.05
DEFER_NS = int(DEFER * 1e9)


class Watcher:
    """A thread that reads the events of one volume. ``notify`` takes finished notifications, and says whether it did."""

    def __init__(self, volume: "Volume") -> None:
        self.volume = volume
        self.notify: Callable[[bytes], bool] | None = None
        self.fd = linux.inotify_init()
        self.watches: dict[int, Node] = {}
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._expected: dict[
            tuple[int, bytes], int
        ] = {}  # (watch, name) -> events that the kernel's own requests raise
        self._lock = threading.Lock()  # for _expected: a count that is one too high hides a change by the host
        self._deferred: dict[Node, None] = {}
        self._thread = threading.Thread(target=self._run, name="fuse_pipe watcher", daemon=True)

    @classmethod
    def start(cls, volume: "Volume") -> "Watcher | None":
        """A running watcher; None where the host has no inotify instance left (files are then believed for less
        long).
        """
        try:
            watcher = cls(volume)
        except OSError:
            return None
        watcher._thread.start()
        return watcher

    def stop(self) -> None:
        """End the thread and close everything."""
        os.write(self._stop_write, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for fd in (self.fd, self._stop_read, self._stop_write):
            os.close(fd)

    def add(self, directory: Node) -> None:
        """Watch a directory (or the served file); its ``watch`` becomes -1 if that is not possible, or of no use."""
        if not self.volume.table.raises_events(directory):
            directory.watch = -1
            return
        fd = self.volume.table.fd(directory)
        mask = MASK | IN_ONLYDIR if directory.kind == stat.S_IFDIR else MASK
        try:
            watch = linux.inotify_add(self.fd, b"/proc/self/fd/%d" % fd.n, mask)
        except OSError:  # ENOSPC: fs.inotify.max_user_watches; EACCES: not readable
            directory.watch = -1
            return
        self.watches[watch] = directory
        directory.watch = watch

    def remove(self, directory: Node) -> None:
        """The kernel knows the directory no more."""
        watch, directory.watch = directory.watch, None
        if watch is not None and self.watches.get(watch) is directory:
            self.watches.pop(watch, None)  # _judge may have done so just now
            with contextlib.suppress(OSError):  # the directory is gone, and its watch with it
                linux.inotify_remove(self.fd, watch)

    def expect(self, names: tuple[tuple[Node, bytes], ...], count: int = 1) -> None:
        """The kernel's own request is about to raise an event for each of these names (or, with -1, did not)."""
        for directory, name in names:
            watch = directory.watch
            if watch is not None and watch >= 0:
                self._count((watch, name), count)

    def _count(self, key: tuple[int, bytes], count: int) -> bool:
        """Expect so many events more; whether any were expected before."""
        with self._lock:
            before = self._expected.get(key, 0)
            if before + count > 0:
                self._expected[key] = before + count
            else:
                self._expected.pop(key, None)
        return before > 0

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        stop = select.poll()
        stop.register(self._stop_read, select.POLLIN)
        last = 0.0
        while True:
            ready = [fd for fd, _ in poll.poll(DEFER * 1000 if self._deferred else None)]
            if self._stop_read in ready:
                return
            rest = last + GATHER - monotonic()
            if rest > 0 and stop.poll(rest * 1000):
                return
            last = monotonic()
            try:
                self._check_deferred()
                if ready:
                    self._judge(os.read(self.fd, 256 * 1024))
            except OSError:
                continue  # the root is gone: nothing more will come
            except Exception:  # a mistake here, which must not be the end of all news
                log.exception("events in %s were lost", self.volume.path)
                with contextlib.suppress(Exception):
                    self._catch_up()

    def _judge(self, data: bytes) -> None:
        """Look at every event that is not expected."""
        names: set[tuple[Node, bytes]] = set()
        watches, unpack = self.watches, _EVENT.unpack_from
        at, end, now = 0, len(data), time_ns()
        while at < end:
            watch, mask, _, length = unpack(data, at)
            name = data[at + 16 : data.index(0, at + 16)] if length else b""
            at += 16 + length
            if mask & NAMES:
                if not self._count((watch, name), -1) and (directory := watches.get(watch)) is not None:
                    names.add((directory, name))
                continue
            if mask & IN_Q_OVERFLOW:
                self._catch_up()
                continue
            directory = watches.get(watch)
            if directory is None:
                continue
            if mask & IN_IGNORED:
                watches.pop(watch, None)  # remove may have done so just now
                directory.watch = None
                continue
            node = directory.children.get(name) if name else directory
            if node is None:
                continue
            if abs(now - node.data_at) < DEFER_NS:  # being written from the other side: look when that pauses
                self._deferred[node] = None
            else:
                self.check_file(node)
        for directory in {directory for directory, name in names if self.check_name(directory, name)}:
            self.check_file(directory, force=True)

    def _check_deferred(self) -> None:
        if self._deferred:
            now = time_ns()
            for node in [node for node in self._deferred if abs(now - node.data_at) >= DEFER_NS]:
                del self._deferred[node]
                self.check_file(node)

    def check_name(self, directory: Node, name: bytes) -> bool:
        """Compare what the kernel believes ``name`` to be with what it is; whether the directory changed for it."""
        volume = self.volume
        missing = object()
        believed = directory.children.get(name, missing)
        try:
            fd = volume.table.fd(directory)
            info = os.stat(name, dir_fd=fd.n, follow_symlinks=False)
        except OSError as error:
            if believed is not missing and error.errno not in _GONE:  # no memory, no descriptors: it may be what it was
                self._send_entry(directory, name, None, m.EXPIRE_ONLY)
                return False
            info = None
        if isinstance(believed, Node):
            if info is not None and same(believed, info):
                return False
            gone = info is None and self._links(believed) == 0
            self._tell_name(directory, name, believed, gone)
        elif believed is None:
            if info is None:
                return False
            self._tell_name(directory, name, None, False)
        return True

    def _tell_name(self, directory: Node, name: bytes, believed: Node | None, gone: bool) -> None:
        """Tell the kernel that ``name`` is not what it believes; it goes on believing that if it cannot be told now."""
        table = self.volume.table
        table.lost(directory, name)
        if not self._send_entry(directory, name, believed if gone else None) and name not in directory.children:
            table.believe(directory, name, believed)

    def _links(self, node: Node) -> int:
        try:
            fd = node.fd
            return os.fstat(fd.n).st_nlink if fd is not None else 1
        except OSError:
            return 1

    def check_file(self, node: Node, force: bool = False) -> None:
        """Tell the kernel to drop what it has of a file or directory, unless it changed it itself."""
        try:
            info = self.volume.table.stat(node)
        except OSError:
            return
        state = state_of(info)
        if node.told == state and not force:
            return
        node.told, node.data = state, None
        if not self._send(m.notification(m.NOTIFY_INVAL_INODE, node.id, 0, 0)):
            node.told = None

    def _catch_up(self) -> None:
        """Events were lost, expected ones among them."""
        with self._lock:
            self._expected.clear()
        self.check_all()

    def check_all(self) -> None:
        """Events were lost, or nobody looked for a while: compare everything."""
        for node in self.volume.table.nodes():
            changed = [self.check_name(node, name) for name in list(node.children)]
            parent = node.parent
            if parent is not None and node.fd is None:
                try:
                    self.volume.table.fd(parent)
                except OSError:
                    continue
            self.check_file(node, force=any(changed))

    def invalidate_all(self) -> Iterator[None]:
        """Have the kernel ask again for all that it was told, a notification at each step: some were lost."""
        expires = self.volume.flags & m.HAS_EXPIRE_ONLY
        for node in self.volume.table.nodes():
            for name in list(node.children):
                if expires:
                    self._send_entry(node, name, None, m.EXPIRE_ONLY)
                else:  # an older kernel would drop the name itself
                    self.check_name(node, name)
                yield
            self._send(m.notification(m.NOTIFY_INVAL_INODE, node.id, 0, 0))
            yield

    def _send_entry(self, directory: Node, name: bytes, gone: Node | None, flags: int = 0) -> bool:
        """Tell the kernel to drop a name, and unmount what is mounted on or below it; EXPIRE_ONLY: to ask for it again."""
        if gone is not None:  # inotify in the guest fires for a file that is deleted, not for a name that is dropped
            return self._send(m.notification(m.NOTIFY_DELETE, directory.id, gone.id, len(name), 0, tail=name + b"\0"))
        return self._send(m.notification(m.NOTIFY_INVAL_ENTRY, directory.id, len(name), flags, tail=name + b"\0"))

    def _send(self, message: bytes) -> bool:
        """Whether it was sent, or there is nobody to send it to."""
        return self.notify is None or self.notify(message)
