"""Signals that ask a command to end, or that it passes on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)  # to the container


@contextlib.contextmanager
def handled(numbers: Sequence[int], handle: Callable[[int, Any], object]) -> Iterator[None]:
    """Have ``handle`` called for these signals inside the block; outside of the main thread nothing is handled.

    A SIGHUP that is ignored stays so: whoever uses nohup(1) wants what we run to outlive the terminal.
    """
    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):
            for number in numbers:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
