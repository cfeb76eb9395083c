"""The system calls of the guest agent that Python does not have; each raises ``OSError``."""

import ctypes
import fcntl
import os
import struct
import sys

# <linux/mount.h>
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SHARED = 1, 2, 4, 8, 4096, 1 << 14, 1 << 20

# <linux/random.h>
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207

# <linux/reboot.h>
RB_AUTOBOOT = 0x1234567

# <linux/openat2.h>; the system call has the same number everywhere
NR_OPENAT2 = 437
RESOLVE_IN_ROOT = 0x10

# <sys/inotify.h>
IN_CREATE, IN_MOVED_TO = 0x100, 0x80

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: str | None = None) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return result


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    """mount(2); ``target`` must exist."""
    data = options.encode() or None
    _check(_libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data), target)


def add_entropy(seed: bytes) -> None:
    """Mix secret bytes into the kernel's pool, credited in full, and derive everything from it anew (random(4))."""
    with open("/dev/urandom", "wb", buffering=0) as device:
        if seed:
            fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", len(seed) * 8, len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


def reboot() -> None:
    """Restart the system at once; for Firecracker that is the VM's end."""
    os.sync()
    _check(_libc.reboot(RB_AUTOBOOT))


def open_in_root(root: str, path: str) -> int:
    """Open a file for reading as a process would whose root directory is ``root``: no symbolic link leads out of it."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("QQQ", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, 0, RESOLVE_IN_ROOT)
        call = ctypes.c_long(NR_OPENAT2), ctypes.c_int(directory), path.encode(), how, ctypes.c_size_t(len(how))
        return _check(_libc.syscall(*call), path)
    finally:
        os.close(directory)


def inotify(directory: str, mask: int) -> int:
    """A non-blocking descriptor that is readable when something of ``mask`` has happened in ``directory``."""
    descriptor = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _check(_libc.inotify_add_watch(descriptor, directory.encode(), mask), directory)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def uptime() -> float:
    """Seconds since the kernel started."""
    with open("/proc/uptime") as file:
        return float(file.read().split()[0])


def log(text: str) -> None:
    """A line on the VM's console, where the host keeps it."""
    print(f"fcvm: {text}", file=sys.stderr, flush=True)


def write(path: str, text: str) -> None:
    """Replace a file's content in place: bind mounts of it see the new text."""
    with open(path, "w") as file:
        file.write(text)
