"""Setting a guest's clock right where messages take long, as Cristian's algorithm does.

The message with a guest's identity carries the time at which it was sent, so the guest's clock is late by the way of the
message: well under a millisecond natively, but a quarter of a second beside other emulated work. Then the guest is
asked for its time, which was true somewhere between question and answer, and is told by how much to move its clock.
Every answer narrows down what may be wrong still, so several that took long know more together than the quickest.
F. Cristian: Probabilistic clock synchronization. Distributed Computing 3, 146-158 (1989).
"""

from __future__ import annotations

from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLOSE = 5_000_000  # nanoseconds that a clock may be off
TRIES = 20  # each takes one round trip


class Clock:
    """One guest's clock: asked, and moved where it is surely wrong, until it is known to be right."""

    def __init__(self, send: Callable[[dict[str, Any]], None], now: Callable[[], int]) -> None:
        """
        Arguments:
            send: sends a message to the agent, which answers with ``{"type": "clock", "sent_ns", "now_ns"}``.
            now: the host's CLOCK_REALTIME in nanoseconds.
        """
        self._send = send
        self._now = now
        self._left = 0
        self._least = self._most = 0  # nanoseconds that the guest's clock may be off, late being negative

    def was_set(self, sent: int) -> None:
        """The guest has answered a message that was sent at ``sent`` and has set its clock to that."""
        late = self._now() - sent
        if late > CLOSE:
            self._least, self._most = -late, 0
            self._left = TRIES
            self._ask(0)

    def answered(self, message: dict[str, Any]) -> None:
        """The guest's clock showed ``now_ns`` when it answered what was asked at ``sent_ns``; anything else is ignored."""
        sent, shown = message.get("sent_ns"), message.get("now_ns")
        if not (isinstance(sent, int) and isinstance(shown, int)):
            return
        earliest, latest = shown - self._now(), shown - sent
        if latest < self._least or earliest > self._most:  # somebody else has moved a clock
            self._least, self._most = earliest, latest
        self._least, self._most = max(self._least, earliest), min(self._most, latest)
        off, uncertain = (self._least + self._most) // 2, (self._most - self._least) // 2
        if abs(off) + uncertain > CLOSE and self._left > 0:
            self._ask(-off if abs(off) > uncertain else 0)

    def _ask(self, adjust: int) -> None:
        self._left -= 1
        self._least, self._most = self._least + adjust, self._most + adjust
        self._send({"type": "clock", "adjust_ns": adjust, "sent_ns": self._now()})
