"""The container's own stdin, stdout and stderr, taken from conmon's attach socket: session ``main``.

conmon (Podman's monitor) offers a SOCK_SEQPACKET socket in the container's directory. Each packet to us is a byte that names
the stream and up to 8 KiB of it; conmon waits while we do not read, and so does the container. What we send is stdin; our
SHUT_WR is its end. The FIFO ``ctl`` takes new terminal sizes. (containers/conmon: src/conn_sock.c, ctr_stdio.c, ctrl.c.)

Connected between the container's creation and its start, so no byte is missed.
"""

import contextlib
import os
import signal
import socket

from fc_agent.channel import STDERR, STDOUT
from fc_agent.process import END_OF_FILE

STREAMS = {2: STDOUT, 3: STDERR}
BATCH = 1 << 18  # bytes read at a time, unless less is there
PACKET = 1 << 15  # more than conmon sends at once, and the most that it takes
RESIZE = 1  # message type of ``ctl``


class Attached:
    """A container as a session serves it; see ``fc_agent.session.Process``. ``finish`` ends it."""

    def __init__(self, directory: str, pid: int, *, tty: bool, stdin: bool) -> None:
        """
        Arguments:
            directory: where conmon keeps the container's sockets.
            pid: the container's first process.
        """
        self.pid = pid
        self.ended = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._tty = tty
        self._exit: tuple[int, str | None] = (125, None)
        self._last = END_OF_FILE
        self._control = -1
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place = os.open(directory, os.O_PATH | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{place}/attach")  # the path itself is too long for a socket's
            if tty:
                self._control = os.open(f"/proc/self/fd/{place}/ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self._socket.close()
            os.close(self.ended)
            raise
        finally:
            os.close(place)
        self._socket.setblocking(False)
        self.stdin = self._socket.fileno() if stdin else None
        self.outputs = {self._socket.fileno(): self._read}
        if not stdin:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def finish(self, code: int, message: str | None = None) -> None:
        """The container has ended."""
        self._exit = (code, message)
        os.eventfd_write(self.ended, 1)

    def _read(self) -> list[tuple[int, bytes]] | None:
        pieces: list[tuple[int, list[bytes]]] = []
        total = 0
        while total < BATCH:
            try:
                packet = self._socket.recv(PACKET)
            except BlockingIOError:
                break
            except OSError:
                packet = b""
            if not packet:
                if not pieces:
                    return None
                break
            total += len(packet)
            kind = STREAMS.get(packet[0], STDOUT)
            if not pieces or pieces[-1][0] != kind:
                pieces.append((kind, []))
            pieces[-1][1].append(packet[1:])
        return [(kind, b"".join(data)) for kind, data in pieces]

    def write(self, data: memoryview) -> int:
        sent = self._socket.send(data[:PACKET])
        self._last = bytes(data[sent - 1 : sent]) or self._last
        return sent

    def close_stdin(self) -> None:
        if self._tty:  # a terminal has no end; Ctrl-D is the reader's
            with contextlib.suppress(OSError):
                self._socket.send(END_OF_FILE if self._last in b"\r\n\x04" else 2 * END_OF_FILE)
        else:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self.stdin = None

    def resize(self, rows: int, columns: int) -> None:
        if self._control >= 0:
            with contextlib.suppress(OSError):
                os.write(self._control, b"%d %d %d\n" % (RESIZE, min(rows, 1000), min(columns, 1000)))

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def exit(self) -> tuple[int, str | None]:
        return self._exit

    def close(self) -> None:
        self._socket.close()
        if self._control >= 0:
            os.close(self._control)
        os.close(self.ended)
