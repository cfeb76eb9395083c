"""The control channel's host end against guests that behave, break off, or are hostile; the shared messages; the pack."""

import contextlib
import json
import random
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fc_agent import protocol
from fcvm.agent import control, pack
from fcvm.agent.control import Control
from fcvm.errors import AgentError

HELLO = b'{"type":"hello","protocol":1,"state":{"phase":"waiting"}}\n'


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Control]:
    with_control = Control(tmp_path / "vsock.sock")
    yield with_control
    with_control.close()


def guest(channel: Control) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(channel._path))
    return connection


def receive(channel: Control, count: int) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    while len(messages) < count:
        assert select.select([channel], [], [], 30)[0], "nothing came"
        messages += channel.receive()
    return messages


def settle(channel: Control) -> None:
    while select.select([channel], [], [], 0)[0]:
        channel.receive()


def test_messages_both_ways(channel: Control) -> None:
    with guest(channel) as agent:
        agent.sendall(HELLO + b'{"type":"re')
        assert [m["type"] for m in receive(channel, 1)] == ["hello"]
        agent.sendall(b'ady"}\n\n')
        assert receive(channel, 1) == [{"type": "ready"}]
        channel.send({"type": "stop", "timeout": 10})
        assert json.loads(agent.recv(1000)) == {"type": "stop", "timeout": 10}


def test_a_message_waits_for_the_guest(channel: Control) -> None:
    channel.send({"type": "plan"})
    assert not channel.connected
    with guest(channel) as agent:
        settle(channel)
        assert channel.connected
        assert agent.recv(1000) == b'{"type":"plan"}\n'


def test_a_message_that_was_cut_off_is_sent_again_as_a_whole(channel: Control) -> None:
    big = {"type": "plan", "data": "x" * 4_000_000}
    with guest(channel) as agent:
        settle(channel)
        channel.send({"type": "first"})
        channel.send(big)
        assert agent.recv(16, socket.MSG_WAITALL) == b'{"type":"first"}'
    with guest(channel) as agent:
        received = bytearray()
        while not received.endswith(b"\n"):
            settle(channel)
            received += agent.recv(1 << 20)
        assert json.loads(received) == big


def test_the_guest_reconnects_without_an_end_of_the_old_connection(channel: Control) -> None:
    with guest(channel) as old:
        old.sendall(HELLO + b'{"type":"half')
        receive(channel, 1)
        with guest(channel) as new:
            new.sendall(HELLO)
            assert receive(channel, 1)[0]["type"] == "hello"
            channel.send({"type": "stop"})
            assert new.recv(100) == b'{"type":"stop"}\n'
            assert old.recv(100) == b""


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\n",
        b"nonsense\n",
        b"[]\n",
        b"{}\n",
        b'{"type":3}\n',
        b"[" * 200_000 + b"\n",
        b'{"type":"hello","protocol":2}\n',
        b'{"type":"hello"}\n',
        b'{"type":"hello","protocol":1,"state":[]}\n',
        b'{"type":"hello","protocol":1,"state":{"exit":[]}}\n',
        b'{"type":"exit"}\n',
        b'{"type":"exit","code":"0"}\n',
        b'{"type":"exit","code":1e300}\n',
        b'{"type":"stage","name":"x","uptime":"soon"}\n',
        b'{"type":"stage","name":"x","uptime":1' + 400 * b"0" + b"}\n",
        b'{"type":"stage","name":"x","uptime":NaN}\n',
        b"x" * (2 << 20),
    ],
)
def test_a_hostile_guest_is_an_agent_error(channel: Control, data: bytes) -> None:
    with guest(channel) as agent:
        agent.setblocking(False)
        with pytest.raises(AgentError):
            talk(channel, agent, data)


def talk(channel: Control, agent: socket.socket, data: bytes) -> None:
    while True:
        with contextlib.suppress(BlockingIOError):
            data = data[agent.send(data) :]
        channel.receive()


def test_random_garbage_only_ever_is_an_agent_error(tmp_path: Path) -> None:
    generator = random.Random(5)
    for round_ in range(200):
        channel = Control(tmp_path / f"v{round_}")
        with guest(channel) as agent:
            agent.sendall(generator.choice([b"", HELLO]) + generator.randbytes(generator.randrange(2000)) + b"\n")
            try:
                for _ in range(5):
                    channel.receive()
            except AgentError:
                pass
        channel.close()


def test_a_guest_that_never_reads_is_an_error(channel: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "MAX_OUTPUT", 1 << 20)
    with guest(channel), pytest.raises(AgentError):
        flood(channel)


def flood(channel: Control) -> None:
    for _ in range(10):
        settle(channel)
        channel.send({"type": "plan", "data": "x" * 400_000})


def test_closing_removes_the_socket(tmp_path: Path) -> None:
    channel = Control(tmp_path / "v")
    assert [p.name for p in tmp_path.iterdir()] == ["v_4999"]
    channel.close()
    assert list(tmp_path.iterdir()) == []


def test_plan_round_trip() -> None:
    plan = protocol.Plan(
        identity=protocol.Identity("web", "0" * 32, entropy="AAEC", wall_clock_ns=1 << 60),
        container=protocol.ContainerPlan(
            image="sha256:1",
            command=["a", "b"],
            env={"A": "1"},
            health=protocol.HealthPlan("http", "http://localhost/", 1),
        ),
        network=protocol.NetworkPlan("10.0.2.100/24", "10.0.2.2", hosts={"host": "10.0.2.2"}),
        volumes=[protocol.VolumePlan(5000, "/data", True)],
    )
    assert protocol.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.identity.seed == b"\0\1\2"


@pytest.mark.parametrize(
    "change",
    [{"identity": 3}, {"container": {"image": 3}}, {"container": {}}, {"volumes": [{"port": "x", "path": "/"}]},
     {"container": {"image": "x", "command": "ls"}}, {"container": {"image": "x", "tty": 1}},
     {"container": {"image": "x", "health": {"kind": "magic"}}}],
)  # fmt: skip
def test_a_plan_with_wrong_values(change: dict[str, object]) -> None:
    plan = {"identity": {"hostname": "x", "machine_id": "y"}, **change}
    with pytest.raises(protocol.ProtocolError):
        protocol.Plan.from_json(plan)


def test_the_pack_is_reproducible_and_runs(tmp_path: Path) -> None:
    first, second = tmp_path / "1.pyz", tmp_path / "2.pyz"
    pack.pack(first)
    pack.pack(second)
    assert first.read_bytes() == second.read_bytes()
    code = f"import sys; sys.path.insert(0, {str(first)!r}); import fc_agent.session, fuse_pipe; print(fc_agent.session.__file__)"
    output = subprocess.run([sys.executable, "-ISE", "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith(str(first))
