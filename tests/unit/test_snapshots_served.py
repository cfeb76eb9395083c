"""A clone's life in its server, from its client's request to its end. Firecracker, network and guest are made believe."""

import contextlib
import json
import os
import socket
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fc_agent.protocol import PROTOCOL
from fcvm import config as settings
from fcvm.linux import sockets
from fcvm.snapshots import server
from fcvm.snapshots.served import Client
from fcvm.vm import messages, rpc, state, supervisor
from fcvm.vm.paths import VSOCK
from fcvm.vm.spec import ImageUse, RunSpec

SPEC = RunSpec(name="source", image=ImageUse("image", "sha256:1", "sha256:2", "/image"), network="none")


class Vmm:
    """Firecracker, until it is killed."""

    def __init__(self) -> None:
        self.pidfd = os.eventfd(0, os.EFD_CLOEXEC)
        self.pid = 0
        self.process = self
        self.console = types.SimpleNamespace(quote=lambda *_: "")

    def kill(self) -> None:
        os.eventfd_write(self.pidfd, 1)

    def __enter__(self) -> "Vmm":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Network:
    """No network; ``on_close`` is called when it is closed."""

    watch = ()

    def __init__(self) -> None:
        self.on_close: Callable[[], None] = lambda: None
        self.closed = False

    def describe(self) -> dict[str, Any]:
        return {"mode": "none", "ports": []}

    def close(self) -> None:
        if not self.closed:
            self.on_close()
            self.closed = True


class Clone:
    """A clone as a pool gives it out; ``guest`` has the connection of its agent, once it runs."""

    def __init__(self, base: Path) -> None:
        self.id = state.new_id()
        self.directory = base
        self.kit = types.SimpleNamespace(snapshot=types.SimpleNamespace(path=base))
        self.firecracker = Vmm()
        self.network = Network()
        self.running = threading.Event()
        self.guest: Callable[[socket.socket], None] = lambda connection: None

    def move(self, directory: Path) -> None:
        self.directory = directory

    def resume(self) -> None:
        connection = sockets.connect(self.directory / f"{VSOCK}_4999", timeout=60)
        self._acting = threading.Thread(target=self._act, args=(connection,), name="guest")
        self._acting.start()
        self.running.set()

    def _act(self, connection: socket.socket) -> None:
        with connection:
            self.guest(connection)

    def close(self) -> None:
        self.firecracker.kill()
        self.network.close()

    def end(self) -> None:
        """See the guest's end, which is that of its connection at the latest."""
        if self.running.is_set():
            self._acting.join()
        os.close(self.firecracker.pidfd)

    def __enter__(self) -> "Clone":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Clone]:
    made = Clone(tmp_path)
    yield made
    made.end()


class Served:
    """A server's thread for one client; ``client`` is the client's end of its connection."""

    def __init__(self, base: Path, clone: Clone, fds: list[int], request: dict[str, Any]) -> None:
        made = server.CloneServer(server.Settings("warm"), settings.load({"base_dir": str(base)}), None)  # type: ignore[arg-type]
        manifest = types.SimpleNamespace(spec=SPEC.to_json(), network="none")
        made.snapshot = types.SimpleNamespace(tag="warm", manifest=manifest)  # type: ignore[assignment]
        made.pool = types.SimpleNamespace(take=lambda: clone)  # type: ignore[assignment]
        made.mode = "none"
        ours, self.client = socket.socketpair()
        self.server = made
        self._client = Client(ours, {"op": "run", **request}, fds)
        self._thread = threading.Thread(target=made._serve, args=(self._client,))

    def __enter__(self) -> "Served":
        self._thread.start()
        return self

    def told(self) -> dict[str, Any]:
        """What the client is told next."""
        self.client.settimeout(60)
        line: dict[str, Any] = json.loads(rpc.read_line(self.client))
        return line

    def __exit__(self, *_: object) -> None:
        self.client.shutdown(socket.SHUT_WR)
        self._thread.join()
        self.client.close()
        self._client.close()
        os.close(self.server.wake)


@pytest.fixture
def serve(tmp_path: Path, clone: Clone) -> Callable[..., Served]:
    return lambda *fds, **request: Served(tmp_path, clone, list(fds), request)


def test_a_stop_returns_when_firecracker_and_the_network_are_gone(serve: Callable[..., Served], clone: Clone) -> None:
    """Whoever has stopped a clone may want its ports."""
    answered, seen = threading.Event(), []

    def close() -> None:
        seen.append(clone.directory.exists())
        answered.wait(0.5)

    clone.network.on_close = close
    with serve():
        assert clone.running.wait(60)
        assert rpc.call(clone.directory, {"op": "stop"}) == {"ok": True}
        closed = clone.network.closed
        answered.set()
    assert closed
    assert seen == [True], "its directory goes after them"


@pytest.mark.parametrize("refused", ["streams", "requests"])
def test_a_clone_for_which_there_are_no_threads_leaves_nothing(
    serve: Callable[..., Served], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = len(os.listdir("/proc/self/fd"))
    with serve() as served:
        assert "can't start new thread" in served.told()["error"]
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("streams", "requests")]
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.fixture
def guest(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """What the container prints, until it is stopped and exits with 7."""
    printed: list[tuple[str, bytes]] = []

    def act(connection: socket.socket) -> None:
        def say(**message: object) -> None:
            connection.sendall(json.dumps(message).encode() + b"\n")

        lines = connection.makefile()
        say(type="hello", protocol=PROTOCOL, state={"phase": "running"})
        assert json.loads(lines.readline())["type"] == "restored"
        say(type="ready")
        while json.loads(lines.readline())["type"] != "stop":
            pass
        say(type="exit", code=7)
        with contextlib.suppress(OSError):  # the supervisor waits for nothing else
            say(type="hello", protocol=PROTOCOL, state={"frozen": True})
            lines.readline()  # it has heard of the end, and thaws us
        clone.firecracker.kill()

    def stream(*_: object, on_output: Callable[[str, bytes], None], **__: object) -> None:
        for stream, data in printed:
            on_output(stream, data)

    clone.guest = act
    monkeypatch.setattr(messages.plan, "network", lambda _: None)
    monkeypatch.setattr(supervisor.sessions, "stream", stream)
    return printed


def test_a_clone_that_is_stopped_while_its_reader_pauses_has_its_own_exit_code(
    serve: Callable[..., Served], guest: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is we who give its output up then."""
    monkeypatch.setattr(supervisor, "STREAMS_MARGIN", 0.1)
    read, write = os.pipe()
    guest.append(("stdout", bytes(1 << 20)))
    with serve(write) as served:
        assert "started" in served.told()
        served.client.sendall(b'{"op": "stop"}\n')
        assert served.told() == {"exit": 7}
    os.close(read)


def test_a_clones_last_line_is_ended_behind_its_mark(serve: Callable[..., Served], guest: list[tuple[str, bytes]]) -> None:
    """Else the client's prompt comes in that line."""
    read, write = os.pipe()
    guest.append(("stdout", b"foo"))
    with serve(write, log_prefix=True) as served:
        assert "started" in served.told()
        served.client.sendall(b'{"op": "stop"}\n')
        assert served.told() == {"exit": 7}
    with open(read, "rb") as file:
        assert file.read() == b"[ctr:out] foo\n"
