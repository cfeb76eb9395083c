"""How long each stage of a start took: `podman run --timings`."""

import sys
import time

MOST_GUEST_MARKS = 64  # the guest is not trusted: it may tell of stages for ever


class Timings:
    """Marks of stages, in seconds since construction; the guest's own stages carry its uptime."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.marks: list[tuple[str, float]] = []
        self.guest_marks: list[tuple[str, float]] = []

    def mark(self, stage: str) -> None:
        """``stage`` has just ended; a stage counts once."""
        self._add(stage, time.monotonic() - self.begun)

    def guest(self, stage: str, uptime: float) -> None:
        """The guest reached ``stage`` when it had been up for ``uptime`` seconds.

        ``kernel`` becomes a stage of its own: until the agent said hello, the kernel and the initrd had run first.
        """
        marks = dict(self.marks)
        if stage == "kernel" and "agent" in marks and "configure" in marks:
            self._add("kernel", min(marks["configure"] + uptime, marks["agent"]))
        if len(self.guest_marks) < MOST_GUEST_MARKS:
            self.guest_marks.append((stage, uptime))

    def _add(self, stage: str, at: float) -> None:
        if all(name != stage for name, _ in self.marks):
            self.marks.append((stage, at))

    def print(self) -> None:
        """The stages as a table on stderr: what each took, and the sum so far."""
        before = 0.0
        for stage, at in sorted(self.marks, key=lambda mark: mark[1]):
            print(f"{stage:<20} {at - before:8.3f} s {at:9.3f} s", file=sys.stderr)
            before = at
        for stage, uptime in self.guest_marks:
            print(f"  guest: {stage:<20} at {uptime:8.2f} s of its uptime", file=sys.stderr)
