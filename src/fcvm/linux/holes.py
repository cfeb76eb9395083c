"""Make a file sparse: fallocate(2) with FALLOC_FL_PUNCH_HOLE where it holds nothing but zeros."""

import ctypes
import errno
import os
from pathlib import Path

from fcvm.linux.files import extents

# <linux/falloc.h>
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02

BLOCK = 64 << 10  # bytes; smaller holes are not worth their extents

_libc = ctypes.CDLL(None, use_errno=True)


def punch(fd: int, offset: int, length: int) -> bool:
    """Give the blocks of a range back to the file system; it reads as zeros. False where the file system cannot."""
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code))


def dig(path: Path) -> int:
    """Turn the 64 KiB blocks of ``path`` that are all zeros into holes; returns how many bytes that were."""
    dug = 0
    zeros = bytes(BLOCK)
    with open(path, "r+b", buffering=0) as file:
        fd = file.fileno()
        for start, end in extents(fd):
            for block in range(start, end, BLOCK):
                data = os.pread(fd, min(BLOCK, end - block), block)
                if data == zeros[: len(data)]:
                    if not punch(fd, block, len(data)):
                        return dug
                    dug += len(data)
    return dug
