"""A process that the kernel kills when we end, however that happens, without anything being done in the child.

``PR_SET_PDEATHSIG`` has to be set by the child itself between fork and exec. Then Python has to fork, which copies our page
tables, where it could vfork: 3 ms against 0.3, more than all that fcvm adds to a clone otherwise. So the child gets
the reading end of a pipe whose writing end only we have, and on it the kernel is told to send SIGKILL to the child when
something happens (fcntl(2), ``O_ASYNC`` and ``F_SETSIG``). What happens is our end: the pipe is closed then.

A child whose parent is killed between its start and ``tie``, a few tenths of a millisecond, is not killed: whoever sweeps
what the parent left has to end it (firecracker/strays.py).
"""

import fcntl
import os
import signal

F_SETSIG = 10  # <asm-generic/fcntl.h>


class Leash:
    """Make it, start the process with ``end`` as a descriptor that it inherits, ``tie`` it, and ``close`` after its end."""

    def __init__(self) -> None:
        self.end, self._held = os.pipe()

    def tie(self, pid: int) -> None:
        """From now on the process ``pid``, our child, is killed when we end or close this."""
        watch(self.end, pid, signal.SIGKILL)
        os.close(self.end)
        self.end = -1

    def close(self) -> None:
        """Let go, which kills a process that still runs; safe to call again."""
        for fd in (self.end, self._held):
            if fd >= 0:
                os.close(fd)
        self.end = self._held = -1


def watch(end: int, pid: int, number: int) -> None:
    """From now on the process ``pid`` is sent the signal ``number`` when the other end of the pipe ``end`` is closed."""
    fcntl.fcntl(end, F_SETSIG, number)
    fcntl.fcntl(end, fcntl.F_SETOWN, pid)
    fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC)


def forget(end: int) -> None:
    """``watch`` no more."""
    fcntl.fcntl(end, fcntl.F_SETFL, 0)
