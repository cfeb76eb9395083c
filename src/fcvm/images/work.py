"""Scratch directories for fetching and converting images, which do not outlive their process.

Each is locked (flock on the directory itself) while it is in use; whoever makes one first removes those that nobody holds,
so what a kill left behind goes with the next image.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcvm.storage.layout import Layout, locked, remove


@contextmanager
def directory(layout: Layout) -> Iterator[Path]:
    """A new, empty directory on the data directory's file system, removed with all its content at the end."""
    parent = layout.cache / "images"
    with locked(layout.cache / ".images.lock"):
        parent.mkdir(exist_ok=True)
        _sweep(parent)
        path = parent / os.urandom(6).hex()
        path.mkdir(mode=0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        remove(path)
        os.close(fd)


def sweep(layout: Layout) -> None:
    """Remove the directories of processes that are gone."""
    if (layout.cache / "images").exists():
        with locked(layout.cache / ".images.lock"):
            _sweep(layout.cache / "images")


def _sweep(parent: Path) -> None:
    for path in parent.glob("*"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # its owner has just removed it
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
