"""Unix sockets at paths of any length.

``sun_path`` holds 108 bytes (unix(7)), a data directory deep in a home or a test's temporary directory has more. Both
functions reach the socket through a descriptor of its directory, ``/proc/self/fd/N/name``, which is always short.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def short_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name for ``path`` that fits ``sun_path``, valid inside the block."""
    if len(os.fsencode(path)) < 100:
        yield os.fspath(path)
        return
    parent, name = os.path.split(path)
    directory = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{name}"
    finally:
        os.close(directory)


def connect(path: str | os.PathLike[str], *, timeout: float | None = None) -> socket.socket:
    """A stream socket connected to ``path``; ``timeout`` in seconds stays set on it. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        with short_path(path) as name:
            sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(path: str | os.PathLike[str], *, backlog: int = 128, mode: int = 0o600) -> socket.socket:
    """A listening stream socket at ``path``; a stale socket there is replaced. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with short_path(path) as name:
            sock.bind(name)
            os.chmod(path, mode)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
