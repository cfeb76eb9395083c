"""Sessions with the agent of a VM; small, since `fcvm exec` counts milliseconds."""

from __future__ import annotations

import os
from functools import partial

from fcvm.agent import session, vsock
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
