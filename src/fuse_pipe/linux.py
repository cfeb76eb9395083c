"""The system calls that Python's ``os`` does not have; one function each, raising ``OSError``.

Constants are from the kernel's headers, named as there. Structures are little endian 64-bit ones (x86-64, arm64).
"""

import ctypes
import os
import platform
import struct
from typing import Any, NamedTuple

AT_EMPTY_PATH = 0x1000
AT_SYMLINK_NOFOLLOW = 0x100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
MNT_DETACH = 2
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW = 36, 37, 38
SECBIT_NO_SETUID_FIXUP = 1 << 2
PR_SET_SECUREBITS, PR_GET_SECUREBITS = 28, 27
CAP_FSETID = 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
CLONE_FS = 0x200
O_LARGEFILE = 0o100000 if platform.machine() == "x86_64" else 0o400000  # as the kernel sees it; libc hides it
STATX_ALL = 0xFFF

_ARM = platform.machine() == "aarch64"
_NR_CAPGET, _NR_CAPSET = (90, 91) if _ARM else (125, 126)
_NR_SETFSUID, _NR_SETFSGID = (151, 152) if _ARM else (122, 123)
_NR_GETDENTS64 = 61 if _ARM else 217
_NR_RENAMEAT2 = 276 if _ARM else 316
_NR_SETGROUPS = 159 if _ARM else 116

_libc = ctypes.CDLL(None, use_errno=True)
_int, _long, _ulong, _char, _ptr = ctypes.c_int, ctypes.c_long, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_void_p


def _declare(name: str, *arguments: Any, result: Any = ctypes.c_int) -> Any:
    function = getattr(_libc, name)
    function.argtypes, function.restype = arguments, result
    return function


_fallocate = _declare("fallocate", _int, _int, ctypes.c_int64, ctypes.c_int64)
_fchownat = _declare("fchownat", _int, _char, ctypes.c_uint, ctypes.c_uint, _int)
_mknodat = _declare("mknodat", _int, _char, ctypes.c_uint, ctypes.c_uint64)
_mount = _declare("mount", _char, _char, _char, _ulong, _char)
_name_to_handle_at = _declare("name_to_handle_at", _int, _char, _ptr, _ptr, _int)
_open_by_handle_at = _declare("open_by_handle_at", _int, _ptr, _int)
_prctl = _declare("prctl", _int, _ulong, _ulong, _ulong, _ulong)
_statx = _declare("statx", _int, _char, _int, ctypes.c_uint, _ptr)
_syncfs = _declare("syncfs", _int)
_syscall2 = _declare("syscall", result=_long)
_syscall2.argtypes = None  # variadic: arguments are converted where it is called
_umount2 = _declare("umount2", _char, _int)
_unshare = _declare("unshare", _int)
_utimensat = _declare("utimensat", _int, _char, _ptr, _int)
_inotify_init1 = _declare("inotify_init1", _int)
_inotify_add_watch = _declare("inotify_add_watch", _int, _char, ctypes.c_uint32)
_inotify_rm_watch = _declare("inotify_rm_watch", _int, _int)
_flock = _declare("flock", _int, _int)
_fcntl = _declare("fcntl", _int, _int, _ptr)


def _check(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """``mode`` is of ``FALLOC_FL_*``: keep size, punch hole, collapse, zero, insert, unshare."""
    _check(_fallocate(fd, mode, offset, length))


def chown_fd(fd: int, uid: int, gid: int) -> None:
    """Owner of what an O_PATH descriptor stands for, a symbolic link included; 0xffffffff leaves one as it is."""
    _check(_fchownat(fd, b"", uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, AT_EMPTY_PATH))


def mknod(directory: int, name: bytes, mode: int, device: int) -> None:
    _check(_mknodat(directory, name, mode, device))


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    _check(_mount(os.fsencode(source), os.fsencode(target), kind.encode(), flags, data.encode()))


def umount(target: str, flags: int = 0) -> None:
    _check(_umount2(os.fsencode(target), flags))


def rename(old_directory: int, old: bytes, new_directory: int, new: bytes, flags: int) -> None:
    """renameat2(2); flags are ``RENAME_NOREPLACE``, ``RENAME_EXCHANGE``, ``RENAME_WHITEOUT``."""
    _check(
        _syscall2(_NR_RENAMEAT2, _int(old_directory), _char(old), _int(new_directory), _char(new), ctypes.c_uint(flags))
    )


def syncfs(fd: int) -> None:
    _check(_syncfs(fd))


def utimens(fd: int, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Times as (seconds, nanoseconds or UTIME_NOW or UTIME_OMIT), of what an O_PATH descriptor stands for."""
    times = struct.pack("qqqq", *atime, *mtime)
    path = b"/proc/self/fd/%d" % fd  # a magic link: it leads to the very file, whatever its kind
    _check(_utimensat(-100, path, times, 0))


def getdents(fd: int, size: int) -> bytes:
    """Raw ``struct linux_dirent64`` records, at most ``size`` bytes; empty at the end."""
    buffer = ctypes.create_string_buffer(size)
    length = _check(_syscall2(_NR_GETDENTS64, _int(fd), buffer, ctypes.c_uint(size)))
    return buffer.raw[:length]  # only now: ``raw`` copies


def file_handle(fd: int) -> bytes:
    """An opaque handle that ``open_handle`` turns into a descriptor again; EOPNOTSUPP where there are none."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    mount_id = ctypes.c_int()
    _check(_name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), AT_EMPTY_PATH))
    return buffer.raw[: 8 + int(struct.unpack_from("I", buffer.raw)[0])]


def open_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open a ``file_handle`` on the file system that ``mount_fd`` (not O_PATH) is on; needs CAP_DAC_READ_SEARCH."""
    return _check(_open_by_handle_at(mount_fd, ctypes.create_string_buffer(handle, len(handle)), flags))


_STATX = struct.Struct("<IIQIIIHHQQQQqIiqIiqIiqIiIIII")


class Statx(NamedTuple):
    """``struct statx``, up to the device numbers."""

    mask: int
    blksize: int
    attributes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    pad: int
    ino: int
    size: int
    blocks: int
    attributes_mask: int
    atime: int
    atimensec: int
    pad1: int
    btime: int
    btimensec: int
    pad2: int
    ctime: int
    ctimensec: int
    pad3: int
    mtime: int
    mtimensec: int
    pad4: int
    rdev_major: int
    rdev_minor: int
    dev_major: int
    dev_minor: int


def statx(fd: int, mask: int = STATX_ALL) -> Statx:
    """statx(2) of what a descriptor stands for."""
    buffer = ctypes.create_string_buffer(256)
    _check(_statx(fd, b"", AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, mask, buffer))
    return Statx(*_STATX.unpack_from(buffer.raw))


def file_system(fd: int) -> str:
    """The name of the file system that a descriptor's file is on; empty if it cannot be told."""
    fields = _mountinfo(fd)
    return fields[fields.index("-") + 1] if fields else ""


def device(fd: int) -> str:
    """The device of the mount that a descriptor's file is on, as ``major:minor``; empty if it cannot be told. Asks no file system."""
    return next(iter(_mountinfo(fd)[2:3]), "")


def _mountinfo(fd: int) -> list[str]:
    """The fields that proc_pid_mountinfo(5) has for the mount that a descriptor's file is on; none if it is not in our namespace."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        mount = next(line.split()[1] for line in file if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo") as file:
        return next((line.split() for line in file if line.split()[0] == mount), [])


def keep_memory() -> None:
    """Have malloc keep and use again blocks of megabytes, which it otherwise maps and unmaps (and the kernel
    clears) each time.
    """
    for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        _libc.mallopt(parameter, 32 << 20)


def setfsuid(uid: int) -> None:
    """The file system user of this *thread*; the call cannot say whether it worked, so it is asked again."""
    _syscall2(_NR_SETFSUID, ctypes.c_uint(uid))
    if _syscall2(_NR_SETFSUID, ctypes.c_uint(0xFFFFFFFF)) != uid:
        raise PermissionError(1, "setfsuid")


def setfsgid(gid: int) -> None:
    """The file system group of this *thread*."""
    _syscall2(_NR_SETFSGID, ctypes.c_uint(gid))
    if _syscall2(_NR_SETFSGID, ctypes.c_uint(0xFFFFFFFF)) != gid:
        raise PermissionError(1, "setfsgid")


def setgroups(groups: tuple[int, ...]) -> None:
    """The supplementary groups of this *thread* (libc's own function changes all threads)."""
    _check(_syscall2(_NR_SETGROUPS, ctypes.c_size_t(len(groups)), (ctypes.c_uint * len(groups))(*groups)))


def keep_capabilities() -> None:
    """From now on this thread's setfsuid leaves its capabilities alone."""
    _check(_prctl(PR_SET_SECUREBITS, _prctl(PR_GET_SECUREBITS, 0, 0, 0, 0) | SECBIT_NO_SETUID_FIXUP, 0, 0, 0))


def own_umask() -> None:
    """From now on this thread has a umask and working directory of its own."""
    _check(_unshare(CLONE_FS))


_CAP_HEADER = struct.pack("Ii", 0x20080522, 0)


def capabilities() -> tuple[int, ...]:
    """This *thread's* sets, as capget(2) gives them: effective, permitted, inheritable, then the upper halves."""
    data = ctypes.create_string_buffer(24)
    _check(_syscall2(_NR_CAPGET, ctypes.create_string_buffer(_CAP_HEADER, 8), data))
    return struct.unpack("6I", data.raw)


def set_capabilities(words: tuple[int, ...]) -> None:
    """Set this *thread's* capabilities, in the form that ``capabilities`` gives."""
    _check(
        _syscall2(
            _NR_CAPSET,
            ctypes.create_string_buffer(_CAP_HEADER, 8),
            ctypes.create_string_buffer(struct.pack("6I", *words), 24),
        )
    )


_FLOCK = struct.Struct("<hhxxxxqqixxxx")


def ofd_lock(fd: int, command: int, kind: int, start: int, length: int) -> tuple[int, int, int, int]:
    """Record lock of an open file description; (type, start, length, pid) as the kernel left them. Not restarted
    by signals.
    """
    buffer = ctypes.create_string_buffer(_FLOCK.pack(kind, 0, start, length, 0), _FLOCK.size)
    _check(_fcntl(fd, command, ctypes.addressof(buffer)))
    found, _, begin, size, pid = _FLOCK.unpack(buffer.raw)
    return found, begin, size, pid


def flock(fd: int, operation: int) -> None:
    """flock(2), not restarted by signals."""
    _check(_flock(fd, operation))


def inotify_init() -> int:
    """A non-blocking inotify descriptor."""
    return _check(_inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add(fd: int, path: bytes, mask: int) -> int:
    return _check(_inotify_add_watch(fd, path, mask))


def inotify_remove(fd: int, watch: int) -> None:
    _check(_inotify_rm_watch(fd, watch))
