"""Gives memory back to the host that the machine has used and freed.

Free page reporting would do it at once and at the price of a fault of the host for every page that is used again, which
slows every VM's start. So it is done when the machine has been idle for a while: the balloon takes what is free in the
machine, QEMU returns it to the host, and the balloon is let go again; the machine never has less than its size for long.
"""

import os
import time
from pathlib import Path

from fcvm.machine.qmp import Monitor

IDLE = 0.05  # of one CPU, since the last look
WORTH = 512  # MiB that the host has to gain
RESERVE = 256  # MiB of free memory that the balloon leaves
HOLD = 15.0  # seconds that the balloon gets to fill

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Trim:
    """Looks after the memory of QEMU process ``pid`` with a guest of ``total`` MiB."""

    def __init__(self, monitor: Monitor, pid: int, total: int) -> None:
        self._monitor = monitor
        self._total = total
        self._process = Path(f"/proc/{pid}")
        self._looked = time.monotonic()
        self._used = self._cpu_seconds()
        self._release_at: float | None = None

    def look(self, free: int) -> bool:
        """Start to return memory if the machine, which has ``free`` MiB free, is idle and it is worth it.

        Returns whether it has started; call ``release`` after ``HOLD`` seconds then.
        """
        now, used = time.monotonic(), self._cpu_seconds()
        idle = used - self._used < IDLE * (now - self._looked)
        self._looked, self._used = now, used
        needless = self.resident() - (self._total - free)
        if not idle or needless < WORTH or self._release_at is not None:
            return False
        self._balloon(self._total - free + RESERVE)
        self._release_at = now + HOLD
        return True

    def timeout(self, default: float) -> float:
        """Seconds until ``release`` is due, ``default`` if that is not."""
        return default if self._release_at is None else max(0.0, self._release_at - time.monotonic())

    def release(self) -> bool:
        """Give the machine its whole size again, if that is due; returns whether it was."""
        if self._release_at is None or time.monotonic() < self._release_at:
            return False
        self._balloon(self._total)
        self._release_at = None
        return True

    def resident(self) -> int:
        """MiB of the host's memory that QEMU holds."""
        return int((self._process / "statm").read_text().split()[1]) * _PAGE >> 20

    def _balloon(self, size: int) -> None:
        self._monitor.execute("balloon", value=size << 20)

    def _cpu_seconds(self) -> float:
        # proc_pid_stat(5): the name may hold anything, so count from its closing bracket
        fields = (self._process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS
