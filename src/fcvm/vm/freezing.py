"""The guest stands still around a snapshot, all but its agent: see fc_agent/freezer.py for why.

Taking a snapshot resets the agent's connection, so the guest is thawed by what it says when it has connected again.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Iterator

from fcvm import host, log
from fcvm.agent.control import Control

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LIMIT = 10.0  # seconds to wait for the agent, each time; natively it answers within a few milliseconds


class Freezing:
    """Of one VM. ``frozen`` is for its supervisor's loop, which passes on what the agent says of it.

    Attributes:
        waits: it waits for the agent's answer, within a request for a snapshot.
    """

    def __init__(self, control: Control, attend: Callable[[], None]) -> None:
        """
        Arguments:
            attend: has the supervisor deal with the agent's messages that have come.
        """
        self._control = control
        self._attend = attend
        self.waits = False
        self._wanted = False
        self._is: bool | None = None  # None: the agent is one that does not know of this

    def hello(self, state: dict[str, Any], *, running: bool) -> None:
        """The agent has connected (again), to a VM that runs or, ``running`` False, that is still to become itself."""
        self._is = state.get("frozen")
        if running and self._is and not self._wanted:
            self._control.send({"type": "thaw"})

    def answered(self, message: dict[str, Any]) -> None:
        """It says ``frozen`` or ``thawed``."""
        self._is = message["type"] == "frozen"
        if self._is and not message.get("complete"):
            log.warning("Not everything in the guest stands still: clones may begin with the same random numbers.")

    def thawed(self) -> None:
        """The agent has taken a new identity, which ends it."""
        if self._is is not None:
            self._is = False

    @contextlib.contextmanager
    def frozen(self, ended: int) -> Iterator[None]:
        """Nothing but the agent runs inside the block, or has run when a clone of what happens there takes its identity.

        Arguments:
            ended: readable when the VM has ended.
        """
        if self._is is None:
            yield
            return
        try:
            self._reach(True, ended)
            yield
        finally:
            self._reach(False, ended)

    def _reach(self, wanted: bool, ended: int) -> None:
        self.waits = True
        try:
            self._ask(wanted, ended)
        finally:
            self.waits = False

    def _ask(self, wanted: bool, ended: int) -> None:
        self._wanted = wanted
        self._control.send({"type": "freeze" if wanted else "thaw"})
        poll = select.poll()
        for descriptor in (self._control.fileno(), ended):
            poll.register(descriptor, select.POLLIN)
        limit = host.patience(LIMIT)
        deadline = time.monotonic() + limit
        while self._is is not wanted:
            left = deadline - time.monotonic()
            ready = [descriptor for descriptor, _ in poll.poll(max(0.0, left) * 1000)]
            if ended in ready or not ready:
                if ended not in ready:
                    log.warning(f"The agent did not {'freeze' if wanted else 'thaw'} the guest within {limit:.0f} s.")
                return
            self._attend()
