"""When memory is given back to the host: a real process's memory and CPU time, and a monitor that notes what it is told."""

import os
import time
from typing import Any

import pytest

from fcvm.machine import trim
from fcvm.machine.trim import Trim


class Monitor:
    """Stands for QEMU's: takes commands and does nothing."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def execute(self, command: str, **arguments: Any) -> None:
        assert command == "balloon"
        self.sizes.append(arguments["value"] >> 20)


def make(total: int) -> tuple[Monitor, Trim]:
    monitor = Monitor()
    return monitor, Trim(monitor, os.getpid(), total)  # type: ignore[arg-type]


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "IDLE", 2.0)  # whatever this process does counts as idle


@pytest.mark.usefixtures("idle")
def test_what_is_free_is_taken_and_let_go_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "WORTH", 0)
    monkeypatch.setattr(trim, "HOLD", 0.05)
    monitor, trimmer = make(8192)
    assert trimmer.timeout(60) == 60
    assert trimmer.look(8192)
    assert monitor.sizes == [trim.RESERVE]
    assert not trimmer.look(8192), "one at a time"
    assert trimmer.timeout(60) <= 0.05
    deadline = time.monotonic() + 60
    while not trimmer.release():
        assert time.monotonic() < deadline
    assert monitor.sizes == [trim.RESERVE, 8192]
    assert not trimmer.release()
    assert trimmer.timeout(60) == 60


@pytest.mark.usefixtures("idle")
def test_not_when_the_host_gains_little() -> None:
    monitor, trimmer = make(8192)
    # Of 8192 MiB, 100 are free: this process cannot hold 512 MiB more than the 8092 in use.
    assert not trimmer.look(100)
    assert monitor.sizes == []


def test_not_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trim, "WORTH", 0)
    monitor, trimmer = make(8192)
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    monkeypatch.setattr(trim, "IDLE", 0.0001)
    assert not trimmer.look(8192)
    assert monitor.sizes == []


def test_resident_memory_is_seen() -> None:
    _, trimmer = make(1024)
    before = trimmer.resident()
    block = bytearray(os.urandom(64 << 20))
    assert 50 <= trimmer.resident() - before <= 200
    del block
