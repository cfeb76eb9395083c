"""What a session asks for and what it serves: the seam between sessions and whatever starts processes for them."""

from collections.abc import Callable
from typing import Any, Protocol

from fc_agent.structs import Struct, field, fields


class LaunchError(Exception):
    """The process could not be started; ``code`` is what a shell would say: 125, 126 or 127."""

    def __init__(self, message: str, code: int = 125) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Request(Struct):
    """What a client asks for. ``target`` and ``user`` are the launcher's to understand; sizes are in characters.

    ``pipes``: those of ``stdin``, ``stdout`` and ``stderr`` that are no terminal though there is one (the machine's commands).
    """

    target: str = "container"
    argv: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    cwd: str | None = None
    user: str | None = None
    tty: bool = False
    stdin: bool = False
    rows: int = 24
    columns: int = 80
    grace: float | None = None
    privileged: bool = False
    pipes: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> "Request":
        """The request in an opening line; unknown keys are ignored, so that a newer client can talk to us.

        Raises:
            LaunchError: a value has the wrong type.
        """
        known = {name: value for name, value in message.items() if name in fields(cls)}
        request = cls(**known)
        texts = [request.target, *request.argv] if isinstance(request.argv, list) else [None]
        texts += [*request.env.keys(), *request.env.values()] if isinstance(request.env, dict) else [None]
        texts += [text for text in (request.cwd, request.user) if text is not None]
        texts += request.pipes if isinstance(request.pipes, list) else [None]
        numbers = [request.rows, request.columns, request.grace or 0]
        if not all(isinstance(t, str) and "\0" not in t for t in texts) or not all(
            isinstance(n, int | float) and 0 <= n < 1 << 31 for n in numbers
        ):
            raise LaunchError("The request is malformed.")
        return request


class Process(Protocol):
    """What a session serves. It owns its descriptors; all of them are non-blocking."""

    pid: int
    ended: int  # a descriptor that becomes readable when the process is over (a pidfd, an eventfd)
    outputs: dict[int, Callable[[], list[tuple[int, bytes]] | None]]
    """By descriptor: reads once and returns ``(STDOUT or STDERR, bytes)``, nothing if there is nothing, None at the end."""
    stdin: int | None  # to poll before ``write``

    def write(self, data: memoryview) -> int:
        """Write to stdin; BlockingIOError if it takes nothing now, another OSError if it is closed."""

    def close_stdin(self) -> None:
        """The end of stdin."""

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has a new size."""

    def signal(self, number: int) -> None:
        """Send a signal; a process that is over is no error."""

    def kill(self) -> None:
        """SIGKILL for everything that was started, as far as it can be told."""

    def exit(self) -> tuple[int, str | None]:
        """The exit code and a message for the user if there is one; called once, after ``ended``."""

    def close(self) -> None:
        """Release the descriptors."""


Launcher = Callable[[Request], Process]
