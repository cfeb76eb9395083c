"""Operations on attributes: getattr, setattr, statx, extended attributes and ACLs, statfs."""

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Callable

from fuse_pipe import linux
from fuse_pipe import messages as m
from fuse_pipe.nodes import Node, state_of
from fuse_pipe.volume import Volume
from fuse_pipe.worker import Worker

ACL_ACCESS, ACL_DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
_ACL_VERSION, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")  # tag, permissions, id (linux/posix_acl_xattr.h)
_ACL_USER, _ACL_GROUP = 2, 8  # the tags of entries that have an id


def attributes_out(volume: Volume, node: Node, info: os.stat_result) -> bytes:
    """A ``struct fuse_attr_out``, as which the kernel is told this."""
    node.told = state_of(info)
    return m.ATTR_OUT.pack(volume.file_time(node, info), 0, 0, *volume.attributes(info))


def getattr(volume: Volume, worker: Worker, flags: int, _: int, number: int) -> bytes:
    table = volume.table
    node = table.get(worker.nodeid)
    if flags & m.GETATTR_FH and number in volume.handles:
        info = os.fstat(volume.handles[number].fd.n)
    else:
        info = table.stat(node)
    return attributes_out(volume, node, info)


def setattr(
    volume: Volume,
    worker: Worker,
    valid: int,
    _p: int,
    number: int,
    size: int,
    _owner: int,
    atime: int,
    mtime: int,
    ctime: int,
    atime_ns: int,
    mtime_ns: int,
    ctime_ns: int,
    mode: int,
    _u4: int,
    uid: int,
    gid: int,
    _u5: int,
) -> bytes:
    volume.writable()
    table = volume.table
    node = table.get(worker.nodeid)
    fd = table.fd(node)
    handle = volume.handle(number) if valid & m.FATTR_FH else None
    if valid & m.FATTR_SIZE:
        if node.kind != stat.S_IFREG:
            raise OSError(errno.EINVAL, "not a regular file")
        worker.keep_setid(not valid & m.FATTR_KILL_SUIDGID)
        if handle is not None and handle.node is node and handle.flags & os.O_ACCMODE != os.O_RDONLY:
            os.ftruncate(handle.fd.n, size)
        else:
            os.truncate(b"/proc/self/fd/%d" % fd.n, size)
    if valid & (m.FATTR_UID | m.FATTR_GID):
        new_uid, new_gid = volume.host_ids(uid if valid & m.FATTR_UID else -1, gid if valid & m.FATTR_GID else -1)
        linux.chown_fd(fd.n, new_uid, new_gid)
    if valid & m.FATTR_MODE:
        worker.keep_setid(True)  # that side's kernel has judged the bits by the caller's groups
        os.chmod(b"/proc/self/fd/%d" % fd.n, mode & 0o7777)
    if valid & (m.FATTR_ATIME | m.FATTR_MTIME):
        linux.utimens(
            fd.n,
            _time(valid & m.FATTR_ATIME, valid & m.FATTR_ATIME_NOW, atime, atime_ns),
            _time(valid & m.FATTR_MTIME, valid & m.FATTR_MTIME_NOW, mtime, mtime_ns),
        )
    if not valid & (m.FATTR_SIZE | m.FATTR_UID | m.FATTR_GID | m.FATTR_MODE | m.FATTR_ATIME | m.FATTR_MTIME):
        with contextlib.suppress(PermissionError):  # chown(-1, -1): Linux notes a change nevertheless
            linux.chown_fd(fd.n, -1, -1)
    info = os.fstat(fd.n)
    volume.sign(node, info)
    return attributes_out(volume, node, info)


def _time(given: int, now: int, seconds: int, nanoseconds: int) -> tuple[int, int]:
    if now:
        return 0, linux.UTIME_NOW
    if not given:
        return 0, linux.UTIME_OMIT
    if nanoseconds >= 1_000_000_000:
        raise OSError(errno.EINVAL, "nanoseconds")
    return seconds, nanoseconds


def statx(volume: Volume, worker: Worker, flags: int, _: int, number: int, _flags: int, mask: int) -> bytes:
    table = volume.table
    node = table.get(worker.nodeid)
    fd = volume.handle(number).fd if flags & m.GETATTR_FH else table.fd(node)
    x = linux.statx(fd.n)
    info = os.fstat(fd.n)
    fields = volume.attributes(info)
    ino, size, blocks = fields[:3]
    mode, nlink, uid, gid, _, blksize, _ = fields[9:]
    return m.STATX_OUT.pack(
        volume.file_time(node, info), 0, 0, 0, 0,
        x.mask & linux.STATX_ALL, blksize, x.attributes, nlink, uid, gid, mode, 0, ino, size, blocks, x.attributes_mask,
        x.atime, x.atimensec, 0, x.btime, x.btimensec, 0, x.ctime, x.ctimensec, 0, x.mtime, x.mtimensec, 0,
        x.rdev_major, x.rdev_minor, x.dev_major, x.dev_minor, *[0] * 14,
    )  # fmt: skip


def statfs(volume: Volume, worker: Worker) -> bytes:
    fd = volume.table.fd(volume.table.get(worker.nodeid))
    info = os.fstatvfs(fd.n)
    return m.STATFS_OUT.pack(
        info.f_blocks,
        info.f_bfree,
        info.f_bavail,
        info.f_files,
        info.f_ffree,
        info.f_bsize,
        info.f_namemax,
        info.f_frsize,
        0,
        0,
        0,
        0,
    )


def access(volume: Volume, worker: Worker, mask: int, _: int) -> bytes:
    volume.table.get(worker.nodeid)
    if mask & os.W_OK:
        volume.writable()
    return b""  # the kernel judges by the attributes (default_permissions)


def _path(volume: Volume, worker: Worker) -> tuple[object, bytes]:
    fd = volume.table.fd(volume.table.get(worker.nodeid))
    return fd, b"/proc/self/fd/%d" % fd.n


def setxattr(
    volume: Volume, worker: Worker, _size: int, flags: int, extra: int, _: int, name: bytes, value: bytes
) -> bytes:  # fmt: skip
    volume.writable()
    if volume.owner is not None:
        value = _acl(name, value, volume.host_ids)
    keep, path = _path(volume, worker)
    os.setxattr(path, name, value, flags & 3)
    if name == ACL_ACCESS and extra & m.SETXATTR_ACL_KILL_SGID:
        mode = os.stat(path).st_mode
        if mode & stat.S_ISGID:
            os.chmod(path, stat.S_IMODE(mode) & ~stat.S_ISGID)
    del keep
    return b""


def getxattr(volume: Volume, worker: Worker, size: int, _: int, name: bytes) -> bytes:
    keep, path = _path(volume, worker)
    value = os.getxattr(path, name)
    del keep
    if volume.owner is not None:
        value = _acl(name, value, volume.show_ids)
    return _sized(value, size)


def _acl(name: bytes, value: bytes, translate: Callable[[int, int], tuple[int, int]]) -> bytes:
    """An extended attribute; in an ACL, with the ids of the other side."""
    start, size = _ACL_VERSION.size, _ACL_ENTRY.size
    if name not in (ACL_ACCESS, ACL_DEFAULT) or len(value) < start or (len(value) - start) % size:
        return value
    entries = [value[:start]]
    for tag, permissions, id in _ACL_ENTRY.iter_unpack(value[start:]):
        if tag == _ACL_USER:
            id = translate(id, -1)[0]
        elif tag == _ACL_GROUP:
            id = translate(-1, id)[1]
        entries.append(_ACL_ENTRY.pack(tag, permissions, id))
    return b"".join(entries)


def listxattr(volume: Volume, worker: Worker, size: int, _: int) -> bytes:
    keep, path = _path(volume, worker)
    names = [os.fsencode(name) for name in os.listxattr(path)]
    del keep
    if worker.uid != 0:  # as Linux hides them from those without CAP_SYS_ADMIN
        names = [name for name in names if not name.startswith(b"trusted.")]
    return _sized(b"".join(name + b"\0" for name in names), size)


def _sized(value: bytes, size: int) -> bytes:
    if size == 0:
        return m.XATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise OSError(errno.ERANGE, "larger than asked for")
    return value


def removexattr(volume: Volume, worker: Worker, name: bytes) -> bytes:
    volume.writable()
    keep, path = _path(volume, worker)
    os.removexattr(path, name)
    del keep
    return b""
