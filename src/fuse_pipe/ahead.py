"""What the kernel is known to ask next, sent ahead of an answer so that the relay can tell (see ``shortcuts``)."""

import fcntl
import os

from fuse_pipe import messages as m
from fuse_pipe.attributes import attributes_out
from fuse_pipe.channel import ATTRIBUTES, CONTENT
from fuse_pipe.volume import Volume
from fuse_pipe.worker import Worker

Ahead = tuple[int, int, bytes]  # ATTRIBUTES or CONTENT, node id, and what the message holds

SMALL = 32 * 1024  # files up to this size are sent with the answer to their opening


def of_directory(volume: Volume, worker: Worker, message: memoryview, reply: bytes) -> list[Ahead]:
    """The attributes of the directory that a request was about."""
    node = volume.table.by_id.get(worker.nodeid)
    fd = node.fd if node is not None else None
    if node is None or fd is None:
        return []
    return [(ATTRIBUTES, node.id, attributes_out(volume, node, os.fstat(fd.n)))]


def of_directories(volume: Volume, worker: Worker, message: memoryview, reply: bytes) -> list[Ahead]:
    """Those of both directories of a rename."""
    found = of_directory(volume, worker, message, reply)
    (other,) = m.RENAME_IN.unpack_from(message, m.IN_HEADER.size)
    if other != worker.nodeid:
        worker.nodeid = other
        found += of_directory(volume, worker, message, reply)
    return found


def of_written(volume: Volume, worker: Worker, message: memoryview, reply: bytes) -> list[Ahead]:
    """The attributes of the file whose open file a request was about."""
    handle = volume.handles.get(m.FLUSH_IN.unpack_from(message, m.IN_HEADER.size)[0])
    if handle is None or handle.node.id != worker.nodeid:
        return []
    return [(ATTRIBUTES, handle.node.id, attributes_out(volume, handle.node, os.fstat(handle.fd.n)))]


def of_opened(volume: Volume, worker: Worker, message: memoryview, reply: bytes) -> list[Ahead]:
    """What a small file holds, if the kernel has nothing of it."""
    number, flags, _ = m.OPEN_OUT.unpack_from(reply, m.OUT_HEADER.size)
    handle = volume.handles.get(number)
    if flags & (m.FOPEN_KEEP_CACHE | m.FOPEN_DIRECT_IO) or handle is None or handle.flags & (os.O_ACCMODE | os.O_TRUNC) != os.O_RDONLY:
        return []
    kept = fcntl.fcntl(handle.fd.n, fcntl.F_GETFL)
    fcntl.fcntl(handle.fd.n, fcntl.F_SETFL, kept | os.O_NOATIME)  # not read yet; EPERM for others' files
    try:
        data = os.pread(handle.fd.n, SMALL + 1, 0)
    finally:
        fcntl.fcntl(handle.fd.n, fcntl.F_SETFL, kept)
    return [(CONTENT, handle.node.id, number.to_bytes(8, "little") + data)] if len(data) <= SMALL else []
