"""The small parts of fcvm.snapshots and of its commands."""

import argparse
import contextlib
import errno
import itertools
import json
import os
import socket
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fcvm import config as settings
from fcvm.cli import snapshot
from fcvm.cli.snapshot import distributed, pool_size
from fcvm.errors import ConflictError, FcvmError, FirecrackerError, NotFoundError, SnapshotError, UsageError
from fcvm.linux import holes, sockets
from fcvm.snapshots import create, page_faults, pool, recording, server, servers, store, working_set
from fcvm.snapshots.memory import Faults, MemoryServer
from fcvm.snapshots.page_faults import HOLE_WINDOW, PAGE, Memory, Region
from fcvm.snapshots.served import Client, ClientOutput
from fcvm.storage.layout import Layout, is_held
from fcvm.vm import state
from fcvm.vm.output import LOG, Output

RANGES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20)


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for first, count in ranges for page in range(first, first + count)}


@given(RANGES)
def test_joined_ranges_are_ascending_apart_and_cover_the_same(ranges: list[tuple[int, int]]) -> None:
    result = working_set.joined(ranges, gap=0)
    assert pages(result) == pages(ranges)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(result))
    wide = working_set.joined(ranges, gap=8)
    assert pages(wide) >= pages(ranges)
    assert all(a + n + 8 < b for (a, n), (b, _) in itertools.pairwise(wide))


@given(RANGES)
def test_chunks_are_small_and_cover_the_same(ranges: list[tuple[int, int]]) -> None:
    result = list(page_faults.chunks([(first, count * 50) for first, count in ranges]))
    assert pages(result) == pages([(first, count * 50) for first, count in ranges])
    assert all(count <= page_faults.CHUNK for _, count in result)


@given(st.binary(max_size=200))
def test_present_pages(states: bytes) -> None:
    assert pages(page_faults.present(states)) == {n for n, state in enumerate(states) if state in (1, 3)}


def test_working_set_file(tmp_path: Path) -> None:
    assert working_set.load(tmp_path / "missing") == []
    (tmp_path / "set").write_text("[[1, 2], [9, 1]]")
    assert working_set.load(tmp_path / "set") == [(1, 2), (9, 1)]
    for damage in (
        "",
        "[1]",
        '{"a": 1}',
        "[[1]]",
        '[["x", 1]]',
        "[[-1, 2]]",
        "[[1, 0]]",
        "[[1, 1e999]]",
        "[[1, 1000000000000]]",
        "[" * 100_000,
    ):
        (tmp_path / "set").write_text(damage)
        with pytest.raises(SnapshotError, match="damaged"):
            working_set.load(tmp_path / "set")


def test_a_working_set_that_finds_no_space_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def add(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "add", add)
    memory = types.SimpleNamespace(states=lambda _: bytes(8), widen=lambda _: None)
    recorder = recording.Recorder(types.SimpleNamespace(path=tmp_path), memory)  # type: ignore[arg-type]
    recorder.watch(1)()
    assert "There is no space left" in capsys.readouterr().err


def sparse(path: Path, size: int, *data: int) -> Path:
    """A file of ``size`` pages, with a page of data at each of ``data``."""
    with open(path, "wb") as file:
        file.truncate(size * PAGE)
        for page in data:
            file.seek(page * PAGE)
            file.write(b"x" * PAGE)
    return path


def test_memory_knows_its_holes(tmp_path: Path) -> None:
    memory = Memory(sparse(tmp_path / "m", 64, 0, 5, 6, 63))
    assert memory.pages == 64
    assert {page for page in range(64) if memory.data[page]} == {0, 5, 6, 63}
    memory.close()
    empty = Memory(sparse(tmp_path / "e", 8))
    assert not any(empty.data)
    empty.close()


@pytest.mark.parametrize(
    ("window", "page", "expected"),
    [
        (16, 1000, (992, 1008)),  # data: the window around it
        (16, 4, (0, 256)),  # a hole: as far as it reaches within the large window
        (16, 300, (256, 512)),
        (16, 600, (512, 768)),  # data begins at 768
        (16, 770, (768, 784)),  # data right there
        (1, 4, (4, 5)),  # recording: nothing but the page
        (16, 2047, (2032, 2048)),  # not beyond the region
    ],
)
def test_window_of_a_fault(tmp_path: Path, window: int, page: int, expected: tuple[int, int]) -> None:
    memory = Memory(sparse(tmp_path / "m", 4096, *range(768, 2048)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        server = page_faults.Server(memory, ours)
        region = Region(address=1 << 30, size=2048 * PAGE, offset=0)
        server.window = window
        assert server._window(region, page) == expected
        server.poll.close()
    memory.close()
    assert HOLE_WINDOW == 256


@given(st.lists(st.booleans(), min_size=512, max_size=512), st.integers(0, 511), st.sampled_from([1, 4, 16, 64]))
def test_window_always_holds_the_page_and_its_small_window(data: list[bool], page: int, window: int) -> None:
    server = page_faults.Server.__new__(page_faults.Server)
    server.memory = Memory.__new__(Memory)
    server.memory.data = bytes(data)
    server.window = window
    first, end = server._window(Region(0, 512 * PAGE, 0), page)
    assert first <= page // window * window
    assert min(512, page // window * window + window) <= end <= 512
    if not data[page] and window > 1:  # beyond the small window there is nothing but hole
        outside = [*range(first, page // window * window), *range(page // window * window + window, end)]
        assert not any(data[p] for p in outside)


def test_regions_of_a_handshake() -> None:
    message = [{"base_host_virt_addr": 4096, "size": 8192, "offset": 0, "page_size": 4096, "page_size_kib": 4096}]
    assert page_faults.regions(message) == [Region(4096, 8192, 0)]
    assert page_faults.regions([{"base_host_virt_addr": 0, "size": 1, "offset": 0, "page_size_kib": 4}])
    with pytest.raises(ValueError, match="2097152"):
        page_faults.regions([{"base_host_virt_addr": 0, "size": 1, "offset": 0, "page_size": 2 << 20}])


def test_zeros_become_holes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(1 << 20) + b"data" + bytes((1 << 20) - 4) + b"end"
    path.write_bytes(content)
    before = path.stat().st_blocks
    dug = holes.dig(path)
    assert path.read_bytes() == content
    assert dug >= (2 << 20) - 2 * holes.BLOCK
    assert path.stat().st_blocks < before // 4
    assert holes.dig(path) == 0


@pytest.mark.parametrize(("text", "expected"), [("3", (3, 3)), ("0", (0, 0)), ("1-16", (1, 16)), ("0-2", (0, 2))])
def test_pool_size(text: str, expected: tuple[int, int]) -> None:
    assert pool_size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "1-x", "1-2-3"])
def test_bad_pool_size(text: str) -> None:
    with pytest.raises(UsageError):
        pool_size(text)


def test_ports_of_a_fleet() -> None:
    assert distributed(["8081-8083:80", "0:443"], 3) == [
        ["8081:80", "0:443"],
        ["8082:80", "0:443"],
        ["8083:80", "0:443"],
    ]
    assert distributed(["127.0.0.1:8081-8082:80/tcp,53"], 2) == [
        ["127.0.0.1:8081:80/tcp", "53"],
        ["127.0.0.1:8082:80/tcp", "53"],
    ]
    assert distributed(["[::1]:90-91:80"], 2) == [["[::1]:90:80"], ["[::1]:91:80"]]
    assert distributed(["8080:80,9000-9002:9000-9002"], 1) == [["8080:80,9000-9002:9000-9002"]]
    assert distributed([], 2) == [[], []]


@pytest.mark.parametrize("text", ["8080:80", "8080-8081:80", "127.0.0.1:8080:80"])
def test_clones_cannot_share_a_port(text: str) -> None:
    with pytest.raises(UsageError, match="3 clones cannot share") as caught:
        distributed([text], 3)
    assert caught.value.hint == "--publish 8081-8083:80"


DEEP = b"[" * 100_000


@pytest.mark.parametrize("nonsense", [b"[]", b"nonsense", DEEP])
def test_lines_end_with_the_connection_or_with_nonsense(nonsense: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b'{"a": 1}\n{"b"')
        lines = servers.lines(ours)
        assert next(lines) == {"a": 1}
        theirs.sendall(b": 2}\n" + nonsense + b"\n{}\n")
        assert next(lines) == {"b": 2}
        assert next(lines, None) is None
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert list(servers.lines(ours)) == []


def test_request_comes_with_its_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        read, write = os.pipe()
        socket.send_fds(theirs, [b'{"op": "run"}\n{"op": "kill"}\n{"op"'], [write])
        os.close(write)
        request, fds, rest = servers.receive(ours)
        assert request == {"op": "run"}
        theirs.sendall(b': "stop"}\n')
        later = servers.lines(ours, rest)
        assert [next(later), next(later)] == [{"op": "kill"}, {"op": "stop"}], "what came with it is not lost"
        os.write(fds[0], b"x")
        assert os.read(read, 1) == b"x"
        os.close(fds[0])
        os.close(read)
        for nonsense in (b"[]\n", b"nonsense\n", DEEP + b"\n"):
            theirs.sendall(nonsense)
            with pytest.raises(ValueError):  # noqa: PT011
                servers.receive(ours)


def test_answers_that_are_errors() -> None:
    assert servers.checked({"ok": 1}) == {"ok": 1}
    with pytest.raises(FcvmError, match="sorry") as caught:
        servers.checked({"error": "sorry", "hint": "fcvm ls", "exit_code": 126})
    assert (caught.value.hint, caught.value.exit_code) == ("fcvm ls", 126)


def test_registered_server_is_alone_and_found(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    stale = layout.directory("servers") / "1234567"
    stale.mkdir()
    (stale / servers.INFO).write_text(json.dumps({"pid": 1234567}))
    with servers.registered(layout, {"pid": os.getpid()}) as directory:
        assert directory.name == str(os.getpid())
        assert not stale.exists(), "what a killed server left is removed"
        assert is_held(directory)
        assert servers.running(layout) == [], "it does not answer yet"
        with pytest.raises(NotFoundError):
            servers.call(layout, os.getpid(), {"op": "status"})
    assert not directory.exists()


def test_a_server_that_does_not_answer_keeps_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was stopped by SIGSTOP, say."""
    monkeypatch.setattr(servers, "ANSWER", 0.05)
    layout, pid = Layout(tmp_path), os.getpid()
    with (
        servers.registered(layout, {"pid": pid, "tag": "warm"}) as directory,
        sockets.listen(directory / servers.SOCKET),
    ):
        assert servers.running(layout) == []
        assert f"The clone server {pid} does not answer" in capsys.readouterr().err
        assert servers.pids(layout) == [pid], "so that it is not forgotten"
        with pytest.raises(ConflictError, match="does not answer"):
            servers.stop(layout, pid)


def test_a_stop_of_several_servers_goes_on_where_one_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_: Layout, pid: int) -> None:
        if pid == 1:
            raise FcvmError("The clone server cannot serve another client.")

    monkeypatch.setattr(servers, "pids", lambda _: [1, 2])
    monkeypatch.setattr(servers, "stop", stop)
    context = types.SimpleNamespace(layout=Layout(tmp_path))
    with pytest.raises(FcvmError, match="another client"):
        snapshot.run(argparse.Namespace(action="stop", all=True), context)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "2\n"


def test_a_stop_asks_a_server_again_that_has_not_heard_it(tmp_path: Path) -> None:
    """One that has no threads, say, closes the connection before it has read what is asked of it."""
    layout, pid = Layout(tmp_path), os.getpid()
    asked: list[dict[str, Any]] = []

    def answer() -> None:
        listener.accept()[0].close()
        connection, _ = listener.accept()
        with connection:
            asked.append(servers.receive(connection)[0])
            servers.send(connection, {"stopping": True})

    with servers.registered(layout, {"pid": pid}) as directory, sockets.listen(directory / servers.SOCKET) as listener:
        listener.settimeout(60)
        answering = threading.Thread(target=answer)
        answering.start()
        stopping = threading.Thread(target=servers.stop, args=(layout, pid))
        stopping.start()
        answering.join()
    stopping.join(60)
    assert asked == [{"op": "stop"}]
    assert not stopping.is_alive()


def test_a_clone_that_is_gone_when_it_is_accepted_ends_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process was killed and reaped while its connection waited."""
    failed: list[str] = []
    pidfd_open = os.pidfd_open

    def gone(pid: int) -> int:
        if pid == os.getpid():  # our connection is the clone
            raise ProcessLookupError(3, "No such process")
        return pidfd_open(pid)

    monkeypatch.setattr(os, "pidfd_open", gone)
    file = sparse(tmp_path / "memory", 4, 1)
    with MemoryServer(file, tmp_path / "sock", on_failure=lambda _pid, message: failed.append(message)) as server:
        for _ in range(2):
            with sockets.connect(tmp_path / "sock", timeout=30) as connection:
                assert connection.recv(1) == b""
        assert (server.faults(), server.error, failed) == ([], None, [])


def test_faults_of_a_clone_that_ends_while_they_are_added_up_count_once(tmp_path: Path) -> None:
    given = Faults(1, 7, 0, 0, 0, 0)
    clone: Any = types.SimpleNamespace(number=-1, states=b"", faults=lambda: given, close=lambda: None)
    ended: list[threading.Thread] = []

    class Past(dict[str, int]):
        def __getitem__(self, name: str) -> int:
            past = super().__getitem__(name)
            if not ended:
                ended.append(threading.Thread(target=memory._forget, args=(clone,)))
                ended[0].start()
                ended[0].join(0.5)  # longer if it has to wait for us
            return past

    with MemoryServer(sparse(tmp_path / "memory", 4, 1), tmp_path / "sock") as memory:
        memory.clones[clone.number] = clone
        memory.past = Past(memory.past)
        assert memory.served() == 7
        ended[0].join()
        assert memory.served() == 7


def test_a_pool_that_is_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    hold, swept = state.hold, iter(range(10))

    def hold_late(directory: Path) -> int:
        turn = next(swept)
        if turn == 0:  # somebody sweeps, and has it
            raise BlockingIOError
        if turn == 1:  # somebody has swept
            lock = hold(directory)
            directory.rmdir()
            return lock
        return hold(directory)

    monkeypatch.setattr(pool, "hold", hold_late)
    made, lock = pool._make_held(layout.vms)
    monkeypatch.undo()
    state.sweep(layout)
    assert made.is_dir(), "it is held, so it is in use"
    os.close(lock)
    state.sweep(layout)
    assert list(layout.vms.iterdir()) == []


class Loaded:
    """A clone that is loaded at once."""

    def __init__(self, *_: object, **__: object) -> None:
        self.firecracker = types.SimpleNamespace(ended=lambda: False)

    def wait(self) -> None:
        pass

    close = wait


def test_a_pool_whose_clones_are_taken_while_it_fills_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that come before the server is ready keep the pool from having all at the same moment, and it wants ever more."""
    monkeypatch.setattr(pool, "Loaded", Loaded)
    monkeypatch.setattr(pool, "QUIET", 3600.0)  # only as many are made as are waited for
    monkeypatch.setattr(pool, "PATIENCE", 10.0)
    filled = threading.Event()
    kit = types.SimpleNamespace(snapshot=types.SimpleNamespace(tag="warm"))
    with pool.Pool(kit, tmp_path, minimum=4) as made:  # type: ignore[arg-type]

        def take() -> None:
            while not filled.is_set():
                made.take()

        for _ in range(6):
            made.take()
        clients = [threading.Thread(target=take) for _ in range(2)]
        for client in clients:
            client.start()
        try:
            made.fill()
        finally:
            filled.set()
            for client in clients:
                client.join()


class Vmm:
    """A running VM whose snapshot fails, or the clone of whose disk does."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.api = self

    def get(self, _path: str) -> dict[str, object]:
        return {"state": "Running", "track_dirty_pages": True}

    def patch(self, _path: str, _body: object) -> None:
        pass

    def put(self, _path: str, _body: object, **_: object) -> None:
        if self.fails:
            raise FirecrackerError("No space left (os error 28)")

    def ended(self) -> bool:
        return False


@pytest.mark.parametrize("fails", [True, False])
def test_those_who_talk_to_the_guest_hear_of_a_snapshot_that_failed(tmp_path: Path, fails: bool) -> None:
    """Firecracker has reset their connections by then: they would wait for ever for the guest's next word."""
    directory, destination = tmp_path / "vm", tmp_path / "snapshot"
    for path in (directory, destination):
        path.mkdir()
    (directory / "scratch.img").touch()
    (destination / store.SCRATCH).touch()  # in the way
    with sockets.listen(directory / "vsock.sock"):
        os.utime(directory / "vsock.sock", (0, 0))
        with pytest.raises(FcvmError):
            create.create(Vmm(fails=fails), directory, destination)  # type: ignore[arg-type]
        assert (directory / "vsock.sock").stat().st_mtime > 0


@pytest.mark.parametrize("by", ["its end", "our dismissal"])
def test_output_for_a_client_that_does_not_read_ends_with_the_client(tmp_path: Path, by: str) -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()  # somebody keeps it open and does not read
    client = server.Client(ours, {}, [write])
    output = ClientOutput(Output(tmp_path / LOG, 1 << 20, show=False, prefix=False), client, prefix=False)
    broken = threading.Event()

    def produce() -> None:
        with contextlib.suppress(BrokenPipeError):
            output.write("stderr", b"for nobody")
            output.write("stdout", bytes(1 << 20))
            return
        broken.set()

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    assert os.read(read, 1000) == bytes(1000)
    if by == "its end":
        theirs.close()
    else:
        client.dismiss()
    assert broken.wait(30)
    assert output.closed
    output.close()
    client.close()
    theirs.close()
    os.close(read)


def test_output_for_a_client_that_reads_is_whole(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    client = server.Client(ours, {}, [write])
    output = ClientOutput(Output(tmp_path / LOG, 1 << 20, show=False, prefix=False), client, prefix=False)
    data = bytes(range(256)) * 1000
    thread = threading.Thread(target=output.write, args=("stdout", data))
    thread.start()
    with open(read, "rb") as file:
        assert file.read(len(data)) == data
    thread.join()
    output.close()
    client.close()
    theirs.close()


@pytest.mark.parametrize("together", [True, False])
def test_lines_are_kept_apart_if_the_client_has_both_streams_in_one_place(tmp_path: Path, together: bool) -> None:
    ours, theirs = socket.socketpair()
    files = [open(tmp_path / name, "w+b") for name in ("out", "out" if together else "err")]  # noqa: SIM115
    client = server.Client(ours, {}, [os.dup(file.fileno()) for file in files])
    kept = Output(tmp_path / LOG, 1 << 20, show=False, prefix=True)
    kept.marks.one_place = not together  # so it is with the server's own
    output = ClientOutput(kept, client, prefix=True)
    output.write("stdout", b"open")
    if together:
        files[1].seek(0, os.SEEK_END)
    output.write("stderr", b"line\n")
    written = (tmp_path / "out").read_bytes() + (b"" if together else (tmp_path / "err").read_bytes())
    assert written == b"[ctr:out] open" + (b"\n" if together else b"") + b"[ctr:err] line\n"
    output.close()
    client.close()
    theirs.close()
    for file in files:
        file.close()


def a_server(tmp_path: Path) -> server.CloneServer:
    return server.CloneServer(server.Settings("tag"), settings.load({"base_dir": str(tmp_path)}), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [None, ConflictError("it is taken"), ValueError("a bug")])
def test_a_clone_is_listed_nowhere_when_its_client_hears_of_its_end(
    tmp_path: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = a_server(tmp_path)
    served.pool = types.SimpleNamespace(status=lambda: pool.Status(0, 0, 0, 0))  # type: ignore[assignment]
    told: list[dict[str, Any]] = []

    def run(client: Client) -> int:
        client.supervisor = types.SimpleNamespace(id="1", spec=types.SimpleNamespace(name="one"))  # type: ignore[assignment]
        assert len(served.status()["clones"]) == 1
        if error is not None:
            raise error
        return 7

    monkeypatch.setattr(served, "_run", run)
    monkeypatch.setattr(servers, "send", lambda _, message: told.append({**message, **served.status()}))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        served._serve(Client(ours, {"op": "run"}, []))
    assert [message["clones"] for message in told] == [[]]
    assert "exit" in told[0] if error is None else "error" in told[0]
    assert served.living() == 0


def test_who_comes_while_a_server_ends_does_not_wait_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clones, its pool and its memory server may take their time."""
    layout, pid = Layout(tmp_path), os.getpid()
    snapshot = types.SimpleNamespace(manifest=types.SimpleNamespace(network="none"))
    monkeypatch.setattr(servers, "ANSWER", 2)
    monkeypatch.setattr(server.descriptors, "allow_all", lambda: None)
    monkeypatch.setattr(server.store, "use", lambda *_: contextlib.nullcontext(snapshot))
    monkeypatch.setattr(server.manifest, "check", lambda *_, **__: None)
    monkeypatch.setattr(server.clones, "spec_of", lambda *_, **__: types.SimpleNamespace(network="none"))
    ended, waiting, stopping = threading.Event(), [], []

    def accept(_: socket.socket) -> None:
        waiting.append(servers.connect(layout, pid, {"op": "status"}))  # which is not accepted any more

    @contextlib.contextmanager
    def filled(*_: object) -> Iterator[None]:
        yield
        with waiting[0] as connection:
            connection.settimeout(2)
            assert list(servers.lines(connection)) == []
        with pytest.raises(NotFoundError):
            servers.call(layout, pid, {"op": "status"})
        stopping.append(threading.Thread(target=lambda: (servers.stop(layout, pid), ended.set())))
        stopping[0].start()
        assert not ended.wait(0.5), "stop waits until it has ended"

    served = a_server(tmp_path)
    served.assets = types.SimpleNamespace(firecracker_version="1")  # type: ignore[assignment]
    monkeypatch.setattr(served, "_kit", lambda *_: None)
    monkeypatch.setattr(served, "_filled", filled)
    monkeypatch.setattr(served, "_accept", accept)
    served.run()
    stopping[0].join(60)
    assert ended.is_set()


def test_a_client_that_says_nothing_does_not_keep_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIME", 0.05)
    with sockets.listen(tmp_path / "sock") as listener, sockets.connect(tmp_path / "sock", timeout=30) as silent:
        a_server(tmp_path)._welcome(listener)
        assert silent.recv(1) == b""


@pytest.mark.parametrize("missing", ["descriptors", "threads"])
def test_a_server_lives_on_without_resources_for_a_client(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> object:
        raise OSError(24, "No descriptors") if missing == "descriptors" else RuntimeError("can't start new thread")

    with sockets.listen(tmp_path / "sock") as listener, sockets.connect(tmp_path / "sock", timeout=30) as client:
        if missing == "threads":
            monkeypatch.setattr(threading.Thread, "start", refuse)
        else:
            monkeypatch.setattr(socket.socket, "accept", refuse)
        a_server(tmp_path)._welcome(listener)
        if missing == "threads":
            assert "can't start new thread" in json.loads(client.makefile().readline())["error"]
    assert "could not be served" in capsys.readouterr().err
