"""One mount of one host directory (or file): its nodes, open files, locks, and how long the kernel may cache.

The operations are functions ``(volume, worker, *fields)`` in ``namespace``, ``files``, ``directories``, ``attributes``
and ``locking``; each returns the payload of its reply (or a list of buffers) or raises ``OSError``.
"""

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import time_ns

from fuse_pipe import messages as m
from fuse_pipe.journal import Journal
from fuse_pipe.nodes import Fd, Node, NodeTable, raise_descriptor_limit, state_of
from fuse_pipe.records import RecordLocks
from fuse_pipe.watch import Watcher

# How long the other side's kernel may believe what it was told, in seconds. Changes on the host in a watched
# directory are pushed to it at once, so names are believed for long; attributes of files for less, because a write
# through a memory map on the host raises no event. Without a watch, as long as other FUSE file systems do.
NAME_TIME = 600
FILE_TIME = 30
UNWATCHED_TIME = 1
NEGATIVES = 65536  # names believed not to exist, at most

OVERFLOW_ID = 65534  # how ids that are not the serving user's show, when not root


class Handle:
    """An open file or directory of the kernel's. ``listing`` is what a directory read ahead."""

    __slots__ = ("fd", "flags", "flock", "listing", "node", "owners", "position", "written")

    def __init__(self, node: Node, fd: Fd, flags: int) -> None:
        self.node = node
        self.fd = fd
        self.flags = flags
        self.owners: set[int] = set()  # whose record locks were taken through this handle
        self.listing: list[tuple[int, int, int, bytes]] = []
        self.position = 0
        self.written = False
        self.flock = fcntl.F_UNLCK


class Volume:
    """What one mount serves; made once for it and kept over broken connections.

    Arguments:
        root: the host's directory or file; a missing one makes every operation fail with EIO.
        read_only: nothing below ``root`` is changed, whatever the other side asks.
        owner: (uid, gid) as which the serving user's own files show when not root.
        watch: look for changes on the host and tell the kernel about them.
        writeback: let the kernel keep written data back and trust its own sizes and times; only for directories that
            nobody else changes.
    """

    def __init__(
        self,
        root: str,
        *,
        read_only: bool = False,
        owner: tuple[int, int] = (0, 0),
        watch: bool = True,
        writeback: bool = False,
    ) -> None:
        self.path = os.path.abspath(root)
        self.read_only = read_only
        self.writeback = writeback
        self.owner = None if os.geteuid() == 0 else owner
        self._ids = (os.geteuid(), os.getegid())
        self.lock = threading.Lock()
        self.handles: dict[int, Handle] = {}
        # Numbers of different servers of one mount do not meet: an open file of a lost server is not another one's.
        self.next_handle = int.from_bytes(os.urandom(4), "little") >> 2 << 32
        self.broken: set[int] = set()  # handles of a saved state whose files are gone
        self.minor = 0
        self.flags = 0
        self.decoders = m.decoders()
        self.watcher: Watcher | None = None
        self.journal: Journal | None = None
        self._proc = Fd(os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self.nodes: NodeTable | None = NodeTable(os.open(self.path, os.O_PATH | os.O_CLOEXEC))
        except OSError:
            self.nodes = None
        # Open files and O_PATH descriptors of nodes share what this process may open; some stay for connections and
        # locks.
        self.most_handles = raise_descriptor_limit() // 4
        self.records = RecordLocks(self.most_handles // 2)
        if watch and self.nodes is not None and self.nodes.raises_events(self.nodes.root):
            self.watcher = Watcher.start(self)
        if self.watcher is not None and self.nodes is not None and self.nodes.root.kind == stat.S_IFREG:
            self.watcher.add(self.nodes.root)  # a file has no directory here that is watched for it

    def write_journal(self, journal: Journal) -> None:
        """Note every change of what the kernel knows in a journal from now on."""
        self.journal = self.records.journal = journal
        if self.nodes is not None:
            self.nodes.journal = journal
            root = self.nodes.root
            journal.add(("learn", root.id, 0, b"", root.kind, root.dev, root.ino))

    @property
    def table(self) -> NodeTable:
        """The nodes; EIO when the host's directory is gone."""
        nodes = self.nodes
        if nodes is None:
            raise OSError(errno.EIO, "the host directory is gone")
        return nodes

    # ---- open files

    def add_handle(self, node: Node, fd: Fd, flags: int) -> int:
        """Remember an open file; its number."""
        if len(self.handles) >= self.most_handles:
            raise OSError(errno.EMFILE, "too many open files")
        with self.lock:
            self.next_handle += 1
            number = self.next_handle
            self.handles[number] = Handle(node, fd, flags)
            node.opens += 1
            if self.journal is not None:
                self.journal.add(("open", number, node.id, flags))
        return number

    def handle(self, number: int) -> Handle:
        """The open file of this number; EBADF if there is none."""
        handle = self.handles.get(number)
        if handle is None:
            raise OSError(errno.EIO if number in self.broken else errno.EBADF, "unknown handle")
        return handle

    def drop_handle(self, number: int) -> Handle:
        """Forget an open file; its descriptor closes when the last request that uses it is done."""
        with self.lock:
            handle = self.handles.pop(number, None)
            if handle is None:
                self.broken.discard(number)
                raise OSError(errno.EBADF, "unknown handle")
            if self.journal is not None:
                self.journal.add(("close", number))
            node = handle.node
            node.opens -= 1
            if node.fd is handle.fd or (node.opens == 0 and node.lookups == 0):
                node.fd = None
        return handle

    def reopen(self, fd: Fd, flags: int) -> Fd:
        """Open what an O_PATH descriptor stands for: the very inode, whatever its name leads to by now."""
        if self.read_only and flags & os.O_ACCMODE == os.O_RDONLY:
            try:  # a read-only mount changes no access times either
                return Fd(os.open(b"%d" % fd.n, flags | os.O_CLOEXEC | os.O_NOATIME, dir_fd=self._proc.n))
            except PermissionError:
                pass
        return Fd(os.open(b"%d" % fd.n, flags | os.O_CLOEXEC, dir_fd=self._proc.n))

    def link(self, fd: Fd, directory: Fd, name: bytes) -> None:
        """Give what a descriptor stands for another name."""
        os.link(b"%d" % fd.n, name, src_dir_fd=self._proc.n, dst_dir_fd=directory.n, follow_symlinks=True)

    # ---- replies

    def attributes(self, info: os.stat_result) -> tuple[int, ...]:
        """The fields of ``struct fuse_attr``."""
        uid, gid = info.st_uid, info.st_gid
        if self.owner is not None:
            uid, gid = self.show_ids(uid, gid)
        atime, atime_ns = divmod(info.st_atime_ns, 1_000_000_000)
        mtime, mtime_ns = divmod(info.st_mtime_ns, 1_000_000_000)
        ctime, ctime_ns = divmod(info.st_ctime_ns, 1_000_000_000)
        ino = info.st_ino
        if (
            self.nodes is not None and info.st_dev != self.nodes.root.dev
        ):  # a file system mounted below: keep numbers apart
            ino ^= (info.st_dev * 0x9E3779B97F4A7C15) & 0x7FFF_FFFF_0000_0000
        return (
            ino,
            info.st_size,
            info.st_blocks,
            atime,
            mtime,
            ctime,
            atime_ns,
            mtime_ns,
            ctime_ns,
            info.st_mode,
            info.st_nlink,
            uid,
            gid,
            _device(info.st_rdev),
            info.st_blksize,
            0,
        )

    def show_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Host ids as the other side sees them, when not root: the serving user's are the owner's."""
        assert self.owner is not None
        return (
            self.owner[0] if uid == self._ids[0] else OVERFLOW_ID,
            self.owner[1] if gid == self._ids[1] else OVERFLOW_ID,
        )

    def host_ids(self, uid: int, gid: int) -> tuple[int, int]:
        """Ids of the other side as the host's; -1 stays -1; EPERM for what cannot be given away."""
        if self.owner is None:
            return uid, gid
        if uid not in (-1, self.owner[0]) or gid not in (-1, self.owner[1]):
            raise OSError(errno.EPERM, "only root gives files away")
        return -1 if uid == -1 else self._ids[0], -1 if gid == -1 else self._ids[1]

    def file_time(self, node: Node, info: os.stat_result) -> int:
        """How long attributes may be believed."""
        if node.kind == stat.S_IFDIR:
            return NAME_TIME if node.watched else UNWATCHED_TIME
        if node.watched:  # the served file itself, by whatever name it is changed
            return FILE_TIME
        parent = node.parent
        return FILE_TIME if parent is not None and parent.watched and info.st_nlink == 1 else UNWATCHED_TIME

    def entry(self, parent: Node, name: bytes, info: os.stat_result) -> bytes:
        """The reply to a lookup that found something; it counts as a reference of the kernel's."""
        node = self.table.learn(parent, name, info)
        time = NAME_TIME if parent.watched else UNWATCHED_TIME
        node.told = state_of(info)
        return m.ENTRY_OUT.pack(node.id, 0, time, self.file_time(node, info), 0, 0, *self.attributes(info))

    def watch(self, directory: Node) -> None:
        """See to it that changes of this directory's content are noticed, before anything of it is told."""
        if directory.watch is None and self.watcher is not None:
            self.watcher.add(directory)

    def sign(self, node: Node, info: os.stat_result) -> None:
        """Note that the kernel itself made the file what it is now: neither attributes nor data are news to it."""
        node.told = state_of(info)
        node.data = (info.st_ctime_ns, info.st_size)
        node.data_at = time_ns()

    def fresh(self, node: Node, info: os.stat_result) -> bool:
        """Whether what the kernel may have cached of the data still holds; it is noted as doing so from now on."""
        data = (info.st_ctime_ns, info.st_size)
        same = node.data == data and node.data_at - info.st_ctime_ns > self.table.tick(info)
        node.data, node.data_at = data, time_ns()
        return same

    @contextmanager
    def change(self, *names: tuple[Node, bytes]) -> Iterator[None]:
        """Around a change of names that the kernel asks for: the events that it raises are not news to the kernel."""
        watcher = self.watcher
        if watcher is None:
            yield
            return
        watcher.expect(names)
        try:
            yield
        except BaseException:
            watcher.expect(names, -1)
            raise

    def writable(self) -> None:
        """EROFS on a read-only volume."""
        if self.read_only:
            raise OSError(errno.EROFS, "read-only volume")

    def close(self) -> None:
        """Give everything back: locks, handles, descriptors."""
        if self.watcher is not None:
            self.watcher.stop()
            self.watcher = None
        self.records.close()
        self.handles.clear()
        self.nodes = None


def _device(number: int) -> int:
    """A device number as the kernel encodes it in 32 bits (``new_encode_dev``)."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
