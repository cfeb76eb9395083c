"""Writes cpio archives in the ``newc`` format, the one that the Linux kernel unpacks as an initramfs.

The format is described in the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``. The output
depends on the entries only (owner root, time 0, numbered inodes), so the same input gives the same bytes.
"""

import stat
from collections.abc import Iterable
from typing import BinaryIO

from fc_agent.structs import Struct

TRAILER = "TRAILER!!!"


class Entry(Struct):
    """One file: ``name`` without a leading slash, ``mode`` as in ``st_mode`` (type and permissions).

    ``data`` is a file's content or a symbolic link's target; ``device`` is the (major, minor) of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def symlink(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def write(stream: BinaryIO, entries: Iterable[Entry]) -> None:
    """Write a whole archive; a directory must come before what is in it, as the kernel makes no parents."""
    for inode, entry in enumerate(entries, start=1):
        _write_entry(stream, inode, entry)
    _write_entry(stream, 0, Entry(TRAILER, 0))


def _write_entry(stream: BinaryIO, inode: int, entry: Entry) -> None:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device of the file (2), device of a node (2), size of name, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    stream.write(_padded(header + name))
    stream.write(_padded(entry.data))


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
