"""Firecrackers whose owner was killed before it had them on its leash (linux/leash.py)."""

import contextlib
import os
import signal
from pathlib import Path


def end(directory: Path) -> None:
    """Kill the Firecrackers that work in ``directory``, a dead VM's. Looks at every process, so for rare occasions."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if process.joinpath("cwd").samefile(directory) and b"\0--api-sock\0" in process.joinpath("cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
