"""Publishing from inside the machine: the real client and server, with this test as the host's keeper."""

import os
import queue
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fc_agent.machine_ports import Ports
from fcvm.errors import ConflictError, MachineError
from fcvm.machine.inside import Port, publish


class Agent:
    """The machine's agent: the server and its loop."""

    def __init__(self, path: Path) -> None:
        self.asked: queue.Queue[dict[str, Any]] = queue.Queue()
        self.ports = Ports(str(path), self.asked.put)
        self._wake = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        self.ports.register(poll)
        while True:
            for fd, _ in poll.poll():
                if fd != self._wake:
                    self.ports.ready(fd)
                    continue
                os.eventfd_read(self._wake)
                message = self._answers.get()
                if message is None:
                    return
                self.ports.answer(message)

    def answer(self, message: dict[str, Any] | None) -> None:
        self._answers.put(message)
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        self.answer(None)
        self._thread.join()
        self.ports.close()
        os.close(self._wake)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    agent = Agent(tmp_path / "ports.sock")
    yield agent
    agent.close()


def ask(path: Path, *ports: Port) -> "queue.Queue[Any]":
    """Publish in another thread; its result or error comes through the queue."""
    result: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            result.put(publish(ports, path))
        except Exception as error:
            result.put(error)

    threading.Thread(target=work, daemon=True).start()
    return result


def test_published_until_closed(agent: Agent, tmp_path: Path) -> None:
    result = ask(tmp_path / "ports.sock", Port("tcp", "127.0.0.1", 8080, 30001), Port("udp", "0.0.0.0", 0, 30002))
    first, second = agent.asked.get(timeout=60), agent.asked.get(timeout=60)
    assert first == {"type": "publish", "id": 1, "protocol": "tcp", "host_ip": "127.0.0.1", "host_port": 8080, "port": 30001}
    assert (second["id"], second["host_port"], second["port"]) == (2, 0, 30002)
    agent.answer({"type": "published", "id": 2, "host_port": 40000})  # in any order
    agent.answer({"type": "published", "id": 1, "host_port": 8080})
    published = result.get(timeout=60)
    assert published.host_ports == [8080, 40000]
    published.close()
    assert [agent.asked.get(timeout=60) for _ in range(2)] == [{"type": "unpublish", "id": n} for n in (1, 2)]


def test_all_or_none(agent: Agent, tmp_path: Path) -> None:
    result = ask(tmp_path / "ports.sock", Port("tcp", "", 80, 1), Port("tcp", "", 81, 2))
    agent.asked.get(timeout=60)
    agent.asked.get(timeout=60)
    agent.answer({"type": "published", "id": 1, "host_port": 80})
    agent.answer({"type": "published", "id": 2, "error": "Port 81 is taken.", "hint": "-p 80"})
    error = result.get(timeout=60)
    assert isinstance(error, ConflictError)
    assert error.message == "Port 81 is taken."
    assert error.hint == "-p 80"
    assert [agent.asked.get(timeout=60)["id"] for _ in range(2)] == [1, 2]
    assert agent.asked.empty()


def test_nothing_to_publish(agent: Agent, tmp_path: Path) -> None:
    published = ask(tmp_path / "ports.sock").get(timeout=60)
    assert published.host_ports == []
    published.close()


def test_many_clients(agent: Agent, tmp_path: Path) -> None:
    results = [ask(tmp_path / "ports.sock", Port("tcp", "", 0, 100 + n)) for n in range(20)]
    for _ in results:
        asked = agent.asked.get(timeout=60)
        agent.answer({"type": "published", "id": asked["id"], "host_port": asked["port"] + 1000})
    for number, result in enumerate(results):
        with result.get(timeout=60) as published:
            assert published.host_ports == [1100 + number]


def test_no_agent(tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        publish([Port("tcp", "", 1, 1)], tmp_path / "nothing")


@pytest.mark.parametrize(
    "text",
    ["nonsense", "[1]", '{"ports": [1]}', '{"ports": [{"protocol": "tcp", "host_ip": "", "host_port": Infinity, "port": 1}]}', "[" * 50_000],
)  # fmt: skip
def test_a_malformed_request_is_answered_and_the_agent_goes_on(text: str, agent: Agent, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(tmp_path / "ports.sock"))
        client.sendall(text.encode() + b"\n")
        assert b"malformed request" in client.recv(4096)
    ask(tmp_path / "ports.sock").get(timeout=60).close()
