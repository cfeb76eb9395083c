"""A container's user in numbers: names are looked up in the image's own /etc/passwd and /etc/group, on its disk."""

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from fcvm.images.erofs import BLOCK, DIRENT, INLINE, INODE, ROOT_INODE, SLOT

MOST = 4 << 20  # bytes of a file that are looked at


def numbers(disk: Path, user: str) -> str:
    """``USER[:GROUP]`` as ``UID:GID``; 0 for what the image does not know.

    Raises:
        OSError: the disk cannot be read.
    """
    name, _, group = user.partition(":")
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = _row(_lines(fd, b"passwd"), name) if name else None
        uid, gid = (found[2], found[3]) if found and len(found) > 3 else (name, "0")
        if group:
            row = _row(_lines(fd, b"group"), group)
            gid = row[2] if row else group
    finally:
        os.close(fd)
    return ":".join(text if text.isdecimal() else "0" for text in (uid, gid))


def _row(lines: list[str], name: str) -> list[str] | None:
    """The line of this name, or number."""
    rows = [row for line in lines if len(row := line.split(":")) > 2 and row[2].isdecimal()]
    return next((row for row in rows if name in (row[0], row[2])), None)


def _lines(fd: int, name: bytes) -> list[str]:
    """A file of /etc, from the uppermost layer that has it."""
    try:
        described = json.loads(_content(fd, _find(fd, b"overlay-layers", b"layers.json")))
        for layer in reversed(described):
            try:
                inode = _find(fd, b"overlay", layer["id"].encode(), b"diff", b"etc", name)
            except FileNotFoundError:
                continue
            return _content(fd, inode).decode(errors="replace").splitlines()
    except (FileNotFoundError, ValueError, struct.error):  # not a disk of ours: the container will say what is wrong
        pass
    return []


def _find(fd: int, *names: bytes) -> int:
    """Where the inode of a path is."""
    offset = ROOT_INODE
    for name in names:
        if not stat.S_ISDIR(INODE.unpack(os.pread(fd, INODE.size, offset))[2]):
            raise FileNotFoundError(name)
        offset = next((at for entry, at in _entries(_content(fd, offset)) if entry == name), 0)
        if not offset:
            raise FileNotFoundError(name)
    return offset


def _content(fd: int, offset: int) -> bytes:
    """What the file or directory of an inode holds; of a large file the beginning, nothing of other kinds."""
    kind, xattrs, mode, _, size, start, *_ = INODE.unpack(os.pread(fd, INODE.size, offset))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return b""
    whole = size - size % BLOCK if kind == INLINE else size
    content = os.pread(fd, min(whole, MOST), start * BLOCK)
    if kind == INLINE:
        content += os.pread(fd, size % BLOCK, offset + INODE.size + (12 + 4 * (xattrs - 1) if xattrs else 0))
    return content


def _entries(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The names in a directory, and where their inodes are."""
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        count = DIRENT.unpack_from(block)[1] // DIRENT.size
        table = [DIRENT.unpack_from(block, n * DIRENT.size) for n in range(count)]
        ends = [at for _, at, _ in table[1:]] + [len(block)]
        for (number, at, _), end in zip(table, ends, strict=True):
            yield block[at:end].rstrip(b"\0"), number * SLOT
