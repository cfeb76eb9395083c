"""Connections into a guest over Firecracker's vsock device (its docs/vsock.md, "Host-Initiated Connections").

The device is a Unix socket on the host. A connection to a guest's port starts with the line ``CONNECT <port>``, answered by
``OK <host port>``; where nobody listens in the guest, Firecracker just closes it. It also does so when the guest has not
accepted within two seconds, which happens to one that is starved of its CPUs: then we ask again.

When Firecracker takes a snapshot, the guest's end of every connection is reset, and ours is not: it hears of that only if it
sends something. So whoever takes a snapshot says so, by touching the socket (``announce_reset``), to all who look (``Resets``).
"""

import _socket  # what `socket` is made of, without its enums of all constants: 4 of the 32 ms that `fcvm exec` took beyond a bare Python
import os
import time

from fcvm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.linux.inotify import Watch

REQUEST_TIME = 2.0  # seconds that Firecracker gives a guest to accept (CONN_REQUEST_TIMEOUT_MS of its vsock device)
MAX_SUN_PATH = 107  # <linux/un.h>, less the final NUL


def connect(uds: str | os.PathLike[str], port: int, timeout: float) -> _socket.socket:
    """A blocking stream socket to ``port`` in the guest whose vsock device is ``uds``.

    Arguments:
        timeout: seconds; a guest whose kernel has no driver yet (or that is paused) never answers.

    Raises:
        AgentError: nobody listens there, or no answer came in time.
        FileNotFoundError, ConnectionRefusedError: Firecracker is gone.
    """
    end = time.monotonic() + timeout
    while True:
        began = time.monotonic()
        try:
            return _connect(uds, port, end)
        except TimeoutError as error:
            raise AgentError(f"The guest did not answer on port {port} within {timeout:g} seconds.") from error
        except AgentError:
            if time.monotonic() - began < 0.9 * REQUEST_TIME:
                raise


def _connect(uds: str | os.PathLike[str], port: int, end: float) -> _socket.socket:
    """One attempt, until ``end``; raises TimeoutError then."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(max(0.001, end - time.monotonic()))
        connect_path(connection, uds)
        connection.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):  # byte by byte: what follows belongs to the caller
            connection.settimeout(max(0.001, end - time.monotonic()))
            byte = connection.recv(1)
            if not byte or len(answer) > 32:
                raise AgentError(f"Nobody listens on port {port} in the guest.")
            answer += byte
        if not answer.startswith(b"OK "):
            raise AgentError(f"The VM's vsock device answered {answer!r} to CONNECT {port}.")
        connection.settimeout(None)
        return connection
    except (ConnectionResetError, BrokenPipeError) as error:
        connection.close()
        raise AgentError(f"The VM closed the connection to port {port} in the guest.") from error
    except BaseException:
        connection.close()
        raise


def announce_reset(uds: str | os.PathLike[str]) -> None:
    """Say that all connections to the guest whose vsock device is ``uds`` were reset; a device that has gone does not matter."""
    try:
        os.utime(uds)
    except OSError:
        pass


class Resets:
    """Whether the connections to a guest were reset, since this was made or it was last asked.

    Attributes:
        fd: readable when they were; None until ``watch``, which takes milliseconds to import what it needs.
    """

    def __init__(self, uds: str | os.PathLike[str]) -> None:
        self._uds = uds
        self._stamp = self._touched()
        self._watch: Watch | None = None
        self.fd: int | None = None

    def watch(self) -> None:
        """Have ``fd`` from now on; where there can be none, resets are only seen when they are asked for."""
        from fcvm.linux import inotify

        try:
            self._watch = inotify.Watch(self._uds, inotify.IN_ATTRIB)
            self.fd = self._watch.fd
        except OSError:
            pass

    def happened(self) -> bool:
        """Whether they were."""
        if self._watch is not None:
            self._watch.wait(timeout=0)
        before, self._stamp = self._stamp, self._touched()
        return before != self._stamp

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()

    def _touched(self) -> int:
        try:
            return os.stat(self._uds).st_mtime_ns
        except OSError:
            return 0


def connect_path(connection: _socket.socket, path: str | os.PathLike[str]) -> None:
    """Connect to a Unix socket, however long its path is."""
    if len(os.fsencode(path)) <= MAX_SUN_PATH:
        connection.connect(os.fspath(path))
        return
    parent, name = os.path.split(os.fspath(path))
    directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{name}")
    finally:
        os.close(directory)
