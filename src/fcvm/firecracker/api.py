"""Firecracker's HTTP API over its Unix socket, written by hand: one send and one receive per call.

Measured (docs/performance.md): 31 us a call, against 59 to 82 us with ``http.client`` and 5.6 ms with curl; resuming
a clone is one such call. Requests and fields are those of Firecracker's API specification
(``src/firecracker/swagger/firecracker.yaml``, 1.12).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from fcvm.errors import FirecrackerError
from fcvm.linux import sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Api:
    """A kept-alive connection to one Firecracker's API socket.

    Calls raise ``FirecrackerError`` with Firecracker's own fault message, or when the VMM has died. One that was not
    answered in time ends the connection, or its answer would be taken for that of the next; that makes another.
    """

    def __init__(self, path: Path, *, timeout: float = 60.0) -> None:
        """Connect to the socket at ``path``; ``timeout`` in seconds is for every single call."""
        self.path = path
        self.timeout = timeout
        self.socket = sockets.connect(path, timeout=timeout)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def get(self, path: str) -> Any:
        """GET ``path``; returns the decoded JSON."""
        return self.call("GET", path)

    def put(self, path: str, body: dict[str, Any], *, timeout: float | None = None) -> Any:
        """PUT ``body`` to ``path``; ``timeout`` in seconds if it may take longer than other calls."""
        return self.call("PUT", path, body, timeout=timeout)

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """PATCH ``path`` with ``body``."""
        return self.call("PATCH", path, body)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None = None) -> Any:
        """One request and its answer."""
        self.send(method, path, body)
        if timeout is None:
            return self.receive(f"{method} {path}")
        self.socket.settimeout(timeout)
        try:
            return self.receive(f"{method} {path}")
        finally:
            with contextlib.suppress(OSError):  # there is no connection any more
                self.socket.settimeout(self.timeout)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Only send: a pool resumes many clones by sending to all of them before it waits for the first."""
        try:
            self.socket.sendall(encode(method, path, body))
        except OSError as error:
            raise FirecrackerError(f"Firecracker does not answer {method} {path}: {error}.") from error

    def receive(self, what: str = "the request") -> Any:
        """The answer to the oldest request sent: decoded JSON, or None for an empty one."""
        buffer = b""
        try:
            while b"\r\n\r\n" not in buffer:
                buffer += self._more()
            head, _, rest = buffer.partition(b"\r\n\r\n")
            length = content_length(head)
            while len(rest) < length:
                rest += self._more()
        except TimeoutError as error:
            limit = self.socket.gettimeout()
            self._reconnect()
            raise FirecrackerError(f"Firecracker did not answer {what} within {limit:g} seconds.") from error
        except OSError as error:
            raise FirecrackerError(f"Firecracker died during {what}: {error}.") from error
        status = int(head[9:12])
        answer = json.loads(rest) if rest else None
        if status >= 300:
            fault = (answer or {}).get("fault_message", f"HTTP status {status}")
            raise FirecrackerError(f"Firecracker refused {what}: {fault}")
        return answer

    def _reconnect(self) -> None:
        """Have a connection without the answer that is still to come; if there can be none, calls fail from now on."""
        self.socket.close()
        with contextlib.suppress(OSError):
            self.socket = sockets.connect(self.path, timeout=self.timeout)

    def _more(self) -> bytes:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionResetError("it closed the connection")
        return data


def encode(method: str, path: str, body: dict[str, Any] | None) -> bytes:
    """The bytes of one HTTP/1.1 request."""
    if body is None:
        return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\r\n".encode()
    payload = json.dumps(body, separators=(",", ":")).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(payload) + payload


def content_length(head: bytes) -> int:
    """The Content-Length of a response head; 0 when there is none."""
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
