"""Signals that ask a command to end, or that it passes on."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from _thread import allocate_lock, get_ident, start_new_thread  # threading is slow to import
from collections.abc import Callable, Iterator, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)  # to the container
WAKE = signal.SIGURG  # by default the kernel ignores it, and Python calls handlers of lower numbers before its handler
NUDGES = 0.01  # seconds between two


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
        with _delivered() if before else contextlib.nullcontext():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_woken = 0


def _on_wake(number: int, frame: object) -> None:
    global _woken
    _woken += 1


@contextlib.contextmanager
def _delivered() -> Iterator[None]:
    """Have handlers called soon inside the block, whatever the main thread, which is ours, waits for.

    Python notes a signal, and calls the handler when the main thread comes to its next instruction. If a signal comes just
    before a system call blocks (on a busy host a process is often stopped there), or if the kernel gives it to another thread,
    that is when the call returns: perhaps never. So a thread that hears of each signal interrupts the call, again and again
    until a handler has been called.
    """
    if signal.getsignal(WAKE) is _on_wake:  # a block around us does so
        yield
        return
    main, gone = get_ident(), allocate_lock()
    ended: list[bool] = []
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(write, False)

    def nudge() -> None:
        while (heard := os.read(read, 64)) and not ended:
            woken = _woken
            while set(heard) != {WAKE} and woken == _woken and not ended:
                signal.pthread_kill(main, WAKE)
                time.sleep(NUDGES)
        gone.release()

    handler = signal.signal(WAKE, _on_wake)
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        with contextlib.suppress(RuntimeError):  # no threads left: then it is as Python has it
            start_new_thread(nudge, ())
            gone.acquire()
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        ended.append(True)
        with contextlib.suppress(BlockingIOError):  # full: it has been heard
            os.write(write, bytes(1))  # to close it would not do: a child may have it as well
        os.close(write)
        gone.acquire()  # it reads no more
        os.close(read)
        signal.signal(WAKE, handler)
