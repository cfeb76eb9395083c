"""The container's output: kept in the VM's log, and handed to our own stdout and stderr.

The log is a sequence of records, ``>QBI`` (nanoseconds since the epoch, stream 1 or 2, length) and the bytes. Unlike a
line-oriented format it is exact for any bytes, and writing it costs one call a chunk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fcvm.linux import inotify
from fcvm.storage.rotating import RotatingFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import BinaryIO, Literal

    Stream = Literal["stdout", "stderr"]

LOG = "container.log"
CLOSED = "container.log.closed"  # made when the container has ended, for those who follow a kept VM's log
RECORD = struct.Struct(">QBI")
MAX_CHUNK = 16 << 20

_CHANGES = inotify.IN_MODIFY | inotify.IN_CREATE | inotify.IN_DELETE | inotify.IN_MOVED_TO | inotify.IN_DELETE_SELF
_NUMBER: dict[str, int] = {"stdout": 1, "stderr": 2}


class Marks:
    """``[ctr:out]`` or ``[ctr:err]`` at the beginning of every line of some streams."""

    def __init__(self, wanted: bool | None, fds: Sequence[int] = (1, 2)) -> None:
        """
        Arguments:
            wanted: whether they are; None: on what is a terminal.
            fds: where stdout and stderr go.
        """
        self.streams = [
            stream
            for stream, fd in zip(_NUMBER, fds, strict=False)
            if wanted or (wanted is None and os.isatty(fd))
        ]
        self.one_place = len(self.streams) == 2 and os.path.samestat(*map(os.fstat, fds))
        self.line_open: dict[str, bool] = {"stdout": False, "stderr": False}

    def put(self, stream: str, data: bytes) -> bytes:
        """``data``, which ``stream`` goes on with, as it is to be shown."""
        if stream not in self.streams:
            return data
        mark = b"[ctr:out] " if stream == "stdout" else b"[ctr:err] "
        start = b"" if self.line_open[stream] else mark
        other = "stderr" if stream == "stdout" else "stdout"
        if self.one_place and self.line_open[other]:  # both on one terminal: no line is shared
            start = b"\n" + start
            self.line_open[other] = False
        self.line_open[stream] = not data.endswith(b"\n")
        body, end = (data, b"") if self.line_open[stream] else (data[:-1], b"\n")
        return start + body.replace(b"\n", b"\n" + mark) + end

    def unfinished(self) -> list[str]:
        """The streams that are within a line behind a mark, which the caller ends."""
        found = [stream for stream, is_open in self.line_open.items() if is_open]
        self.line_open.update(dict.fromkeys(found, False))
        return found


class Output:
    """Takes the container's output chunk by chunk; ``write`` blocks while our own reader is slow.

    Attributes:
        closed: our reader has gone (``write`` raised BrokenPipeError); what comes later is only logged.
        chunks: how many have been written.
    """

    def __init__(
        self, log: Path, limit: int, *, show: bool, prefix: bool | None, on_first: Callable[[], None] = lambda: None
    ) -> None:
        """Keep between ``limit`` and twice ``limit`` bytes in ``log``; with ``show`` write to our own stdout and stderr.

        Arguments:
            prefix: as ``wanted`` of ``Marks``.
            on_first: called before the first chunk is handed on.
        """
        self.log = RotatingFile(log, limit)
        self.show = show
        self.marks = Marks(prefix)
        self.closed = False
        self.begun = False
        self.on_first = on_first
        self.chunks = 0
        self.lock = threading.Lock()  # of the log and its count of chunks

    def write(self, stream: str, data: bytes) -> None:
        """One chunk of ``stream``. Raises BrokenPipeError, once, if our reader has gone."""
        if not self.begun:
            self.begun = True
            self.on_first()
        with self.lock:
            self.log.write(packed(time.time_ns(), stream, data))
            self.chunks += 1
        if self.show and not self.closed:
            try:
                write_all(_NUMBER[stream], self.marks.put(stream, data))
            except BrokenPipeError:
                self.closed = True
                raise

    def kept(self) -> tuple[int, list[tuple[int, Stream, bytes]]]:
        """How many chunks have been written, and the newest of them: all that the log still holds."""
        with self.lock:
            return self.chunks, list(read_log(self.log.path.parent))

    def end_lines(self, *, wait: bool = True) -> None:
        """End lines left open behind a mark: as ``write`` it blocks while our own reader is slow, unless it is not to ``wait``."""
        for stream in self.marks.unfinished() if self.show and not self.closed else ():
            with contextlib.suppress(OSError):  # our reader has gone
                if wait or select.select([], [_NUMBER[stream]], [], 0)[1]:
                    os.write(_NUMBER[stream], b"\n")

    def close(self) -> None:
        """End lines left open behind a mark, if our reader takes that now, and the log."""
        self.end_lines(wait=False)
        self.log.close()


def packed(when: int, stream: str, data: bytes) -> bytes:
    """A chunk as the log has it; ``when`` in nanoseconds since the epoch."""
    return RECORD.pack(when, _NUMBER[stream], len(data)) + data


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` to a descriptor, even if somebody who shares it has made it non-blocking."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])


def write_while(fd: int, data: bytes, peer: socket.socket) -> None:
    """As ``write_all``, but given up with BrokenPipeError when ``peer`` hangs up, or is shut down for reading by us.

    The descriptor is another's, so it cannot be made non-blocking. A single write can be that to a pipe (since Linux 6.4);
    elsewhere so little is written at a time that whatever has any space takes it at once (PIPE_BUF, pipe(7)).
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    poll.register(peer, select.POLLRDHUP)
    view = memoryview(data)
    while view:
        if any(ready == peer.fileno() for ready, _ in poll.poll()):
            raise BrokenPipeError(errno.EPIPE, "whoever wanted it has gone")
        try:
            view = view[os.pwritev(fd, [view], -1, os.RWF_NOWAIT) :]
        except OSError:
            with contextlib.suppress(BlockingIOError):
                view = view[os.write(fd, view[: select.PIPE_BUF]) :]


def read_log(directory: Path) -> Iterator[tuple[int, Stream, bytes]]:
    """Every record of a VM's log so far: (nanoseconds, stream, bytes), the oldest first."""
    for path in (directory / f"{LOG}.1", directory / LOG):
        try:
            with open(path, "rb") as file:
                yield from records(file.fileno())
        except FileNotFoundError:
            continue


def follow_log(directory: Path) -> Iterator[tuple[int, Stream, bytes]]:
    """Every record so far and then each new one, until the log is closed for good or removed with its VM.

    A rotation while we are behind loses what was rotated away twice, as it does for `tail -F`.
    """
    with inotify.Watch(directory, _CHANGES) as watch:
        with contextlib.suppress(FileNotFoundError), open(directory / f"{LOG}.1", "rb") as old:
            yield from records(old.fileno())
        while (file := _opened(directory / LOG)) is None:  # it is being rotated, or the VM has only just begun
            if _ended(directory):
                return
            watch.wait(timeout=5.0)
        try:
            while True:
                ended = _ended(directory)  # before we look for the last records
                yield from records(file.fileno())
                if _inode(directory / LOG) in (os.fstat(file.fileno()).st_ino, None):
                    if ended:
                        return
                    watch.wait(timeout=5.0)
                    continue
                yield from records(file.fileno())  # written between our last look and the rotation
                with contextlib.suppress(FileNotFoundError):  # it is being rotated: look again
                    file = _successor(directory, file)
        finally:
            file.close()


def _opened(path: Path) -> BinaryIO | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _ended(directory: Path) -> bool:
    """Whether nothing more will be written there."""
    return not directory.exists() or (directory / CLOSED).exists()


def _successor(directory: Path, file: BinaryIO) -> BinaryIO:
    """The file that came after ``file``, which is closed; the oldest that is there, after more than one rotation.

    Raises:
        FileNotFoundError: there is none at this moment.
    """
    following = open(directory / LOG, "rb")  # noqa: SIM115
    known = [os.fstat(f.fileno()).st_ino for f in (file, following)]
    if _inode(directory / f"{LOG}.1") not in (*known, None):  # a whole file lies between the two
        following.close()
        following = open(directory / f"{LOG}.1", "rb")  # noqa: SIM115
    file.close()
    return following


def _inode(path: Path) -> int | None:
    """Which file has this name now; None if none has, as for a moment in a rotation."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def records(fd: int) -> Iterator[tuple[int, Stream, bytes]]:
    """Whole records from the descriptor's position on; a half-written one is left for the next call."""
    while True:
        position = os.lseek(fd, 0, os.SEEK_CUR)
        head = os.read(fd, RECORD.size)
        if len(head) == RECORD.size:
            when, number, length = RECORD.unpack(head)
            data = os.read(fd, length) if length <= MAX_CHUNK else b""
            if len(data) == length:
                yield when, "stdout" if number == 1 else "stderr", data
                continue
        os.lseek(fd, position, os.SEEK_SET)
        return
