"""The user's terminal: its size, and raw mode that is undone whatever happens."""

import contextlib
import fcntl
import os
import signal
import struct
import termios
import tty
from collections.abc import Iterator
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


def size(descriptor: int) -> tuple[int, int]:
    """``(rows, columns)`` of a terminal; 24 by 80 if it does not know, or is none."""
    try:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(descriptor, termios.TIOCGWINSZ, bytes(8)))
    except OSError:
        rows, columns = 0, 0
    return rows or 24, columns or 80


def ours() -> int | None:
    """The first of our standard streams that is a terminal."""
    return next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)


@contextlib.contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Hand every key to the reader of ``descriptor`` while the block runs, then restore the terminal.

    It is also restored before a signal ends the process, as far as the signal can be caught and nobody else catches it.
    Something that is not a terminal is left alone.
    """
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)

    def restore() -> None:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    def end(number: int, frame: FrameType | None) -> None:
        restore()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.Signals(number))

    caught = []
    try:
        # Outside the main thread Python refuses handlers: then the main thread is the one that must not just die.
        with contextlib.suppress(ValueError):
            for number in ENDING:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    caught.append((number, signal.signal(number, end)))
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        restore()
        for number, handler in caught:
            signal.signal(number, handler)
