"""Operations on names: lookup, creating, removing, renaming and linking."""

import contextlib
import errno
import os
import stat

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.nodes import Fd, Node
from fuse_pipe.volume import NAME_TIME, NEGATIVES, Volume
from fuse_pipe.worker import Worker

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
KINDS = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
_NOT_THERE = m.ENTRY_OUT.pack(0, 0, NAME_TIME, *[0] * 19)


def lookup(volume: Volume, worker: Worker, name: bytes) -> bytes:
    table = volume.table
    parent = table.directory(worker.nodeid)
    volume.watch(parent)
    directory = table.fd(parent)
    try:
        info = os.stat(name, dir_fd=directory.n, follow_symlinks=False)
    except FileNotFoundError:
        if not parent.watched or table.negatives >= NEGATIVES:
            raise
        table.missing(parent, name)
        return _NOT_THERE
    return volume.entry(parent, name, info)


def _made(volume: Volume, parent: Node, directory: Fd, name: bytes) -> bytes:
    return volume.entry(parent, name, os.stat(name, dir_fd=directory.n, follow_symlinks=False))


def mknod(volume: Volume, worker: Worker, mode: int, device: int, umask: int, _: int, name: bytes) -> bytes:
    volume.writable()
    if stat.S_IFMT(mode) not in KINDS:
        raise OSError(errno.EINVAL, "no such kind of file")
    parent = volume.table.directory(worker.nodeid)
    directory = volume.table.fd(parent)
    worker.become_caller(umask, mode)
    with volume.change((parent, name)):
        linux.mknod(
            directory.n, name, mode, os.makedev((device & 0xFFF00) >> 8, (device & 0xFF) | ((device >> 12) & 0xFFF00))
        )
        return _made(volume, parent, directory, name)


def mkdir(volume: Volume, worker: Worker, mode: int, umask: int, name: bytes) -> bytes:
    volume.writable()
    parent = volume.table.directory(worker.nodeid)
    directory = volume.table.fd(parent)
    worker.become_caller(umask, mode)
    with volume.change((parent, name)):
        os.mkdir(name, mode & 0o7777, dir_fd=directory.n)
        return _made(volume, parent, directory, name)


def symlink(volume: Volume, worker: Worker, name: bytes, target: bytes) -> bytes:
    volume.writable()
    parent = volume.table.directory(worker.nodeid)
    directory = volume.table.fd(parent)
    worker.become_caller(0)
    with volume.change((parent, name)):
        os.symlink(target, name, dir_fd=directory.n)
        return _made(volume, parent, directory, name)


def readlink(volume: Volume, worker: Worker) -> bytes:
    node = volume.table.get(worker.nodeid)
    if node.kind != stat.S_IFLNK:
        raise OSError(errno.EINVAL, "not a symbolic link")
    fd = volume.table.fd(node)
    return os.readlink(b"", dir_fd=fd.n)


def link(volume: Volume, worker: Worker, old: int, name: bytes) -> bytes:
    volume.writable()
    table = volume.table
    node = table.get(old)
    parent = table.directory(worker.nodeid)
    directory = table.fd(parent)
    with volume.change((parent, name)):
        volume.link(table.fd(node), directory, name)
        return _made(volume, parent, directory, name)


def _keep_open(volume: Volume, parent: Node, name: bytes) -> None:
    """Pin a node whose name goes away, if it may still be used: by another name, or as somebody's working directory."""
    node = parent.children.get(name)
    if node is not None and node.fd is None:
        with contextlib.suppress(OSError):  # it is gone already: nothing to pin
            if node.kind == stat.S_IFDIR or volume.table.stat(node).st_nlink > 1:
                volume.table.fd(node)


def unlink(volume: Volume, worker: Worker, name: bytes) -> bytes:
    volume.writable()
    parent = volume.table.directory(worker.nodeid)
    directory = volume.table.fd(parent)
    with volume.change((parent, name)):
        _keep_open(volume, parent, name)
        os.unlink(name, dir_fd=directory.n)
        volume.table.unnamed(parent, name)
    return b""


def rmdir(volume: Volume, worker: Worker, name: bytes) -> bytes:
    volume.writable()
    parent = volume.table.directory(worker.nodeid)
    directory = volume.table.fd(parent)
    with volume.change((parent, name)):
        _keep_open(volume, parent, name)
        os.rmdir(name, dir_fd=directory.n)
        volume.table.unnamed(parent, name)
    return b""


def rename2(volume: Volume, worker: Worker, new_directory: int, flags: int, _: int, name: bytes, new: bytes) -> bytes:
    volume.writable()
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
        raise OSError(errno.EINVAL, "unknown rename flags")
    table = volume.table
    parent, to = table.directory(worker.nodeid), table.directory(new_directory)
    source, target = table.fd(parent), table.fd(to)
    if flags & RENAME_WHITEOUT:
        worker.become_caller(0)
    with volume.change(*(((parent, name), (to, new)) * (2 if flags & RENAME_EXCHANGE else 1))):
        _keep_open(volume, to, new)
        if flags:
            linux.rename(source.n, name, target.n, new, flags)
        else:
            os.rename(name, new, src_dir_fd=source.n, dst_dir_fd=target.n)
        table.renamed(parent, name, to, new, bool(flags & RENAME_EXCHANGE))
        if flags & RENAME_WHITEOUT:
            table.lost(parent, name)
    return b""


def rename(volume: Volume, worker: Worker, new_directory: int, name: bytes, new: bytes) -> bytes:
    return rename2(volume, worker, new_directory, 0, 0, name, new)


def forget(volume: Volume, worker: Worker, count: int) -> None:
    _forget(volume, worker.nodeid, count)


def batch_forget(volume: Volume, worker: Worker, count: int, _: int, records: list[tuple[int, int]]) -> None:
    for nodeid, lookups in records:
        _forget(volume, nodeid, lookups)


def _forget(volume: Volume, nodeid: int, count: int) -> None:
    if volume.nodes is None:
        return
    node = volume.nodes.forget(nodeid, count)
    if node is not None:
        if node.watch is not None and volume.watcher is not None:
            volume.watcher.remove(node)
        volume.records.forget(nodeid)
