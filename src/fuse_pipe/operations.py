"""Opcode -> the function that does it, and the agreement that opens a mount (INIT)."""

import errno
from collections.abc import Callable
from typing import Any

from fuse_pipe import ahead, attributes, directories, files, locking, namespace
from fuse_pipe import messages as m
from fuse_pipe.ahead import Ahead
from fuse_pipe.volume import Volume
from fuse_pipe.worker import Worker

# What this server can do; the kernel does those of them that it can, too. Not among them: SPLICE_* (there is no pipe
# here), EXPORT_SUPPORT ("..", which would lead out of a directory), SUBMOUNTS, PASSTHROUGH and DAX (they need the
# host's descriptors), HANDLE_KILLPRIV (the second version replaces it).
WANTED = (
    m.ASYNC_READ
    | m.POSIX_LOCKS
    | m.ATOMIC_O_TRUNC
    | m.BIG_WRITES
    | m.DONT_MASK
    | m.FLOCK_LOCKS
    | m.AUTO_INVAL_DATA
    | m.DO_READDIRPLUS
    | m.READDIRPLUS_AUTO
    | m.ASYNC_DIO
    | m.PARALLEL_DIROPS
    | m.POSIX_ACL
    | m.ABORT_ERROR
    | m.MAX_PAGES
    | m.CACHE_SYMLINKS
    | m.HANDLE_KILLPRIV_V2
    | m.SETXATTR_EXT
    | m.INIT_EXT
    | m.CREATE_SUPP_GROUP
    | m.HAS_EXPIRE_ONLY
    | m.DIRECT_IO_ALLOW_MMAP
)
MAX_READAHEAD = 1 << 20  # bytes; the kernel takes the least of this and what it has (relay.READ_AHEAD)
MAX_BACKGROUND = 64
CONGESTION = 48


def init(volume: Volume, worker: Worker, major: int, minor: int, readahead: int, flags: int, flags2: int) -> bytes:
    if major < m.VERSION or (major == m.VERSION and minor < m.MINOR_LEAST):
        raise OSError(errno.EPROTO, f"FUSE {major}.{minor} is older than Linux {m.KERNELS[m.MINOR_LEAST]}")
    if major > m.VERSION:  # the kernel asks again with ours
        return m.INIT_OUT.encode(major=m.VERSION, minor=m.MINOR)
    offered = flags | (flags2 << 32 if flags & m.INIT_EXT else 0)
    agreed = offered & (WANTED | (m.WRITEBACK_CACHE if volume.writeback else 0))
    if volume.watcher is not None:  # names are believed for long: a listing saves a round trip for each
        agreed &= ~m.READDIRPLUS_AUTO
    volume.flags, volume.minor = agreed, min(minor, m.MINOR)
    volume.decoders = m.decoders(bool(agreed & m.SETXATTR_EXT))
    if volume.journal is not None:
        volume.journal.add(("init", agreed, volume.minor))
    return m.INIT_OUT.encode(
        major=m.VERSION,
        minor=m.MINOR,
        max_readahead=MAX_READAHEAD,
        flags=agreed & 0xFFFFFFFF,
        flags2=agreed >> 32,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION,
        max_write=m.MAX_WRITE,
        time_gran=1,
        max_pages=m.MAX_WRITE // 4096,
    )


def destroy(volume: Volume, worker: Worker) -> bytes:
    return b""


def unsupported(volume: Volume, worker: Worker, *fields: Any) -> bytes:
    """The kernel does without, and does not ask again."""
    raise OSError(errno.ENOSYS, "not supported")


def no_ioctl(volume: Volume, worker: Worker, *fields: Any) -> bytes:
    raise OSError(errno.ENOTTY, "no ioctl is passed on to the host")


def ignored(volume: Volume, worker: Worker, *fields: Any) -> None:
    """Nothing of this is ever asked for."""


Operation = Callable[..., Any]
OPERATIONS: dict[int, Operation] = {
    m.LOOKUP: namespace.lookup,
    m.FORGET: namespace.forget,
    m.GETATTR: attributes.getattr,
    m.SETATTR: attributes.setattr,
    m.READLINK: namespace.readlink,
    m.SYMLINK: namespace.symlink,
    m.MKNOD: namespace.mknod,
    m.MKDIR: namespace.mkdir,
    m.UNLINK: namespace.unlink,
    m.RMDIR: namespace.rmdir,
    m.RENAME: namespace.rename,
    m.LINK: namespace.link,
    m.OPEN: files.open,
    m.READ: files.read,
    m.WRITE: files.write,
    m.STATFS: attributes.statfs,
    m.RELEASE: files.release,
    m.FSYNC: files.fsync,
    m.SETXATTR: attributes.setxattr,
    m.GETXATTR: attributes.getxattr,
    m.LISTXATTR: attributes.listxattr,
    m.REMOVEXATTR: attributes.removexattr,
    m.FLUSH: files.flush,
    m.INIT: init,
    m.OPENDIR: directories.opendir,
    m.READDIR: directories.readdir,
    m.RELEASEDIR: directories.releasedir,
    m.FSYNCDIR: directories.fsyncdir,
    m.GETLK: locking.getlk,
    m.SETLK: locking.setlk,
    m.SETLKW: locking.setlkw,
    m.ACCESS: attributes.access,
    m.CREATE: files.create,
    m.BMAP: unsupported,
    m.DESTROY: destroy,
    m.IOCTL: no_ioctl,
    m.POLL: unsupported,
    m.NOTIFY_REPLY: ignored,
    m.BATCH_FORGET: namespace.batch_forget,
    m.FALLOCATE: files.fallocate,
    m.READDIRPLUS: directories.readdirplus,
    m.RENAME2: namespace.rename2,
    m.LSEEK: files.lseek,
    m.COPY_FILE_RANGE: files.copy_file_range,
    m.SETUPMAPPING: unsupported,
    m.REMOVEMAPPING: unsupported,
    m.SYNCFS: files.syncfs,
    m.TMPFILE: files.tmpfile,
    m.STATX: attributes.statx,
    m.COPY_FILE_RANGE_64: files.copy_file_range_64,
}

# What is not to be done twice when it is sent again.
CHANGES = frozenset(
    (
        m.SETATTR,
        m.SYMLINK,
        m.MKNOD,
        m.MKDIR,
        m.UNLINK,
        m.RMDIR,
        m.RENAME,
        m.LINK,
        m.OPEN,
        m.WRITE,
        m.RELEASE,
        m.SETXATTR,
        m.REMOVEXATTR,
        m.OPENDIR,
        m.RELEASEDIR,
        m.CREATE,
        m.FALLOCATE,
        m.RENAME2,
        m.COPY_FILE_RANGE,
        m.TMPFILE,
        m.COPY_FILE_RANGE_64,
        m.FORGET,
        m.BATCH_FORGET,
    )
)

# What may take long: done by other threads, so that the channel's next request does not wait.
SLOW = frozenset((m.FSYNC, m.FSYNCDIR, m.SYNCFS, m.FALLOCATE, m.COPY_FILE_RANGE, m.COPY_FILE_RANGE_64, m.SETLKW))

# What the kernel asks for next goes ahead of the answer: the attributes of a directory whose names changed and of a file
# that was written, the content of a small file that was opened.
ASKED_NEXT: dict[int, Callable[[Volume, Worker, memoryview, bytes], list[Ahead]]] = {
    **dict.fromkeys((m.CREATE, m.MKNOD, m.MKDIR, m.SYMLINK, m.LINK, m.UNLINK, m.RMDIR), ahead.of_directory),
    m.RENAME: ahead.of_directories,
    m.RENAME2: ahead.of_directories,
    m.FLUSH: ahead.of_written,
    m.OPEN: ahead.of_opened,
}
