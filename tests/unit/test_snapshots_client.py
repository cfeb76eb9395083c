"""The client of a clone server, with this test as the server."""

import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fcvm.errors import UsageError
from fcvm.linux import descriptors
from fcvm.snapshots import client, server, servers
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


def test_signals_that_end_nothing_reach_the_containers_of_clones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    told: list[dict[str, object]] = []
    served = server.Client(theirs, {}, [])
    served.supervisor = SimpleNamespace(ask=told.append)  # type: ignore[assignment]
    monkeypatch.setattr(servers, "connect", lambda *_: ours)
    monkeypatch.setattr(client.Clone, "started", lambda self: {"id": "0", "name": "clone"})
    monkeypatch.setattr(client.Clone, "exit", lambda self: os.kill(os.getpid(), signal.SIGUSR1) or 3)
    assert client.run(Layout(tmp_path), 1, [Wanted(None, [])], attached=True) == 3
    served.listen()
    served.close()
    assert told == [{"op": "signal", "signal": signal.SIGUSR1}, {"op": "kill"}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "signal"},
        {"op": "signal", "signal": "USR1"},
        {"op": "signal", "signal": [10]},
        {"op": "signal", "signal": 1 << 40},
        {"op": "stop", "timeout": "soon"},
    ],
)
def test_what_a_client_says_wrongly_does_not_end_its_clone(wrong: dict[str, object]) -> None:
    """Its supervisor would end by it."""
    ours, theirs = socket.socketpair()
    told: list[dict[str, object]] = []
    served = server.Client(theirs, {}, [])
    served.supervisor = SimpleNamespace(ask=told.append)  # type: ignore[assignment]
    with ours:
        for message in (wrong, {"op": "stop", "timeout": 5}):
            servers.send(ours, message)
    served.listen()
    served.close()
    assert told == [{"op": "stop", "timeout": 5}, {"op": "kill"}]


class Connected(Clone):
    """A clone that takes a descriptor, as a connection does."""

    def __init__(self, *_: object, **__: object) -> None:
        self.made.append(self)
        self.fd = os.open(os.devnull, os.O_RDONLY)

    def exit(self) -> int:
        return 0

    def close(self) -> None:
        os.close(self.fd)


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_fleet_larger_than_the_usual_limit_of_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clone, "made", [], raising=False)
    monkeypatch.setattr(client, "Clone", Connected)
    with few_descriptors():
        assert client.run(Layout(tmp_path), 1, [Wanted(None, [])] * 300, attached=True) == 0
    assert len(Clone.made) == 300


def test_a_fleet_larger_than_the_hard_limit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clone, "made", [], raising=False)
    monkeypatch.setattr(client, "Clone", Connected)
    monkeypatch.setattr(descriptors, "allow_all", lambda: 256)
    with pytest.raises(UsageError, match="hard limit here is 256") as caught:
        client.run(Layout(tmp_path), 1, [Wanted(None, [])] * 300, attached=True)
    assert "--count 156" in str(caught.value.hint)
    assert Clone.made == []
