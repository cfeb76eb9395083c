"""Signals that ask a command to end, or that it passes on."""

from __future__ import annotations

import os
import time
from _thread import allocate_lock, get_ident, start_new_thread  # threading is slow to import

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence
    from typing import Any
else:
    import _signal as signal  # what `signal` is made of, without its enums: `enum` takes as long to import as all of `fcvm exec`

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)  # to the container
FORWARDED = (*STOPPING, *PASSED_ON)  # by `fcvm exec` and its like, to the process that they run
WAKE = signal.SIGURG  # by default the kernel ignores it, and Python calls handlers of lower numbers before its handler
NUDGES = 0.01  # seconds between two


class handled:
    """Have ``handle`` called for these signals inside a block; outside of the main thread nothing is handled.

    A SIGHUP that is ignored stays so: whoever uses nohup(1) wants what we run to outlive the terminal.
    """

    def __init__(self, numbers: Sequence[int], handle: Callable[[int, Any], object]) -> None:
        self._numbers = numbers
        self._handle = handle
        self._before: dict[int, Any] = {}
        self._nudge: _Nudge | None = None

    def __enter__(self) -> None:
        try:
            for number in self._numbers:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
            if self._before and signal.getsignal(WAKE) is not _on_wake:  # else a block around us has one
                self._nudge = _Nudge()
        except ValueError:  # not the main thread
            pass
        except BaseException:
            self._restore()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self._nudge is not None:
                self._nudge.end()
        finally:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_woken = 0


def _on_wake(number: int, frame: object) -> None:
    global _woken
    _woken += 1


class _Nudge:
    """Has handlers called soon until ``end``, whatever the main thread, which is ours, waits for.

    Python notes a signal, and calls the handler when the main thread comes to its next instruction. If a signal comes just
    before a system call blocks (on a busy host a process is often stopped there), or if the kernel gives it to another thread,
    that is when the call returns: perhaps never. So a thread that hears of each signal interrupts the call, again and again
    until a handler has been called.
    """

    def __init__(self) -> None:
        self._main, self._gone = get_ident(), allocate_lock()
        self._ended = False
        self._read, self._write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._write, False)
        self._handler = signal.signal(WAKE, _on_wake)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        try:
            start_new_thread(self._run, ())
            self._gone.acquire()
        except RuntimeError:  # no threads left: then it is as Python has it
            pass
        except BaseException:
            self.end()
            raise

    def _run(self) -> None:
        while (heard := os.read(self._read, 64)) and not self._ended:
            woken = _woken
            while set(heard) != {WAKE} and woken == _woken and not self._ended:
                signal.pthread_kill(self._main, WAKE)
                time.sleep(NUDGES)
        self._gone.release()

    def end(self) -> None:
        """Have the thread end, and all as before."""
        signal.set_wakeup_fd(self._wakeup)
        self._ended = True
        try:
            os.write(self._write, bytes(1))  # to close it would not do: a child may have it as well
        except BlockingIOError:  # full: it has been heard
            pass
        os.close(self._write)
        self._gone.acquire()  # it reads no more
        os.close(self._read)
        signal.signal(WAKE, self._handler)
