"""Reading directories: the host's own entries and offsets, so that a place in a directory stays one while it
changes.
"""

import os
import stat
import struct

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.volume import Handle, Volume
from fuse_pipe.worker import Worker

_DIRENT64 = struct.Struct("<QQHB")  # struct linux_dirent64, up to the name
_NO_ENTRY = bytes(m.ENTRY_OUT.size)
_PADDING = [bytes(-n % 8) for n in range(8)]  # by the length of the name, modulo 8; 24 bytes come before it
READ_SIZE = 32 * 1024


def opendir(volume: Volume, worker: Worker, flags: int, _: int) -> bytes:
    node = volume.table.directory(worker.nodeid)
    volume.watch(node)
    path = volume.table.fd(node)
    fd = volume.reopen(path, os.O_RDONLY | os.O_DIRECTORY)
    number = volume.add_handle(node, fd, flags)
    node.fd = path
    cache = 0
    if node.watched:  # changes are pushed: the kernel may keep the whole listing
        cache = m.FOPEN_CACHE_DIR | (m.FOPEN_KEEP_CACHE if volume.fresh(node, os.fstat(fd.n)) else 0)
    return m.OPEN_OUT.pack(number, cache, 0)


def releasedir(volume: Volume, worker: Worker, number: int, _flags: int, _r: int, _owner: int) -> bytes:
    volume.drop_handle(number)
    return b""


def fsyncdir(volume: Volume, worker: Worker, number: int, flags: int, _: int) -> bytes:
    os.fsync(volume.handle(number).fd.n)
    return b""


def _entries(handle: Handle, offset: int) -> list[tuple[int, int, int, bytes]]:
    """What comes at ``offset``, at least one entry (inode, offset of the next, type, name); empty at the end.

    What was read ahead and not taken is used only if the reader goes on where it stopped.
    """
    if offset != handle.position or not handle.listing:
        os.lseek(handle.fd.n, offset, os.SEEK_SET)
        data = linux.getdents(handle.fd.n, READ_SIZE)
        entries = []
        at = 0
        while at < len(data):
            ino, following, length, kind = _DIRENT64.unpack_from(data, at)
            entries.append((ino, following, kind, data[at + 19 : data.index(0, at + 19)]))
            at += length
        handle.listing, handle.position = entries, offset
    return handle.listing


def _read(volume: Volume, worker: Worker, number: int, offset: int, size: int, plus: bool) -> list[bytes]:
    handle = volume.handle(number)
    node = handle.node
    if node.kind != stat.S_IFDIR:
        raise NotADirectoryError(20, "not a directory")
    size = min(size, m.MAX_WRITE)
    parts: list[bytes] = []
    room = size
    while True:
        entries = _entries(handle, offset)
        if not entries:
            return parts
        taken = 0
        for ino, following, kind, name in entries:
            length = 24 + len(name)
            length += -length % 8 + (128 if plus else 0)
            if length > room:
                break
            if plus:
                parts.append(_entry(volume, node, handle, name))
            parts.append(m.DIRENT.pack(ino, following, len(name), kind))
            parts.append(name + _PADDING[len(name) % 8])
            room -= length
            taken += 1
            offset = following
        handle.listing = entries[taken:]
        handle.position = offset
        if taken < len(entries):
            return parts


def _entry(volume: Volume, node: object, handle: Handle, name: bytes) -> bytes:
    if name in (b".", b".."):
        return _NO_ENTRY
    try:
        info = os.stat(name, dir_fd=handle.fd.n, follow_symlinks=False)
    except OSError:  # removed since: the name is listed, and a lookup will say that it is gone
        return _NO_ENTRY
    return volume.entry(handle.node, name, info)


def readdir(volume: Volume, worker: Worker, number: int, offset: int, size: int, *_: int) -> list[bytes]:
    return _read(volume, worker, number, offset, size, False)


def readdirplus(volume: Volume, worker: Worker, number: int, offset: int, size: int, *_: int) -> list[bytes]:
    volume.watch(volume.handle(number).node)
    return _read(volume, worker, number, offset, size, True)
