"""Requests to a VM's supervisor: JSON lines over ``vms/<id>/supervisor.sock``.

Only the supervisor acts on its VM; `fcvm stop` and `fcvm snapshot create` ask it to. One request a connection; the
answer is one line, ``{"ok": true, ...}`` or ``{"error": ..., "hint": ...}``, or the end of the connection when the
supervisor ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

from fcvm.errors import FcvmError, NotFoundError, UsageError
from fcvm.linux import sockets
from fcvm.signals import PASSED_ON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SOCKET = "supervisor.sock"
MAX_LINE = 1 << 20
MAX_TIMEOUT = 1 << 31  # seconds


def call(directory: Path, request: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any] | None:
    """Send ``request`` to the supervisor of the VM in ``directory``; returns its answer, None if it ended instead.

    Raises:
        NotFoundError: nobody listens there. FcvmError: the supervisor refused; or it did not answer in ``timeout`` s.
    """
    try:
        with sockets.connect(directory / SOCKET, timeout=timeout) as connection:
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = read_line(connection)
    except TimeoutError as error:
        raise FcvmError("The VM's supervisor does not answer.", hint="fcvm ls") from error
    except (ConnectionResetError, BrokenPipeError):  # it ended before it had accepted us, or read what we said
        return None
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotFoundError("The VM is not running.", hint="fcvm ls --all") from error
    if not line:
        return None
    answer: dict[str, Any] = json.loads(line)
    if "error" in answer:
        raise FcvmError(answer["error"], hint=answer.get("hint"), exit_code=answer.get("exit_code", 125))
    return answer


def receive(connection: socket.socket) -> dict[str, Any]:
    """The request that opens a connection; raises UsageError if it is none, OSError if it does not come."""
    try:
        request = json.loads(read_line(connection))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The request is malformed: {error}.") from error
    if not isinstance(request, dict) or not is_sound(request):
        raise UsageError("The request is malformed.")
    return request


def is_sound(request: dict[str, Any]) -> bool:
    """Whether what it says of a timeout or a signal can be carried out."""
    timeout = request.get("timeout")
    timed = timeout is None or (isinstance(timeout, int | float) and 0 <= timeout <= MAX_TIMEOUT)
    return timed and (request.get("op") != "signal" or request.get("signal") in PASSED_ON)


def read_line(connection: socket.socket) -> bytes:
    """One line without its end; empty at the end of the connection or when it grows beyond 1 MiB."""
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(65536)
        if not more or len(data) > MAX_LINE:
            return b""
        data += more
    return data[:-1]


def answer(connection: socket.socket, reply: dict[str, Any]) -> None:
    """Send ``reply`` and close; a caller that has gone does not matter."""
    with connection, contextlib.suppress(OSError):
        connection.sendall(json.dumps(reply).encode() + b"\n")


def failure(error: FcvmError) -> dict[str, Any]:
    """The answer for an error."""
    return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
