"""Operations on open files: open, create, read, write, and what goes with them."""

import errno
import os
import stat
from time import time_ns

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.nodes import Fd, Node
from fuse_pipe.volume import Volume
from fuse_pipe.worker import Worker

# What of the caller's flags the host's open gets. Not O_APPEND: the kernel writes mapped pages back through any open
# file, which must not append, so appending is asked for with each write. Not O_DIRECT: the caller's alignment is not
# the host's.
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_SYNC | os.O_DSYNC
COPY_MOST = 1 << 27  # bytes of one copy_file_range, so that an interrupt is answered in time


def _flags(volume: Volume, flags: int) -> int:
    wanted = flags & OPEN_FLAGS
    if wanted & os.O_ACCMODE == os.O_ACCMODE:
        raise OSError(errno.EINVAL, "access mode 3")
    if wanted & (os.O_ACCMODE | os.O_TRUNC):
        volume.writable()
    if volume.writeback and wanted & os.O_ACCMODE == os.O_WRONLY:
        wanted = wanted & ~os.O_ACCMODE | os.O_RDWR  # the kernel reads the pages that it changes in part
    return wanted


def _open(volume: Volume, worker: Worker, node: Node, flags: int, extra: int) -> tuple[int, int]:
    """Open a node; the handle's number and the flags of the reply."""
    wanted = _flags(volume, flags)
    if node.kind != stat.S_IFREG:  # opening a device or a pipe would do something to the host
        raise OSError(errno.EINVAL if node.kind != stat.S_IFDIR else errno.EISDIR, "not a regular file")
    path = volume.table.fd(node)
    if wanted & os.O_TRUNC:
        worker.keep_setid(not extra & m.OPEN_KILL_SUIDGID)
    fd = volume.reopen(path, wanted)
    number = volume.add_handle(node, fd, flags)
    node.fd = path  # pinned as long as it is open
    if volume.table.of_kernel(node):
        return number, m.FOPEN_DIRECT_IO
    return number, m.FOPEN_KEEP_CACHE if volume.fresh(node, os.fstat(fd.n)) else 0


def open(volume: Volume, worker: Worker, flags: int, extra: int) -> bytes:
    number, reply = _open(volume, worker, volume.table.get(worker.nodeid), flags, extra)
    return m.OPEN_OUT.pack(number, reply, 0)


def create(volume: Volume, worker: Worker, flags: int, mode: int, umask: int, extra: int, name: bytes) -> bytes:
    volume.writable()
    table = volume.table
    parent = table.directory(worker.nodeid)
    volume.watch(parent)
    directory = table.fd(parent)
    wanted = _flags(volume, flags)
    worker.become_caller(umask, mode)
    try:
        with volume.change((parent, name)):  # O_EXCL always: what is there already may be a device
            made = os.open(
                name, wanted & ~os.O_TRUNC | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode & 0o7777, dir_fd=directory.n
            )
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        info = os.stat(name, dir_fd=directory.n, follow_symlinks=False)
        entry = volume.entry(parent, name, info)
        node = table.get(m.ENTRY_OUT.unpack_from(entry)[0])
        try:
            number, reply = _open(volume, worker, node, flags, extra)
        except OSError:
            table.forget(node.id, 1)
            raise
        return entry + m.OPEN_OUT.pack(number, reply, 0)
    return _opened(volume, parent, name, Fd(made), flags)


def _opened(volume: Volume, parent: Node | None, name: bytes, fd: Fd, flags: int) -> bytes:
    """The reply for a file just made, whose only descriptor is the open one."""
    info = os.fstat(fd.n)
    if parent is not None:
        entry = volume.entry(parent, name, info)
        node = volume.table.get(m.ENTRY_OUT.unpack_from(entry)[0])
    else:
        node = volume.table.adopt(info, volume.reopen(fd, os.O_PATH))
        entry = m.ENTRY_OUT.pack(node.id, 0, 0, 1, 0, 0, *volume.attributes(info))
    number = volume.add_handle(node, fd, flags)
    if node.fd is None:
        node.fd = fd
    volume.sign(node, info)
    return entry + m.OPEN_OUT.pack(number, m.FOPEN_DIRECT_IO if volume.table.of_kernel(node) else m.FOPEN_KEEP_CACHE, 0)


def tmpfile(volume: Volume, worker: Worker, flags: int, mode: int, umask: int, _: int, _name: bytes) -> bytes:
    volume.writable()
    table = volume.table
    directory = table.fd(table.directory(worker.nodeid))
    wanted = _flags(volume, flags) & ~os.O_TRUNC
    worker.become_caller(umask, mode)
    fd = Fd(os.open(b".", wanted | os.O_TMPFILE | flags & os.O_EXCL | os.O_CLOEXEC, mode & 0o7777, dir_fd=directory.n))
    return _opened(volume, None, b"", fd, flags)


def read(
    volume: Volume, worker: Worker, number: int, offset: int, size: int, _f: int, _owner: int, _flags: int, _p: int
) -> bytes:  # fmt: skip
    handle = volume.handles.get(number) or volume.handle(number)
    return os.pread(handle.fd.n, size if size < m.MAX_WRITE else m.MAX_WRITE, offset)


def write(
    volume: Volume,
    worker: Worker,
    number: int,
    offset: int,
    size: int,
    extra: int,
    _owner: int,
    flags: int,
    _p: int,
    data: memoryview,
) -> bytes:
    if volume.read_only:
        raise OSError(errno.EROFS, "read-only volume")
    handle = volume.handles.get(number) or volume.handle(number)
    worker.keep_setid(not extra & m.WRITE_KILL_SUIDGID)
    fd = handle.fd
    seen = volume.records.seen.get(handle.node.id)
    before = os.fstat(fd.n) if seen is not None else None
    if flags & os.O_APPEND and not extra & m.WRITE_CACHE:
        done = os.pwritev(fd.n, [data], offset, os.RWF_APPEND)
    else:
        done = os.pwrite(fd.n, data, offset)
    while done < size and worker.quiet:  # answered already: all of it, or an error
        done += os.pwrite(fd.n, data[done:], offset + done)
    handle.written = True
    if before is not None and seen is not None:
        # Where others lock other ranges and write to them, the file is not as the kernel has it for having written last.
        if seen[0] == (before.st_ctime_ns, before.st_size):
            info = os.fstat(fd.n)
            volume.records.seen[handle.node.id] = (info.st_ctime_ns, info.st_size), time_ns()
            volume.sign(handle.node, info)
    elif volume.watcher is not None:
        volume.sign(handle.node, os.fstat(fd.n))
    return m.WRITE_OUT.pack(done, 0)


def flush(volume: Volume, worker: Worker, number: int, _u: int, _p: int, owner: int) -> bytes:
    handle = volume.handle(number)
    volume.records.release(worker.nodeid, owner)
    if owner in handle.owners and volume.records.owner(handle.node.id, owner) is None:  # else it waits for a lock
        handle.owners.discard(owner)  # another thread may have done so just now
        if volume.journal is not None:
            volume.journal.add(("disown", number, owner))
    if handle.written:  # a file system on a network says only now what went wrong
        handle.written = False
        os.close(os.dup(handle.fd.n))
    return b""


def release(volume: Volume, worker: Worker, number: int, _flags: int, extra: int, owner: int) -> bytes:
    handle = volume.drop_handle(number)
    for holder in handle.owners:
        volume.records.release(handle.node.id, holder)
    return b""


def fsync(volume: Volume, worker: Worker, number: int, flags: int, _: int) -> bytes:
    handle = volume.handle(number)
    (os.fdatasync if flags & m.FSYNC_FDATASYNC else os.fsync)(handle.fd.n)
    return b""


def syncfs(volume: Volume, worker: Worker, _: int) -> bytes:
    fd = volume.table.mount_fd() or volume.reopen(volume.table.fd(volume.table.root), os.O_RDONLY)
    linux.syncfs(fd.n)
    return b""


def fallocate(volume: Volume, worker: Worker, number: int, offset: int, length: int, mode: int, _: int) -> bytes:
    volume.writable()
    handle = volume.handle(number)
    worker.keep_setid(worker.uid == 0)
    linux.fallocate(handle.fd.n, mode, _signed(offset), _signed(length))
    volume.sign(handle.node, os.fstat(handle.fd.n))
    return b""


def _signed(value: int) -> int:
    if value >> 63:
        raise OSError(errno.EINVAL, "an offset below zero")
    return value


def lseek(volume: Volume, worker: Worker, number: int, offset: int, whence: int, _: int) -> bytes:
    if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
        raise OSError(errno.EINVAL, "only SEEK_DATA and SEEK_HOLE come here")
    return m.LSEEK_OUT.pack(os.lseek(volume.handle(number).fd.n, _signed(offset), whence))


def _copy(volume: Volume, worker: Worker, fields: tuple[int, ...]) -> int:
    number, offset, _node, out_number, out_offset, length, flags = fields
    volume.writable()
    if flags:
        raise OSError(errno.EINVAL, "copy_file_range has no flags")
    source, target = volume.handle(number), volume.handle(out_number)
    worker.keep_setid(worker.uid == 0)
    done = os.copy_file_range(
        source.fd.n, target.fd.n, min(length, COPY_MOST), _signed(offset), _signed(out_offset)
    )  # fmt: skip
    target.written = True
    volume.sign(target.node, os.fstat(target.fd.n))
    return done


def copy_file_range(volume: Volume, worker: Worker, *fields: int) -> bytes:
    return m.WRITE_OUT.pack(_copy(volume, worker, fields), 0)


def copy_file_range_64(volume: Volume, worker: Worker, *fields: int) -> bytes:
    return m.COPY_FILE_RANGE_OUT.pack(_copy(volume, worker, fields))
