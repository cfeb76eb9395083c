"""Memory by address: a file mapped for system calls that take pointers, and memory that processes share."""

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_FAILED = ctypes.c_void_p(-1).value


class ReadOnly:
    """The whole of the file ``fd``, mapped shared and read-only at ``address``. Raises OSError."""

    def __init__(self, fd: int) -> None:
        self.size = os.fstat(fd).st_size
        address = _libc.mmap(None, self.size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self.address: int = address

    def close(self) -> None:
        if self.address:
            _libc.munmap(self.address, self.size)
            self.address = 0


def shared(size: int, name: str) -> int:
    """A descriptor of ``size`` bytes of memory, zeros, to be mapped by several processes (memfd_create(2))."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
