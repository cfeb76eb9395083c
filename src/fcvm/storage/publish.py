"""Files and directories that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fcvm.storage.layout import locked, remove


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Build ``path`` (a file or a directory) under a lock and rename it in when the block ends well.

    Yields a temporary path beside it for the caller to create. If ``path`` appears while we wait for the lock, the
    caller should look again inside the block and return early: a block that creates nothing publishes nothing.
    """
    temporary = path.with_name(path.name + ".creating")
    with locked(path.with_name(f".{path.name}.lock")):
        remove(temporary)
        try:
            yield temporary
            if temporary.exists():
                os.replace(temporary, path)
        finally:
            remove(temporary)
