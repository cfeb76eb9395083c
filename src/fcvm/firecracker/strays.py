"""Firecrackers whose owner was killed before it had them on its leash (linux/leash.py)."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def end(directories: Iterable[Path]) -> None:
    """Kill the Firecrackers that work in ``directories``, dead VMs'. Looks at every process, so for rare occasions."""
    theirs = set()
    for directory in directories:
        with suppress(OSError):
            theirs.add(_identity(directory))
    for process in Path("/proc").glob("[0-9]*") if theirs else ():
        with suppress(OSError):  # it has ended, or is another user's
            if _identity(process / "cwd") in theirs:
                _end(process)


def _end(process: Path) -> None:
    """Kill it if it is a Firecracker; what has its number by then may be another process, unless we hold on to it."""
    pidfd = os.pidfd_open(int(process.name))
    try:
        if b"\0--api-sock\0" in (process / "cmdline").read_bytes():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    finally:
        os.close(pidfd)


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
