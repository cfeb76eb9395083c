"""userfaultfd(2) from the side that answers page faults; the descriptor itself comes from the process whose memory it is.

Numbers and layouts: <linux/userfaultfd.h>. One ioctl is about a microsecond here, so the structures are packed into
buffers that live as long as the object.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

UFFDIO_COPY = 0xC028AA03  # struct uffdio_copy: dst, src, len, mode, copy
UFFDIO_ZEROPAGE = 0xC020AA04  # struct uffdio_zeropage: start, len, mode, zeropage
UFFDIO_WAKE = 0x8010AA02  # struct uffdio_range: start, len

EVENT_PAGEFAULT = 0x12
EVENT_REMOVE = 0x15

_COPY = struct.Struct("=QQQQq")
_ZEROPAGE = struct.Struct("=QQQq")
_RANGE = struct.Struct("=QQ")
_RESULT = struct.Struct("=q")
_MESSAGE = struct.Struct("=BxHIQQQ")  # struct uffd_msg: event, then by event: flags, address | start, end
BATCH = 64 * _MESSAGE.size  # bytes read at once


class Userfaultfd:
    """The faults of one process's memory; owns the descriptor ``fd``, which is made non-blocking."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._copy = bytearray(_COPY.size)
        self._zeropage = bytearray(_ZEROPAGE.size)

    def fileno(self) -> int:
        return self.fd

    def events(self) -> Iterator[tuple[int, int, int]]:
        """What has happened, without waiting: ``(EVENT_PAGEFAULT, flags, address)``, ``(EVENT_REMOVE, start, end)``."""
        try:
            data = os.read(self.fd, BATCH)
        except BlockingIOError:
            return
        for event, _, _, first, second, _ in _MESSAGE.iter_unpack(data):
            yield event, first, second

    def copy(self, destination: int, source: int, length: int) -> int:
        """Fill missing pages at ``destination`` from our address ``source`` and wake who waits for them.

        Returns the bytes done, which may be less than ``length``.

        Raises:
            OSError: EEXIST (the first page is there), EAGAIN (an event must be read first), ESRCH (the process is
                gone), EFAULT (the source cannot be read).
        """
        _COPY.pack_into(self._copy, 0, destination, source, length, 0, 0)
        return _do(self.fd, UFFDIO_COPY, self._copy, 32, length)

    def zero(self, destination: int, length: int) -> int:
        """Fill missing pages with zeros (one shared page until they are written); otherwise as ``copy``."""
        _ZEROPAGE.pack_into(self._zeropage, 0, destination, length, 0, 0)
        return _do(self.fd, UFFDIO_ZEROPAGE, self._zeropage, 24, length)

    def wake(self, start: int, length: int) -> None:
        """Let whoever waits for a page in the range try again."""
        fcntl.ioctl(self.fd, UFFDIO_WAKE, _RANGE.pack(start, length))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _do(fd: int, request: int, buffer: bytearray, result: int, length: int) -> int:
    """The ioctl; its structure ends, at offset ``result``, with the bytes done or a negative errno."""
    try:
        fcntl.ioctl(fd, request, buffer, True)
    except OSError as error:
        done: int = _RESULT.unpack_from(buffer, result)[0]
        if error.errno == errno.EAGAIN and done > 0:  # stopped half-way
            return done
        raise
    return length
