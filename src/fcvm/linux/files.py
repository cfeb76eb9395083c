"""Copies that share or skip what they can: reflinks (FICLONE) and sparse copies by extents (SEEK_DATA, SEEK_HOLE)."""

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

FICLONE = 0x40049409  # <linux/fs.h>: _IOW(0x94, 9, int)

# What FICLONE says where it cannot: another file system, one without reflinks, a kernel without the ioctl.
_NO_REFLINK = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)


def reflink(source: int, destination: int) -> bool:
    """Make file descriptor ``destination`` share all blocks of ``source``; False where the file system cannot."""
    try:
        fcntl.ioctl(destination, FICLONE, source)
    except OSError as error:
        if error.errno in _NO_REFLINK:
            return False
        raise
    return True


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file holds data: start and end offsets, in bytes."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def copy_extents(source: int, destination: int) -> None:
    """Copy the data of descriptor ``source`` to the same offsets of an empty ``destination``, holes stay holes."""
    os.ftruncate(destination, os.fstat(source).st_size)
    for start, end in extents(source):
        _copy_range(source, destination, start, end)


def _copy_range(source: int, destination: int, start: int, end: int) -> None:
    while start < end:
        try:
            copied = os.copy_file_range(source, destination, end - start, start, start)
        except OSError as error:
            if error.errno not in _NO_REFLINK:
                raise
            copied = os.pwrite(destination, os.pread(source, min(end - start, 1 << 20), start), start)
        if copied == 0:  # the source was truncated meanwhile
            return
        start += copied


def clone(source: Path, destination: Path, *, mode: int = 0o600) -> bool:
    """Make ``destination`` (which must not exist) a copy of ``source``: by reflink, or by extents.

    Returns whether it was a reflink. Nothing is left at ``destination`` after an error. Raises OSError.
    """
    read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            shared = reflink(read, write)
            if not shared:
                copy_extents(read, write)
            return shared
        except BaseException:
            destination.unlink(missing_ok=True)
            raise
        finally:
            os.close(write)
    finally:
        os.close(read)
