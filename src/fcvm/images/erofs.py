"""Writes an EROFS file system (Linux's read-only file system) in one pass, without mounts, devices or privileges.

File contents go to disk while they are read; what stays in memory is the tree of names. Uncompressed: the page cache
then holds file contents as they are, shared by all VMs that use the same image, and reading costs no CPU.

The layout (`fs/erofs/erofs_fs.h` of Linux; every field little endian, blocks of 4096 bytes):

    block 0   1024 unused bytes, the superblock (128 bytes), the root's inode at 1152
    then      file contents (whole blocks), and between them blocks filled with inodes

An inode is found by its number: ``nid * 32`` is its offset in the image, as the superblock says that metadata starts at
block 0. It is 64 bytes, then extended attributes, then (if it fits in the block) the last, partial block of its content,
so a small file costs no block of its own. A directory's content is blocks of entries (12 bytes each) followed by their
names, sorted by name across all blocks.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BLOCK = 4096
SLOT = 32
MAGIC = 0xE0F5E1E2
SUPERBLOCK = 1024
ROOT_INODE = SUPERBLOCK + 128

# i_format: bit 0 is the 64-byte inode, bits 1-3 say where the content is.
PLAIN = 1 | 0 << 1  # in blocks of its own
INLINE = 1 | 2 << 1  # the same, but the last, partial block follows the inode

SUPER = struct.Struct("<IIIBBHQQIIII16s16sI44x")
INODE = struct.Struct("<HHHHQIIIIqII16x")
NLINK_OFFSET = 44
DIRENT = struct.Struct("<QHBx")
FILE_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4,
              stat.S_IFIFO: 5, stat.S_IFSOCK: 6, stat.S_IFLNK: 7}  # fmt: skip
# e_name_index by the prefix that it stands for; the ACLs' names are nothing but prefix.
XATTR_PREFIXES = {b"user.": 1, b"system.posix_acl_access": 2, b"system.posix_acl_default": 3,
                  b"trusted.": 4, b"security.": 6}  # fmt: skip
COPY_SIZE = 1 << 20
ZEROS = bytes(COPY_SIZE)
MOST_HELD = 4 << 30  # bytes of memory that a tree may take: some millions of files
# A longer tail gets a block of its own rather than a new inode block that would be almost only tail.
LONGEST_TAIL_IN_NEW_BLOCK = 2048


@dataclass(slots=True)
class Node:
    """A file of any kind. ``mode`` includes the type; ``offset`` is where its inode is, once it has been placed."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    links: int = 1
    offset: int = 0


@dataclass(slots=True)
class Symlink(Node):
    """A symbolic link; the target is kept for whoever walks the tree."""

    target: bytes = b""


@dataclass(slots=True)
class Directory(Node):
    """A directory with its entries by name; written by ``Writer.finish``, so it may change until then."""

    entries: dict[bytes, Node] = field(default_factory=dict)


class Writer:
    """Writes one image to ``fd``: files as they come, then ``finish`` with the tree that holds them.

    A node is either a ``Directory`` or was given to one of the ``add`` methods, which write its content and inode. A node
    may be in the tree at several places (a hard link: count it in ``links`` and call ``set_links``).
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._next_block = 1
        self._inodes = 0
        self._held = 0
        self._cursor = ROOT_INODE + SLOT * 2  # where the next inode goes; behind the root's in block 0

    def hold(self, size: int) -> None:
        """Count what the tree is to take in memory; raises ValueError when that is more than an image may."""
        self._held += size
        if self._held > MOST_HELD:
            raise ValueError("it has more names than this host should keep in memory")

    def add_file(self, node: Node, size: int, read: Callable[[int], bytes]) -> None:
        """A regular file of ``size`` bytes, which ``read(n)`` delivers (EOFError if it ends before)."""
        inline, start = self._place(node, size)
        position, left = start * BLOCK, size - size % BLOCK if inline else size
        while left:
            data = read(min(COPY_SIZE, left))
            if not data:
                raise EOFError
            if not ZEROS.startswith(data):  # what nobody writes is zero as well, and takes no space
                self._write(position, data)
            position, left = position + len(data), left - len(data)
        tail = bytearray()
        while inline and len(tail) < size % BLOCK:
            data = read(size % BLOCK - len(tail))
            if not data:
                raise EOFError
            tail += data
        self._write_inode(node, size, start, inline, tail)

    def add_bytes(self, node: Node, content: bytes) -> None:
        """A regular file, or a symbolic link, with this content."""
        inline, start = self._place(node, len(content))
        split = len(content) - len(content) % BLOCK if inline else len(content)
        self._write(start * BLOCK, content[:split])
        self._write_inode(node, len(content), start, inline, content[split:])

    def add_special(self, node: Node, major: int = 0, minor: int = 0) -> None:
        """A device node, a FIFO or a socket."""
        self._place(node, 0)
        self._write_inode(node, 0, (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12), False, b"")

    def set_links(self, node: Node) -> None:
        """Write the link count of a node that has been added."""
        self._write(node.offset + NLINK_OFFSET, struct.pack("<I", node.links))

    def finish(self, root: Directory, *, uuid: bytes, time: int) -> int:
        """Write the directories and the superblock; returns the image's size in bytes.

        Arguments:
            uuid: 16 bytes; derive them from the content to get the same image again.
            time: seconds since the epoch, the file system's build time.
        """
        places = []
        for directory, parent in _directories(root):  # first every place, as entries name the places of others
            directory.links = 2 + sum(isinstance(child, Directory) for child in directory.entries.values())
            places.append(self._place(directory, len(_dirents(directory, parent)), root=directory is root))
        for (directory, parent), (inline, start) in zip(_directories(root), places, strict=True):
            content = _dirents(directory, parent)
            split = len(content) - len(content) % BLOCK if inline else len(content)
            self._write(start * BLOCK, content[:split])
            self._write_inode(directory, len(content), start, inline, content[split:])
        size = self._next_block * BLOCK
        os.ftruncate(self._fd, size)
        head = SUPER.pack(MAGIC, 0, 0, BLOCK.bit_length() - 1, 0, ROOT_INODE // SLOT, self._inodes, time, 0,
                          self._next_block, 0, 0, uuid, b"", 0)  # fmt: skip
        self._write(SUPERBLOCK, head)
        return size

    def _place(self, node: Node, size: int, *, root: bool = False) -> tuple[bool, int]:
        """Give ``node`` the place of its inode and its blocks: (its tail follows the inode, its first block)."""
        head = INODE.size + len(_xattrs(node.xattrs))
        tail = size % BLOCK
        self._inodes += 1
        if root:  # its number has 16 bits only, so its place is fixed
            node.offset, inline = ROOT_INODE, False
        else:
            room = -self._cursor % BLOCK
            inline = tail > 0 and head + tail <= room
            if not inline:
                inline = 0 < tail <= LONGEST_TAIL_IN_NEW_BLOCK and head + tail <= BLOCK
                if inline or head > room:
                    self._cursor = self._allocate(-(-head // BLOCK)) * BLOCK
            node.offset = self._cursor
            self._cursor += -(-(head + (tail if inline else 0)) // SLOT) * SLOT
        blocks = (size - tail if inline else size + BLOCK - 1) // BLOCK
        return inline, self._allocate(blocks) if blocks else 0

    def _allocate(self, blocks: int) -> int:
        first = self._next_block
        self._next_block += blocks
        return first

    def _write_inode(self, node: Node, size: int, start: int, inline: bool, tail: bytes | bytearray) -> None:
        xattrs = _xattrs(node.xattrs)
        # The count is in words of 4 bytes, and the header of 12 bytes counts as one.
        count = (len(xattrs) - 12) // 4 + 1 if xattrs else 0
        seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
        number = node.offset // SLOT
        inode = INODE.pack(INLINE if inline else PLAIN, count, node.mode, 0, size, start, number & 0xFFFFFFFF,
                           node.uid, node.gid, seconds, nanoseconds, node.links)  # fmt: skip
        self._write(node.offset, b"".join((inode, xattrs, tail)))

    def _write(self, offset: int, data: bytes | bytearray) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written


def _xattrs(attributes: dict[bytes, bytes]) -> bytes:
    """The attributes as they follow an inode; those of namespaces that EROFS does not know are left out."""
    entries = []
    for name, value in sorted(attributes.items()):
        for prefix, index in XATTR_PREFIXES.items():
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                entry = struct.pack("<BBH", len(rest), index, len(value)) + rest + value
                entries.append(entry + bytes(-len(entry) % 4))
    return bytes(12) + b"".join(entries) if entries else b""


def _directories(root: Directory) -> Iterator[tuple[Directory, Directory]]:
    """Every directory of the tree with its parent, parents first; the root is its own parent."""
    stack = [(root, root)]
    while stack:
        directory, parent = stack.pop()
        yield directory, parent
        stack += [(child, directory) for child in directory.entries.values() if isinstance(child, Directory)]


def _dirents(directory: Directory, parent: Directory) -> bytes:
    """A directory's content; its length does not depend on where the entries' inodes are."""
    entries: list[tuple[bytes, Node]] = sorted(
        [(b".", directory), (b"..", parent), *directory.entries.items()], key=lambda entry: entry[0]
    )
    blocks, first, used = [], 0, 0
    for position, (name, _) in enumerate(entries):
        if used + DIRENT.size + len(name) > BLOCK:
            blocks.append(_dirent_block(entries[first:position]).ljust(BLOCK, b"\0"))
            first, used = position, 0
        used += DIRENT.size + len(name)
    return b"".join([*blocks, _dirent_block(entries[first:])])


def _dirent_block(entries: list[tuple[bytes, Node]]) -> bytes:
    offset = len(entries) * DIRENT.size
    table = []
    for name, node in entries:
        table.append(DIRENT.pack(node.offset // SLOT, offset, FILE_TYPES[stat.S_IFMT(node.mode)]))
        offset += len(name)
    return b"".join([*table, *(name for name, _ in entries)])
