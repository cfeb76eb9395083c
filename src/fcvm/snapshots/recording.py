"""Learns which pages a snapshot's clones need first (working_set.py) from the first one that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fcvm import log
from fcvm.errors import FcvmError
from fcvm.snapshots import page_faults, working_set
from fcvm.snapshots.memory import MemoryServer
from fcvm.snapshots.store import Snapshot

RECORDING = 10.0  # seconds after a clone's start in which what it uses counts as needed first


class Recorder:
    """Watches one clone for ``RECORDING`` seconds, or for its life if that is shorter.

    Until then faults bring in single pages, so that exactly what was touched is seen.
    """

    def __init__(self, snapshot: Snapshot, memory: MemoryServer) -> None:
        self.snapshot = snapshot
        self.memory = memory
        self._lock = threading.Lock()
        self._begun = False

    def watch(self, pid: int) -> Callable[[], None]:
        """A clone runs: learn from it if none was before. Returns what is to be called at its end."""
        with self._lock:
            states = None if self._begun else self.memory.states(pid)
            if states is None:
                return lambda: None
            self._begun = True
        ended = threading.Event()

        def learn() -> None:
            ended.wait(RECORDING)
            self._save(page_faults.used(states))

        thread = threading.Thread(target=learn, name="recording")
        thread.start()

        def end() -> None:
            ended.set()
            thread.join()

        return end

    def _save(self, used: list[tuple[int, int]]) -> None:
        self.memory.widen(page_faults.WINDOW)
        try:
            pages = working_set.save(self.snapshot, used)
            self.memory.replay(working_set.path(self.snapshot))
            log.info(f"recorded a working set of {pages * 4 // 1024} MiB")
        except FcvmError as error:  # a full disk, say
            log.warning(error.message)
