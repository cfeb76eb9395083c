"""Sessions with the agent of a VM; small, since `fcvm exec` counts milliseconds."""

from __future__ import annotations

import os

from fcvm.agent import opening, vsock
from fcvm.errors import AgentError
from fcvm.vm import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from _socket import socket
    from collections.abc import Sequence
    from typing import Any

    from fcvm.agent import session
else:
    import _signal as signal


def stream(
    directory: str | os.PathLike[str],
    request: opening.Request | session.Resume,
    *,
    terminal: int | None = None,
    signals: Sequence[int] = (),
    **options: Any,
) -> session.Exit:
    """Run a session in the VM of ``directory`` to its end, over any snapshot that is taken meanwhile.

    Arguments and errors are those of ``fcvm.agent.session.stream``. A process without a terminal is asked for before that is imported; signals that
    are to be sent on wait until it can do so.
    """
    uds = os.path.join(directory, paths.VSOCK)

    def connect() -> socket:
        return vsock.connect(uds, paths.SESSION_PORT, paths.SESSION_TIMEOUT)

    options.update(terminal=terminal, signals=signals, resets=vsock.Resets(uds))
    if terminal is None and isinstance(request, opening.Request):
        connection = connect()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            opening.send(connection, request)
            from fcvm.agent import session

            return session.stream(connect, request, opened=connection, mask=mask, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    from fcvm.agent import session

    return session.stream(connect, request, **options)


def output(directory: str | os.PathLike[str], request: opening.Request, *, most: int = 1 << 20) -> tuple[session.Exit, bytes]:
    """Run a session whose process prints ``most`` bytes at most: how it ended, and all that it has printed.

    Raises:
        AgentError, OSError: as ``stream``; or it prints more.
    """
    found = bytearray()

    def add(_: str, data: bytes) -> None:
        found.extend(data)
        if len(found) > most:
            raise AgentError(f"The guest's answer is longer than {most} bytes.")

    return stream(directory, request, stdin=None, on_output=add), bytes(found)
