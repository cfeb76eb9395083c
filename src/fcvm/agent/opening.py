"""What opens a session: a request, and its way to the server.

A module of its own, as small as it can be: while the guest starts the process that was asked for, `fcvm exec` imports the rest of
the client (session.py). Under emulation that takes 20 ms of some 280.
"""

from __future__ import annotations

from fc_agent.jsontext import dumps
from fcvm.errors import AgentError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Sequence

LAUNCH_TIME = 600.0  # seconds that it may take to start a process: a hundred at once, in an emulated guest, take minutes


class Request:
    """Start a process; see ``fc_agent.session.Request`` for the meaning of each field."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        target: str = "container",
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: bool = False,
        stdin: bool = False,
        rows: int = 24,
        columns: int = 80,
        grace: float | None = None,
        privileged: bool = False,
        pipes: Sequence[str] = (),
    ) -> None:
        self.argv = list(argv)
        self.target = target
        self.env = dict(env or {})
        self.cwd = cwd
        self.user = user
        self.tty = tty
        self.stdin = stdin
        self.rows = rows
        self.columns = columns
        self.grace = grace
        self.privileged = privileged
        self.pipes = list(pipes)


def send(connection: socket, request: Request) -> None:
    """Have the process started; the answer is to be read from ``connection``, which waits ``LAUNCH_TIME`` for it.

    Raises:
        AgentError: it cannot be said; ``connection`` is closed.
    """
    try:
        connection.settimeout(LAUNCH_TIME)
        connection.sendall(dumps({"open": vars(request)}).encode() + b"\n")
    except OSError as error:
        connection.close()
        raise no_answer(error) from error


def no_answer(error: OSError) -> AgentError:
    """The connection broke; the process may run by then, so nobody asks again."""
    return AgentError(f"The agent did not answer: {error}.")
