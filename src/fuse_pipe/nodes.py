"""The nodes that the kernel on the other side knows: node id -> a file below the served directory.

A node is found again in one of three ways, tried in turn: an O_PATH descriptor held for it, its name in its parent
(opened without following symbolic links, and checked to be the same inode), or, for root, its file handle. So any
number of nodes can be known with a bounded number of descriptors, and no path is ever walked: names are single
components, relative to a descriptor below the root.
"""

import contextlib
import errno
import os
import re
import resource
import select
import stat
import threading
from collections.abc import Iterator

from fuse_pipe import linux
from fuse_pipe.journal import Journal
from fuse_pipe.messages import ROOT_ID

TICK_NS = 10_000_000  # at most: files are stamped with the time of the last timer tick

# Of these, Linux since 6.13 stamps what was looked at since its last change with the exact time (FS_MGTIME).
_MULTIGRAIN = ("btrfs", "ext4", "tmpfs", "xfs")
# File systems that are changed by others than this kernel's programs, so that no event (inotify) tells of it: by other hosts,
_REMOTE = ("fuse", "virtiofs", "nfs", "cifs", "smb", "9p", "ceph", "afs", "vboxsf", "lustre", "gfs2", "ocfs2")
# or by the kernel itself. The size of such files is not that of what is read, and what is read is another thing each time.
_OF_KERNEL = frozenset(("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs", "pstore", "efivarfs", "bpf"))
_LINUX = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))

# Nodes that a kernel may hold references to; each takes some 400 bytes here.
NODES = 4_000_000


class Fd:
    """A descriptor that is closed when nothing refers to it any more, so never under a thread that is using it."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.n)


class Node:
    """One inode that the kernel knows. Other threads take away ``fd``, ``parent`` and ``watch``: they are read once and kept.

    ``lookups`` counts the references that the kernel holds; ``opens`` our open handles (they pin ``fd``); ``children``
    what the kernel believes about names in this directory (None: there is no such file); ``watch`` the inotify watch
    (-1: there can be none); ``told`` the state of the attributes that the kernel was told last; ``data`` and
    ``data_at`` ctime in ns and size of the data that it may have cached, and when that was noted.
    """

    __slots__ = (
        "children",
        "data",
        "data_at",
        "dev",
        "fd",
        "handle",
        "id",
        "ino",
        "kind",
        "lookups",
        "name",
        "opens",
        "parent",
        "told",
        "watch",
    )

    def __init__(self, id: int, kind: int, dev: int, ino: int) -> None:
        self.id = id
        self.kind = kind
        self.dev = dev
        self.ino = ino
        self.parent: Node | None = None
        self.name = b""
        self.fd: Fd | None = None
        self.handle: bytes | None = None
        self.lookups = 0
        self.opens = 0
        self.children: dict[bytes, Node | None] = {}
        self.watch: int | None = None
        self.told: tuple[int, ...] | None = None
        self.data: tuple[int, int] | None = None
        self.data_at = 0

    @property
    def watched(self) -> bool:
        """Whether changes below this directory (or of this file) are noticed."""
        watch = self.watch
        return watch is not None and watch >= 0


def state_of(info: os.stat_result) -> tuple[int, ...]:
    """What tells one state of a file from another; ctime alone stands still for as long as a clock tick."""
    return info.st_ctime_ns, info.st_mtime_ns, info.st_size, info.st_mode, info.st_nlink, info.st_uid, info.st_gid


def same(node: Node, info: os.stat_result) -> bool:
    """Whether this is the node's file. Not one of another kind with its number, which file systems use again: opening
    that would be opening a device.
    """
    return (info.st_ino, info.st_dev, stat.S_IFMT(info.st_mode)) == (node.ino, node.dev, node.kind)


def raise_descriptor_limit() -> int:
    """Take all the descriptors that this process may have; how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class NodeTable:
    """All nodes of one mount. ``limit`` bounds the O_PATH descriptors held only to be fast."""

    def __init__(self, root: int, limit: int | None = None) -> None:
        """``root``: an O_PATH descriptor of the served directory or file; the table owns it."""
        info = os.fstat(root)
        self.root = Node(ROOT_ID, stat.S_IFMT(info.st_mode), info.st_dev, info.st_ino)
        self.root.fd = Fd(root)
        self.root.lookups = 1
        self.by_id = {ROOT_ID: self.root}
        self.by_key = {(info.st_dev, info.st_ino): self.root}
        self._systems = {info.st_dev: linux.file_system(root)}
        self._mountinfo = Fd(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC))
        self._mounts = select.poll()  # tells once of everything that was mounted or unmounted (proc_pid_mounts(5))
        self._mounts.register(self._mountinfo.n, select.POLLPRI)
        self._exact = info.st_dev if _LINUX >= (6, 13) and self._systems[info.st_dev] in _MULTIGRAIN else None
        self.limit = limit or min(max(raise_descriptor_limit() // 2, 64), 65536)
        self.lock = threading.Lock()
        # Ids of different servers of one mount do not meet: a kernel that kept ids over a lost server gets ESTALE.
        self._next_id = (int.from_bytes(os.urandom(4), "little") >> 2 << 32) + ROOT_ID
        self.negatives = 0  # names that the kernel believes not to exist
        self._held: dict[Node, None] = {}  # nodes with a descriptor, oldest first
        self._mount_fd: Fd | None = None  # for handles; None until asked, or when there are none
        self._handles = os.geteuid() == 0
        self.journal: Journal | None = None

    def tick(self, info: os.stat_result) -> int:
        """How many ns the ctime of a file must lie back before "unchanged since" can be told by it."""
        return 0 if info.st_dev == self._exact else TICK_NS

    def _system(self, node: Node) -> str:
        """The name of the file system that the node is on. It is looked up once for each, and again when something was
        mounted: the number of what is unmounted is used again. That of the root's is not, which is open here.
        """
        if node.dev != self.root.dev:
            with self.lock:
                if self._mounts.poll(0):
                    self._systems = {self.root.dev: self._systems[self.root.dev]}
        systems = self._systems
        name = systems.get(node.dev)
        if name is None:
            fd = self.fd(node)
            name = systems[node.dev] = linux.file_system(fd.n)
        return name

    def raises_events(self, node: Node) -> bool:
        """Whether inotify sees every change of the node."""
        system = self._system(node)
        return not system.startswith(_REMOTE) and system not in _OF_KERNEL

    def of_kernel(self, node: Node) -> bool:
        """Whether the node's content is made by the host's kernel as it is read."""
        return self._system(node) in _OF_KERNEL

    def get(self, nodeid: int) -> Node:
        """The node of this id; ESTALE when the kernel cannot mean any."""
        node = self.by_id.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, "unknown node")
        return node

    def directory(self, nodeid: int) -> Node:
        """The same, for a directory."""
        node = self.get(nodeid)
        if node.kind != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, "not a directory")
        return node

    def learn(self, parent: Node, name: bytes, info: os.stat_result) -> Node:
        """The node of what was just found as ``name`` in ``parent``; the kernel's references to it grow by one."""
        kind = stat.S_IFMT(info.st_mode)
        key = (info.st_dev, info.st_ino)
        with self.lock:
            node = self.by_key.get(key)
            if node is None or node.kind != kind:  # another kind: the number was used again
                node = self._new(kind, key)
            node.lookups += 1
            if node.id != ROOT_ID:
                node.parent, node.name = parent, name
            self._believe(parent, name, node)
            if self.journal is not None:
                self.journal.add(("learn", node.id, parent.id, name, kind, node.dev, node.ino))
            return node

    def missing(self, parent: Node, name: bytes) -> None:
        """The kernel was told that there is no such file."""
        self.believe(parent, name, None)
        if self.journal is not None:
            self.journal.add(("missing", parent.id, name))

    def believe(self, parent: Node, name: bytes, node: Node | None) -> None:
        """Note what the kernel was told of ``name``; None: that there is no such file."""
        with self.lock:
            self._believe(parent, name, node)

    def _believe(self, parent: Node, name: bytes, node: Node | None) -> None:
        self._disbelieve(parent, name)
        parent.children[name] = node
        self.negatives += node is None

    def _disbelieve(self, parent: Node, name: bytes) -> Node | None:
        """The kernel believes nothing of ``name`` any more; returns the node that it took it for."""
        node = parent.children.pop(name, parent)
        self.negatives -= node is None
        return None if node is parent else node

    def adopt(self, info: os.stat_result, fd: Fd) -> Node:
        """A node for a file without a name (O_TMPFILE), which only ``fd`` leads to."""
        with self.lock:
            node = self._new(stat.S_IFMT(info.st_mode), (info.st_dev, info.st_ino))
            node.lookups += 1
            node.fd = fd
            if self.journal is not None:
                self.journal.add(("learn", node.id, 0, b"", node.kind, node.dev, node.ino))
            return node

    def _new(self, kind: int, key: tuple[int, int]) -> Node:
        if len(self.by_id) >= NODES:
            raise OSError(errno.ENFILE, "too many nodes are known")
        self._next_id += 1
        node = Node(self._next_id, kind, *key)
        self.by_id[node.id] = self.by_key[key] = node
        return node

    def forget(self, nodeid: int, count: int) -> Node | None:
        """The kernel dropped ``count`` references; the node if that was the last one and it is gone."""
        with self.lock:
            node = self.by_id.get(nodeid)
            if node is None or nodeid == ROOT_ID:
                return None
            node.lookups -= count
            if self.journal is not None:
                self.journal.add(("forget", nodeid, count))
            if node.lookups > 0:
                return None
            node.lookups = 0
            del self.by_id[nodeid]
            key = (node.dev, node.ino)
            if self.by_key.get(key) is node:
                del self.by_key[key]
            self._held.pop(node, None)
            self.negatives -= sum(child is None for child in node.children.values())
            if node.parent is not None and node.parent.children.get(node.name) is node:
                del node.parent.children[node.name]
            if node.opens == 0:
                node.fd = None
            return node

    # ---- finding the file

    def fd(self, node: Node) -> Fd:
        """An O_PATH descriptor of the node; keep the object while its number is in use.

        Raises:
            OSError: ESTALE, the file is not where it was and cannot be found otherwise.
        """
        return node.fd or self._open(node)

    def stat(self, node: Node) -> os.stat_result:
        """Attributes of the node."""
        fd, parent = node.fd, node.parent
        directory = parent.fd if fd is None and parent is not None else None
        if directory is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                info = os.stat(node.name, dir_fd=directory.n, follow_symlinks=False)
                if same(node, info):
                    return info
        fd = fd or self.fd(node)
        return os.fstat(fd.n)

    def _open(self, node: Node) -> Fd:
        way = [node]
        while (fd := way[-1].fd) is None:
            parent = way[-1].parent
            if parent is None or parent in way:  # in circles: what was told of them is not true any more
                break
            way.append(parent)
        if fd is not None:
            way.pop()
        try:
            for step in reversed(way):
                fd = step.fd or self._open_in(step, fd)
        except OSError:  # a directory above it is not where it was
            if node.handle is None:
                raise
            fd = self._open_in(node, None)
        assert fd is not None
        return fd

    def _open_in(self, node: Node, parent: Fd | None) -> Fd:
        found = None
        if parent is not None and node.name:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                candidate = Fd(os.open(node.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent.n))
                if same(node, os.fstat(candidate.n)):
                    found = candidate
        if found is None and node.handle is not None and (mount_fd := self.mount_fd()) is not None:
            found = Fd(linux.open_handle(mount_fd.n, node.handle, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC))
        if found is None:
            raise OSError(errno.ESTALE, "the file is not where it was")
        node.fd = found
        self._held[node] = None
        if len(self._held) > self.limit:
            self._evict()
        return found

    def mount_fd(self) -> Fd | None:
        """A readable descriptor on the root's file system, which handles need."""
        if self._mount_fd is None and self._handles and self.root.fd is not None:
            try:
                self._mount_fd = Fd(
                    os.open(b"/proc/self/fd/%d" % self.root.fd.n, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                )
            except OSError:
                self._handles = False
        return self._mount_fd

    def _evict(self) -> None:
        """Close the oldest descriptors that can be opened again, a sixteenth of them."""
        with self.lock:
            wanted = max(self.limit // 16, 1)
            for node in list(self._held)[: 4 * wanted]:
                del self._held[node]
                if node.opens or node.parent is None:
                    self._held[node] = None  # pinned: at the end, to be looked at again later
                    continue
                if node.handle is None and (fd := node.fd) is not None and self._handles and node.dev == self.root.dev:
                    with contextlib.suppress(OSError):
                        node.handle = linux.file_handle(fd.n)
                node.fd = None
                wanted -= 1
                if wanted == 0:
                    break

    # ---- what changes names

    def unnamed(self, parent: Node, name: bytes) -> None:
        """``name`` was removed from ``parent``."""
        with self.lock:
            if self.journal is not None:
                self.journal.add(("unname", parent.id, name))
            node = self._disbelieve(parent, name)  # the kernel will ask for the name again
            if node is not None and node.parent is parent and node.name == name:
                node.parent, node.name = None, b""
                if node.fd is None:  # nothing leads to it: let its number be used again
                    self._drop_key(node)

    def renamed(self, parent: Node, name: bytes, to: Node, new: bytes, exchange: bool) -> None:
        """``name`` in ``parent`` became ``new`` in ``to``."""
        with self.lock:
            if self.journal is not None:
                self.journal.add(("rename", parent.id, name, to.id, new, exchange))
            node, other = self._disbelieve(parent, name), self._disbelieve(to, new)
            if other is not None and other is not node and other.parent is to and other.name == new:
                other.parent, other.name = (parent, name) if exchange else (None, b"")
                if not exchange and other.fd is None:
                    self._drop_key(other)
            if exchange and other is not None:
                self._believe(parent, name, other)
            if node is not None:
                self._believe(to, new, node)
                node.parent, node.name = to, new

    def _drop_key(self, node: Node) -> None:
        if self.by_key.get((node.dev, node.ino)) is node:
            del self.by_key[(node.dev, node.ino)]

    def lost(self, parent: Node, name: bytes) -> None:
        """The host removed or replaced ``name``; the kernel is about to be told."""
        with self.lock:
            node = self._disbelieve(parent, name)
            if node is not None and node.parent is parent and node.name == name and node.fd is None:
                self._drop_key(node)

    def nodes(self) -> Iterator[Node]:
        """All nodes, the root first."""
        with self.lock:
            return iter(list(self.by_id.values()))
