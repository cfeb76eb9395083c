"""Sessions with the agent of a VM; small, since `fcvm exec` counts milliseconds."""

from __future__ import annotations

import os
from functools import partial

from fcvm.agent import session, vsock
from fcvm.errors import AgentError
from fcvm.vm import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def stream(directory: str | os.PathLike[str], request: session.Request | session.Resume, **options: Any) -> session.Exit:
    """Run a session in the VM of ``directory`` to its end, over any snapshot that is taken meanwhile.

    Arguments and errors are those of ``fcvm.agent.session.stream``.
    """
    uds = os.path.join(directory, paths.VSOCK)
    connect = partial(vsock.connect, uds, paths.SESSION_PORT, paths.SESSION_TIMEOUT)
    return session.stream(connect, request, resets=vsock.Resets(uds), **options)


def output(directory: str | os.PathLike[str], request: session.Request, *, most: int = 1 << 20) -> tuple[session.Exit, bytes]:
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
