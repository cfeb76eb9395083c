"""What fcvm says about itself, on stderr: ``FCVM_LOG=debug fcvm ...``.

Not the ``logging`` module: importing it costs as much as a whole ``fcvm ls`` may (10 ms of 30).
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal

    Level = Literal["debug", "info", "warning", "error"]

LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")

_threshold = LEVELS.index("warning")
_start = time.monotonic()


def configure(level: str) -> None:
    """Show messages of ``level``, one of ``LEVELS``, and above."""
    global _threshold
    _threshold = list[str](LEVELS).index(level)


def _say(level: Level, message: str) -> None:
    if LEVELS.index(level) < _threshold:
        return
    stamp = f" {time.monotonic() - _start:8.3f}" if _threshold == 0 else ""
    try:
        print(f"fcvm: {level}{stamp}: {message}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody reads it any more, a full disk: no reason to end a VM
        pass


def debug(message: str) -> None:
    _say("debug", message)


def info(message: str) -> None:
    _say("info", message)


def warning(message: str) -> None:
    _say("warning", message)


def error(message: str) -> None:
    _say("error", message)
