"""fcvm.vm.freezing with an agent at the other end of a real control channel."""

import contextlib
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fcvm.agent.control import Control
from fcvm.errors import AgentError
from fcvm.vm import freezing
from fcvm.vm.freezing import Freezing


class Guest:
    """Connects to the supervisor's end and answers as the agent does."""

    def __init__(self, control: Control, undo: contextlib.ExitStack, *, frozen: bool | None = False) -> None:
        self.path = str(control._path)
        self.undo = undo
        self.frozen = frozen  # None: it does not know of this
        self.heard: list[str] = []
        self.connect()

    def connect(self) -> None:
        self.socket = self.undo.enter_context(socket.socket(socket.AF_UNIX))
        self.socket.connect(self.path)
        state = {"phase": "running", **({} if self.frozen is None else {"frozen": self.frozen})}
        self.say({"type": "hello", "protocol": 1, "state": state})
        self.lines = self.undo.enter_context(self.socket.makefile("rb"))
        self.undo.callback(end, self.socket)  # for whoever reads

    def say(self, message: dict[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def serve(self) -> None:
        """Obey until the connection ends."""
        with contextlib.suppress(OSError, ValueError):  # the test is over, and its sockets are closed
            for line in self.lines:
                kind = json.loads(line)["type"]
                self.heard.append(kind)
                self.frozen = kind == "freeze"
                self.say({"type": "frozen" if self.frozen else "thawed", "complete": True})


def end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Host:
    """As much of a supervisor as it takes."""

    def __init__(self, path: Path, undo: contextlib.ExitStack) -> None:
        self.control = undo.enter_context(contextlib.closing(Control(path / "v")))
        self.freezing = Freezing(self.control, self.attend)
        self.ended, self.alive = os.pipe()
        self.undo = undo
        for descriptor in (self.ended, self.alive):
            undo.callback(os.close, descriptor)

    def guest(self, *, frozen: bool | None = False) -> Guest:
        """One that has connected."""
        made = Guest(self.control, self.undo, frozen=frozen)
        while not self.control.connected or select.select([self.control], [], [], 0.05)[0]:
            self.attend()
        return made

    def attend(self) -> None:
        for message in self.control.receive():
            if message["type"] == "hello":
                self.freezing.hello(message["state"], running=True)
            else:
                self.freezing.answered(message)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with contextlib.ExitStack() as undo:
        yield Host(tmp_path, undo)


def served(guest: Guest) -> threading.Thread:
    thread = threading.Thread(target=guest.serve, daemon=True)
    thread.start()
    return thread


def test_frozen_inside_and_thawed_afterwards(host: Host) -> None:
    guest = host.guest()
    served(guest)
    with host.freezing.frozen(host.ended):
        assert guest.frozen
    assert not guest.frozen
    assert guest.heard == ["freeze", "thaw"]


def test_thawed_over_the_next_connection_when_the_snapshot_has_broken_the_first(host: Host) -> None:
    guest = host.guest()
    thread = served(guest)
    with host.freezing.frozen(host.ended):
        guest.socket.shutdown(socket.SHUT_RDWR)
        thread.join()
        again = threading.Timer(0.05, lambda: (guest.connect(), guest.serve()))
        again.daemon = True
        again.start()
    assert guest.frozen is False
    assert set(guest.heard) == {"freeze", "thaw"}


def test_an_agent_that_does_not_know_of_it_is_not_asked(host: Host) -> None:
    guest = host.guest(frozen=None)
    with host.freezing.frozen(host.ended):
        pass
    guest.socket.settimeout(0.1)
    with pytest.raises(TimeoutError):
        guest.socket.recv(1)


def test_an_agent_that_does_not_answer_does_not_stop_the_snapshot(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezing, "LIMIT", 0.05)
    guest = host.guest()
    with host.freezing.frozen(host.ended):
        pass
    assert guest.lines.readline() == b'{"type":"freeze"}\n'
    assert guest.lines.readline() == b'{"type":"thaw"}\n'


def test_the_end_of_the_vm_is_not_waited_for(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    host.guest()
    os.write(host.alive, b"x")
    with host.freezing.frozen(host.ended):
        pass
    assert capsys.readouterr().err == "", "after the limit it would say that the agent did not answer"


def test_a_guest_whose_freezing_has_failed_is_thawed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been frozen in part, or be about to be."""

    def fail() -> None:
        host.attend()
        raise AgentError("The guest agent failed.")

    guest = host.guest()
    monkeypatch.setattr(host.freezing, "_attend", fail)
    guest.say({"type": "error"})
    with pytest.raises(AgentError), host.freezing.frozen(host.ended):
        pytest.fail("it goes on")
    assert guest.lines.readline() == b'{"type":"freeze"}\n'
    assert guest.lines.readline() == b'{"type":"thaw"}\n'
