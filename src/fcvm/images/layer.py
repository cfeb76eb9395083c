"""Reads one layer of a container image (a tar) into a tree of EROFS nodes, contents going straight to the image.

What a layer removes from the layers below is marked by file names (OCI image specification, layer.md): ``.wh.NAME`` hides
NAME, ``.wh..wh..opq`` hides everything that was in its directory. Overlayfs wants the same as a character device 0:0
called NAME and as the attribute ``trusted.overlay.opaque`` of the directory (Documentation/filesystems/overlayfs.rst).

A layer is untrusted input: its names only ever become places in a tree in memory, never paths of this host.
"""

import io
import posixpath
import stat
import struct
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import IO, cast

from fcvm.errors import ImageError
from fcvm.images import tar_split, tars
from fcvm.images.erofs import Directory, Node, Symlink, Writer

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh."  # other marks of old storage drivers; not files
OPAQUE_XATTR = b"trusted.overlay.opaque"
XATTR_HEADER = "SCHILY.xattr."
MOST_SYMLINKS = 40  # as in Linux
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes (<linux/limits.h>)
LATEST = 1 << 63  # seconds
MOST_SPARSE = 16 << 30  # bytes of a layer's sparse files, holes included: these cost a hostile image nothing
NODE = 512  # bytes of memory that a file takes beside its name and attributes, about
BUFFER = 1 << 20  # bytes

Read = Callable[[int], bytes]

KINDS = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


@dataclass(slots=True)
class Whiteout(Node):
    """A name that hides what the layers below have under it."""


class Layer:
    """The tree of a layer while it is read; ``below`` are the trees of the layers under it, the nearest first."""

    def __init__(self, writer: Writer, below: Sequence[Directory]) -> None:
        self.writer = writer
        self.below = below
        self.root = Directory(stat.S_IFDIR | 0o755)
        self.sparse = 0  # bytes of sparse files so far
        if below:
            _copy_attributes(below[0], self.root)

    def add(self, member: tarfile.TarInfo, content: Read | None) -> None:
        """Add one entry of the tar."""
        self.writer.hold(NODE + len(member.name) + len(member.linkname) + sum(map(len, member.pax_headers.values())))
        if member.issparse():
            self.sparse += member.size
            if self.sparse > MOST_SPARSE:
                raise ValueError(f"its sparse files have more than {MOST_SPARSE >> 30} GiB")
        parts = _parts(member.name)
        if not parts:
            if member.isdir():
                _set_attributes(self.root, member)
            return
        *parents, name = parts
        directory = self._directory(parents)
        if name == OPAQUE:
            directory.xattrs[OPAQUE_XATTR] = b"y"
        elif name.startswith(RESERVED):
            return
        elif name.startswith(WHITEOUT):
            self._hide(directory, name.removeprefix(WHITEOUT))
        elif member.isdir():
            self._add_directory(directory, name, member)
        elif member.islnk():
            node = self._find(_parts(member.linkname))
            if node is None or isinstance(node, Directory):
                raise ValueError(f"{member.name} is a hard link to {member.linkname}, which is not there")
            if directory.entries.get(name) is not node:
                directory.entries[name] = node
                node.links += 1
                self.writer.set_links(node)
        else:
            directory.entries[name] = self._write(member, content)

    def _write(self, member: tarfile.TarInfo, content: Read | None) -> Node:
        if member.issym():
            link = Symlink(stat.S_IFLNK, target=_bytes(member.linkname))
            if len(link.target) > LONGEST_PATH:
                raise ValueError(f"the symbolic link {member.name} is too long")
            _set_attributes(link, member)
            self.writer.add_bytes(link, link.target)
            return link
        node = Node(KINDS.get(member.type, stat.S_IFREG))
        _set_attributes(node, member)
        if content is not None:
            self.writer.add_file(node, member.size, content)
        elif stat.S_ISREG(node.mode):
            raise ValueError(f"{member.name} is of an unknown kind")
        elif stat.S_ISFIFO(node.mode):
            self.writer.add_special(node)
        else:
            self.writer.add_special(node, member.devmajor, member.devminor)
        return node

    def _hide(self, directory: Directory, name: bytes) -> None:
        """A whiteout hides what the layers below have; what this layer itself has under the name stays."""
        present = directory.entries.get(name)
        if isinstance(present, Directory):
            present.xattrs[OPAQUE_XATTR] = b"y"
        elif present is None:
            node = Whiteout(stat.S_IFCHR, mtime_ns=directory.mtime_ns)
            self.writer.add_special(node)
            directory.entries[name] = node

    def _add_directory(self, parent: Directory, name: bytes, member: tarfile.TarInfo) -> None:
        present = parent.entries.get(name)
        if isinstance(present, Directory):
            opaque = present.xattrs.get(OPAQUE_XATTR)
            _set_attributes(present, member)
        else:
            opaque = b"y" if isinstance(present, Whiteout) else None
            present = parent.entries[name] = Directory(stat.S_IFDIR)
            _set_attributes(present, member)
        if opaque:
            present.xattrs[OPAQUE_XATTR] = opaque

    def _directory(self, parts: Sequence[bytes]) -> Directory:
        """The directory at ``parts``, with symbolic links of this layer followed, and made where it is missing.

        Overlayfs shows the uppermost directory's owner and mode, so one that this layer does not describe gets those
        that it has in the layers below.
        """
        directory, left, links = self.root, list(parts), 0
        path: list[bytes] = []
        ancestors: list[Directory] = []
        while left:
            part = left.pop(0)
            if part == b"..":
                directory = ancestors.pop() if ancestors else self.root
                path = path[:-1]
                continue
            child = directory.entries.get(part)
            if isinstance(child, Symlink):
                links += 1
                if links > MOST_SYMLINKS:
                    raise ValueError(f"too many symbolic links in {b'/'.join(parts)!r}")
                if child.target.startswith(b"/"):
                    directory, path, ancestors = self.root, [], []
                left = [word for word in child.target.split(b"/") if word not in (b"", b".")] + left
                continue
            path.append(part)
            if child is None or isinstance(child, Whiteout):
                self.writer.hold(NODE)
                made = Directory(stat.S_IFDIR | 0o755, xattrs={OPAQUE_XATTR: b"y"} if child else {})
                self._inherit(made, path)
                directory.entries[part] = child = made
            elif not isinstance(child, Directory):
                raise ValueError(f"{b'/'.join(path)!r} is used as a directory and is none")
            ancestors.append(directory)
            directory = child
        return directory

    def _inherit(self, directory: Directory, path: Sequence[bytes]) -> None:
        for root in self.below:
            node: Node | None = root
            for part in path:
                node = node.entries.get(part) if isinstance(node, Directory) else None
            if isinstance(node, Directory):
                _copy_attributes(node, directory)
                return

    def _find(self, parts: Sequence[bytes]) -> Node | None:
        return self._directory(parts[:-1]).entries.get(parts[-1]) if parts else None


def read(stream: io.RawIOBase, writer: Writer, below: Sequence[Directory]) -> tuple[Directory, bytes]:
    """The tree of the layer that ``stream`` (an uncompressed tar, read to its end) holds, and the record of that tar.

    Raises:
        ImageError: it is not a tar, ends too early, or contradicts itself.
    """
    layer, recorder = Layer(writer, below), tar_split.Recorder()
    source = cast(IO[bytes], _Recorded(stream, recorder))
    try:
        for member, content in tars.members(source):
            if content is None or not member.size or member.issparse() or WHITEOUT in _bytes(member.name):
                layer.add(member, recorder.passing(content.read) if content else None)
            else:
                layer.add(member, recorder.file(member.name, member.offset_data, member.size, content.read))
                recorder.end()
            recorder.flush()
        while source.read(BUFFER):
            recorder.flush()
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, struct.error, RecursionError) as error:
        raise ImageError(f"A layer of the image is damaged: {str(error) or 'it ends too early'}.") from error
    return layer.root, recorder.finish()


class _Recorded(io.RawIOBase):
    """A tar that tells the recorder what is read of it."""

    def __init__(self, stream: io.RawIOBase, recorder: tar_split.Recorder) -> None:
        self._stream = stream
        self._recorder = recorder

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size) or b""
        self._recorder.feed(data)
        return data


def _parts(name: str) -> list[bytes]:
    """The components of a name, which cannot leave the root: ``../x`` is ``x``; raises ValueError for what Linux cannot name."""
    whole = _bytes(posixpath.normpath("/" + name))
    parts = [part for part in whole.split(b"/") if part]
    if len(whole) > LONGEST_PATH or b"\0" in whole or any(len(part.removeprefix(WHITEOUT)) > LONGEST_NAME for part in parts):
        raise ValueError(f"{name[:80]!r}... cannot name a file")
    return parts


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _copy_attributes(source: Directory, target: Directory) -> None:
    target.mode, target.uid, target.gid, target.mtime_ns = source.mode, source.uid, source.gid, source.mtime_ns
    target.xattrs = {n: v for n, v in source.xattrs.items() if n != OPAQUE_XATTR} | target.xattrs


def _set_attributes(node: Node, member: tarfile.TarInfo) -> None:
    node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(member.mode)
    node.uid, node.gid = member.uid, member.gid
    node.mtime_ns = _mtime_ns(member)
    node.xattrs = {
        _bytes(key.removeprefix(XATTR_HEADER)): _bytes(value)
        for key, value in member.pax_headers.items()
        if key.startswith(XATTR_HEADER)
    }


def _mtime_ns(member: tarfile.TarInfo) -> int:
    """The modification time; a pax header has it exactly, where ``member.mtime`` is a float."""
    text = member.pax_headers.get("mtime")
    try:
        exact = Decimal(text) if text else Decimal(member.mtime)
        if not abs(exact) < LATEST:  # and as an integer it could be of a million digits
            raise ValueError(f"{member.name} was changed at {exact}")
        return int(exact * 10**9)
    except InvalidOperation:
        return int(member.mtime) * 10**9
