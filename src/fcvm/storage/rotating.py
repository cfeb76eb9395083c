"""A log file of limited size."""

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
        """Append ``data``; a full disk loses it rather than the run (the log is a copy)."""
        if self.size and self.size + len(data) > self.limit:
            os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            os.close(self.fd)
            self._open()
        try:
            while data:
                written = os.write(self.fd, data)
                self.size += written
                data = data[written:]
        except OSError:
            pass

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
