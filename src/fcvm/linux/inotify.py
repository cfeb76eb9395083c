"""inotify(7): become readable when something happens to a file or in a directory."""

import ctypes
import os
import select

# <linux/inotify.h>
IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Events of ``mask`` at ``path``, from construction on; ``fd`` is readable while there are some. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str], mask: int) -> None:
        self.fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), f"inotify: {os.strerror(ctypes.get_errno())}")
        if _libc.inotify_add_watch(self.fd, os.fsencode(path), mask) < 0:
            code = ctypes.get_errno()
            os.close(self.fd)
            raise OSError(code, f"inotify on {path}: {os.strerror(code)}")

    def wait(self, *, timeout: float | None = None, unless: int | None = None) -> bool:
        """Wait for events and swallow them; False after ``timeout`` seconds or once descriptor ``unless`` is readable."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if unless is not None:
            poll.register(unless, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(None if timeout is None else timeout * 1000)]
        if self.fd not in ready:
            return False
        os.read(self.fd, 65536)
        return True

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
