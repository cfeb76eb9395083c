"""Setting a guest's clock right where messages take long, as Cristian's algorithm does.

The message with a guest's identity carries the time at which it was sent, so the guest's clock is late by the way of the
message: well under a millisecond natively, but a quarter of a second beside other emulated work. Then the guest is
asked for its time, which was true somewhere between question and answer, and is told by how much to move its clock.
Every answer narrows down what may be wrong still, so several that took long know more together than the quickest. What makes messages
slow is mostly what else is starting, and questions add to it: 50 emulated clones that asked without a pause took 1.4 times as long
to be there (40 s, 28 without). So each question waits longer than the one before.
F. Cristian: Probabilistic clock synchronization. Distributed Computing 3, 146-158 (1989).
"""

from __future__ import annotations

import time
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLOSE = 5_000_000  # nanoseconds that a clock may be off
TRIES = 20  # each takes one round trip
PAUSE = 64  # times as long as the last question took, the next one waits at most


class Clock:
    """One guest's clock: asked, and moved where it is surely wrong, until it is known to be right.

    Attributes:
        due: when ``ask`` is to be called, seconds of ``monotonic``; None: never.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], None],
        now: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Arguments:
            send: sends a message to the agent, which answers with ``{"type": "clock", "sent_ns", "now_ns"}``.
            now: the host's CLOCK_REALTIME in nanoseconds.
        """
        self._send = send
        self._now = now
        self._monotonic = monotonic
        self.due: float | None = None
        self._asked = (0, 0.0)  # when the last question was sent, by both clocks
        self._pause = self._left = 0
        self._least = self._most = 0  # nanoseconds that the guest's clock may be off, late being negative

    def was_set(self, sent: int) -> None:
        """The guest has answered a message that was sent at ``sent`` and has set its clock to that."""
        late = self._now() - sent
        if late > CLOSE:
            self._least, self._most = -late, 0
            self._left, self._pause = TRIES, 1
            self.ask()

    def answered(self, message: dict[str, Any]) -> None:
        """The guest's clock showed ``now_ns`` when it answered what was last asked, at ``sent_ns``; anything else is ignored."""
        shown = message.get("now_ns")
        sent, asked = self._asked
        if message.get("sent_ns") != sent or not isinstance(shown, int):
            return
        earliest, latest = shown - self._now(), shown - sent
        if latest < self._least or earliest > self._most:  # somebody else has moved a clock
            self._least, self._most = earliest, latest
        self._least, self._most = max(self._least, earliest), min(self._most, latest)
        off, uncertain = (self._least + self._most) // 2, (self._most - self._least) // 2
        if abs(off) + uncertain <= CLOSE or self._left == 0:
            self.due = None
        elif abs(off) > uncertain:
            self.ask(-off)
        else:
            self.due = self._monotonic() + self._pause * (self._monotonic() - asked)
            self._pause = min(2 * self._pause, PAUSE)

    def ask(self, adjust: int = 0) -> None:
        """Ask what the clock shows, after it was moved by ``adjust`` nanoseconds."""
        self.due = None
        self._left -= 1
        self._least, self._most = self._least + adjust, self._most + adjust
        self._asked = self._now(), self._monotonic()
        self._send({"type": "clock", "adjust_ns": adjust, "sent_ns": self._asked[0]})
