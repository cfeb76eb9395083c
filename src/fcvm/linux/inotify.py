"""Wait for a file to appear, by inotify(7)."""

import ctypes
import os
import select
from pathlib import Path

IN_CREATE = 0x100  # <linux/inotify.h>
IN_MOVED_TO = 0x80
IN_CLOEXEC = os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class AppearanceOf:
    """Watches a directory from construction on, so that a file made between two looks is not missed.

    ``fd`` becomes readable when something was made in the directory; ``wait`` looks whether ``path`` is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = _libc.inotify_init1(IN_CLOEXEC)
        if self.fd < 0 or _libc.inotify_add_watch(self.fd, os.fsencode(path.parent), IN_CREATE | IN_MOVED_TO) < 0:
            raise OSError(ctypes.get_errno(), f"inotify on {path.parent}: {os.strerror(ctypes.get_errno())}")

    def wait(self, *, timeout: float, unless: int) -> bool:
        """True once ``path`` exists; False when ``timeout`` seconds passed or the descriptor ``unless`` is readable."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(unless, select.POLLIN)
        while not self.path.exists():
            ready = dict(poll.poll(timeout * 1000))
            if not ready or unless in ready:
                return False
            os.read(self.fd, 4096)
        return True

    def __enter__(self) -> "AppearanceOf":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
