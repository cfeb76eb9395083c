"""A log file of limited size."""

import contextlib
import os
from pathlib import Path


class RotatingFile:
    """Appends to ``path``; at ``limit`` bytes the file becomes ``<path>.1`` (replacing the one before) and starts anew.

    So between ``limit`` and twice ``limit`` bytes of the newest content are kept. One writer; readers may follow the
    file and reopen it when its inode changes.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.fd = -1
        self._open()

    def _open(self) -> None:
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self.fd).st_size

    def write(self, data: bytes) -> None:
        """Append ``data``, all of it or nothing: a full disk loses it rather than the run (the log is a copy)."""
        try:
            if self.size and self.size + len(data) > self.limit:
                self._rotate()
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self.fd, rest) :]
            self.size += len(data)
        except OSError:
            with contextlib.suppress(OSError):  # half a record would garble all those behind it
                os.ftruncate(self.fd, self.size)

    def _rotate(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
        full = self.fd
        self._open()  # raises before anything has changed
        os.close(full)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
