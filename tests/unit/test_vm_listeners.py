"""Which ports a guest listens on, as the kernel prints it."""

import queue
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fcvm.errors import AgentError
from fcvm.vm import listeners
from fcvm.vm.listeners import Refusals, parse

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 0100007F:0051 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0100007F:0052 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000001000000:0053 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 00000000000000000000000000000000:0054 00000000000000000000000000000000:0000 0A 00000000:00000000
   2: 0000000000000000FFFF00000100007F:0055 00000000000000000000000000000000:0000 0A 00000000:00000000
"""


def test_addresses_of_the_loopback_are_told_from_others() -> None:
    assert parse(TABLE) == {80: {True}, 81: {False, True}, 83: {True}, 84: {False}, 85: {True}}


@pytest.mark.parametrize(("ip", "loopback"), [("127.0.0.1", True), ("0.0.0.0", False), ("::1", True), ("::", False)])
def test_what_this_kernel_prints(ip: str, loopback: bool) -> None:
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET))
        sock.bind((ip, 0))
        sock.listen()
        text = "".join(Path(f"/proc/self/net/{name}").read_text() for name in ("tcp", "tcp6"))
        assert loopback in parse(text)[sock.getsockname()[1]]


def test_a_port_of_the_loopback_is_told_once_and_shown_as_long_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [{"protocol": protocol, "guest_port": port} for protocol, port in (("tcp", 80), ("tcp", 81), ("udp", 80))]
    refusals = Refusals("web", tmp_path, shown)
    asked: queue.Queue[dict[str, object]] = queue.Queue()
    monkeypatch.setattr(listeners, "on_loopback_only", lambda _directory, ports: sorted(ports))
    refusals.look({80}, asked.put)
    assert asked.get(timeout=60) == {"op": "unreachable", "ports": [80]}
    for _ in range(2):
        refusals.note([80], loopback_only=True)
    assert [port.get("loopback_only") for port in shown] == [True, None, None]
    assert capsys.readouterr().err.count("Port 80 is published, but what listens on it in web") == 1
    refusals.note([80], loopback_only=False)
    assert [port.get("loopback_only") for port in shown] == [False, None, None]
    assert capsys.readouterr().err == ""


def test_a_guest_that_does_not_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: queue.Queue[None] = queue.Queue()

    def refuse(*_: object) -> list[int]:
        looked.put(None)
        raise AgentError("It is not there yet.")

    monkeypatch.setattr(listeners, "on_loopback_only", refuse)
    Refusals("web", tmp_path, []).look({80}, lambda _request: pytest.fail("nothing is known"))
    looked.get(timeout=60)


def test_a_guest_that_tells_nonsense_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "0: nonsense:zz nonsense 0A"
    monkeypatch.setattr(listeners.sessions, "output", lambda *_, **__: (None, line.encode()))
    refusals = Refusals("web", tmp_path, [])
    refusals.look({80}, lambda _request: pytest.fail("nothing is known"))
    assert refusals._looking.acquire(timeout=60)
    with pytest.raises(ValueError, match="invalid literal"):
        parse(line)


def test_a_guest_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: queue.Queue[None] = queue.Queue()
    answer: queue.Queue[list[int]] = queue.Queue()

    def wait(*_: object) -> list[int]:
        asked.put(None)
        return answer.get(timeout=60)

    monkeypatch.setattr(listeners, "on_loopback_only", wait)
    refusals = Refusals("web", tmp_path, [])
    told: queue.Queue[object] = queue.Queue()
    for _ in range(3):
        refusals.look({80}, told.put)
    answer.put([80])
    assert told.get(timeout=60) == {"op": "unreachable", "ports": [80]}
    assert asked.qsize() == 1


def test_a_guest_that_answers_without_end_is_not_listened_to_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_directory: object, _request: object, *, on_output: Callable[[str, bytes], None], **_: object) -> None:
        while True:
            on_output("stdout", bytes(1 << 16))

    monkeypatch.setattr(listeners.sessions, "stream", endless)
    with pytest.raises(AgentError, match="longer than"):
        listeners.on_loopback_only(tmp_path, {80})
