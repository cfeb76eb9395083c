"""The client of a clone server, with this test as the server."""

import os
import signal
from pathlib import Path

import pytest

from fcvm.snapshots import client
from fcvm.snapshots.client import Wanted
from fcvm.storage.layout import Layout


class Clone:
    """A clone of a fleet, while the second of which is asked for a signal comes."""

    made: list["Clone"]

    def __init__(self, *_: object, **__: object) -> None:
        self.asked: list[str] = []
        self.made.append(self)
        if len(self.made) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def started(self) -> dict[str, str]:
        return {"id": "0", "name": "clone"}

    def ask(self, op: str) -> None:
        self.asked.append(op)

    def exit(self) -> int:
        return 143

    def close(self) -> None:
        pass


def test_a_signal_reaches_clones_that_are_asked_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clone, "made", [], raising=False)
    monkeypatch.setattr(client, "Clone", Clone)
    assert client.run(Layout(tmp_path), 1, [Wanted(None, [])] * 4, attached=True) == 143
    assert [clone.asked for clone in Clone.made] == [["stop"]] * 4
