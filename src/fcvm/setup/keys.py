"""Names for what setup builds: short hashes of what it was built from, and of what came out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LENGTH = 16  # hexadecimal digits: 64 bits, plenty for a handful of files of one's own making


def of(value: Any) -> str:
    """The key of anything that JSON can hold; the order of a mapping's members does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:LENGTH]


def of_file(path: Path) -> str:
    """The key of a file's content."""
    return sha256(path)[:LENGTH]


def of_status(path: Path) -> str:
    """The key of a file that is not named by its content, and for which reading it all would take too long.

    Written anew it has another time or size, replaced another inode. One that is not there has a key as well: who opens it says so.
    """
    try:
        status = os.stat(path)
    except OSError:
        return of(str(path))
    return of([str(path), status.st_size, status.st_mtime_ns, status.st_ino])


def sha256(path: Path) -> str:
    """The whole SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_sources(directories: Iterable[Path]) -> str:
    """The key of all Python sources under the directories: their names relative to each, and their content."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(directory.rglob("*.py")):
            digest.update(f"{directory.name}/{path.relative_to(directory)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:LENGTH]
