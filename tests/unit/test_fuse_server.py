"""A server and its channels without a kernel: replies, resending, acknowledging, states and journals, and record
ranges.
"""

import base64
import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fuse_support import Client, client, error_of, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st

from fuse_pipe import __main__ as command
from fuse_pipe import channel, linux
from fuse_pipe import journal as journal_module
from fuse_pipe import messages as m
from fuse_pipe import records as records_module
from fuse_pipe import server as server_module
from fuse_pipe import session as session_module
from fuse_pipe import state as state_module
from fuse_pipe.errors import ConnectionLost, FusePipeError, ProtocolError
from fuse_pipe.journal import Journal, Replay
from fuse_pipe.records import set_range
from fuse_pipe.server import Server, listening
from fuse_pipe.session import Session
from fuse_pipe.state import rewrite_journal
from fuse_pipe.volume import Volume


def test_create_write_read_and_names(tmp_path: Path) -> None:
    with client(tmp_path) as c:
        node, fh = c.create(b"f", umask=0o022)
        assert c.call(m.WRITE, node, b"hello", fh=fh, offset=3, size=5)[0][0].size == 5
        assert c.call(m.READ, node, fh=fh, offset=0, size=100)[1] == b"\0\0\0hello"
        assert (tmp_path / "f").read_bytes() == b"\0\0\0hello"
        assert c.lookup(b"f").nodeid == node
        made = c.call(m.MKDIR, m.ROOT_ID, b"d", mode=0o777, umask=0o027)[0][0]
        assert stat.S_IMODE(made.mode) == 0o750
        c.call(m.RENAME2, m.ROOT_ID, b"f", b"g", newdir=made.nodeid)
        assert c.lookup(b"g", made.nodeid).nodeid == node
        assert c.lookup(b"f").nodeid == 0  # a name that is believed not to exist
        assert c.call(m.SYMLINK, m.ROOT_ID, b"l", b"../target")[0][0].size == 9
        assert c.call(m.READLINK, c.lookup(b"l").nodeid)[1] == b"../target"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root acts for others")
def test_only_what_makes_files_is_done_as_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acting: list[str] = []

    def acting_ids() -> None:
        status = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text().splitlines()
        acting.extend(line.split()[-1] for line in status if line.startswith(("Uid:", "Gid:")))

    tmp_path.chmod(0o777)
    chmod = os.chmod
    monkeypatch.setattr(os, "chmod", lambda *args: (acting_ids(), chmod(*args)))
    with client(tmp_path) as c:
        node, _ = c.create(b"f", caller=(1000, 100, 5))
        assert ((tmp_path / "f").stat().st_uid, (tmp_path / "f").stat().st_gid) == (1000, 100)
        c.call(m.SETATTR, node, valid=m.FATTR_MODE, mode=0o600, caller=(0, 0, 6))
        assert acting == ["0", "0"]
        c.call(m.MKDIR, m.ROOT_ID, b"d", mode=0o755, caller=(1000, 100, 5))
        assert (tmp_path / "d").stat().st_uid == 1000


def test_init_agrees_on_what_both_can(tmp_path: Path) -> None:
    with client(tmp_path) as c:
        answer = c.init()
        assert (answer.major, answer.max_write, answer.max_pages) == (7, 1 << 20, 256)
        assert answer.flags & m.HANDLE_KILLPRIV_V2
        assert not answer.flags & (m.WRITEBACK_CACHE | m.EXPORT_SUPPORT | m.NO_OPEN_SUPPORT)
        assert c.init(m.ASYNC_READ).flags == m.ASYNC_READ
        with pytest.raises(OSError, match="Protocol error"):
            c.call(m.INIT, major=7, minor=30)
        assert c.call(m.INIT, major=8, minor=0)[0][0].major == 7


@pytest.mark.parametrize(("opcode", "node", "tail", "fields", "expected"), [
    (m.GETATTR, 999, (), {}, "ESTALE"),
    (m.LOOKUP, 999, (b"x",), {}, "ESTALE"),
    (m.READ, 1, (), {"fh": 77, "size": 10}, "EBADF"),
    (m.WRITE, 1, (b"x",), {"fh": 77, "size": 1}, "EBADF"),
    (m.RELEASE, 1, (), {"fh": 77}, "EBADF"),
    (m.OPEN, 1, (), {"flags": 0}, "EISDIR"),
    (m.MKNOD, 1, (b"x",), {"mode": stat.S_IFLNK | 0o777}, "EINVAL"),
    (m.RENAME2, 1, (b"a", b"b"), {"newdir": 1, "flags": 64}, "EINVAL"),
    (m.RENAME2, 1, (b"a", b"b"), {"newdir": 5}, "ESTALE"),
    (m.IOCTL, 1, (b"",), {}, "ENOTTY"),
    (m.POLL, 1, (), {}, "ENOSYS"),
    (m.BMAP, 1, (), {}, "ENOSYS"),
    (m.SETUPMAPPING, 1, (), {}, "ENOSYS"),
    (m.UNLINK, 1, (b"none",), {}, "ENOENT"),
    (m.READLINK, 1, (), {}, "EINVAL"),
    (m.SETLK, 1, (), {"fh": 77, "type": 1, "start": 0, "end": 10}, "EBADF"),
    (m.SETLK, 1, (), {"fh": 77, "type": 9, "start": 0, "end": 10}, "EINVAL"),
])  # fmt: skip
def test_refusals(
    tmp_path: Path, opcode: int, node: int, tail: tuple[bytes, ...], fields: dict[str, int], expected: str
) -> None:
    with client(tmp_path) as c:
        assert error_of(c.call, opcode, node, *tail, **fields) == expected


def test_devices_and_pipes_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with client(tmp_path) as c:
        node = c.lookup(b"fifo").nodeid
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            assert error_of(c.call, m.OPEN, node, flags=flags) == "EINVAL"
        assert error_of(c.create, b"fifo") == "EINVAL"


def test_a_name_that_became_a_link_is_not_followed(tmp_path: Path) -> None:
    """The host (or the guest) swaps a directory for a symbolic link between lookup and use."""
    outside = tmp_path / "outside"
    (tmp_path / "root" / "d").mkdir(parents=True)
    outside.mkdir()
    (outside / "f").write_text("secret")
    with client(tmp_path / "root") as c:
        node = c.lookup(b"d").nodeid
        (tmp_path / "root" / "d").rename(tmp_path / "root" / "elsewhere")
        (tmp_path / "root" / "d").symlink_to(outside)
        assert error_of(c.lookup, b"f", node) in ("ESTALE", "ENOENT") or c.lookup(b"f", node).nodeid == 0
        assert stat.S_ISLNK(c.lookup(b"d").mode)


def test_forget_ends_a_node(tmp_path: Path) -> None:
    with client(tmp_path) as c:
        (tmp_path / "f").touch()
        node = c.lookup(b"f").nodeid
        assert c.lookup(b"f").nodeid == node
        c.send(m.FORGET, node, nlookup=1)
        c.call(m.GETATTR, node)
        c.send(m.BATCH_FORGET, 0, m.FORGET_ONE.pack(node, 1), count=1)
        assert error_of(c.call, m.GETATTR, node) == "ESTALE"
        assert c.lookup(b"f").nodeid != node


def test_readdir_by_offsets(tmp_path: Path) -> None:
    for n in range(500):
        (tmp_path / f"{n:03}").touch()
    with client(tmp_path) as c:
        fh = c.call(m.OPENDIR, flags=os.O_RDONLY)[0][0].fh
        names, offset = [], 0
        while data := c.call(m.READDIR, fh=fh, offset=offset, size=600)[1]:
            at = 0
            while at < len(data):
                _, offset, length, _ = m.DIRENT.unpack_from(data, at)
                names.append(data[at + 24 : at + 24 + length].decode())
                at += 24 + length + -length % 8
        assert sorted(names) == sorted([".", "..", *(f"{n:03}" for n in range(500))])
        data = c.call(m.READDIRPLUS, fh=fh, offset=0, size=4096)[1]
        assert len(data) <= 4096


def test_an_unanswered_request_is_answered_again_but_not_done_again(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    first = Client(server)
    first.init()
    first.send(m.MKDIR, m.ROOT_ID, b"d", mode=0o755)
    first.receive()
    first.close()
    # The relay had the answer to INIT only: it says that it has 1 message, and that it sent 2.
    second = Client(server, base=0, received=1)
    assert second.hello["received"] == 2
    unique, error, (entry,), _ = m.decode_reply(m.MKDIR, second.receive())
    assert error == 0
    assert entry.nodeid
    second.close()
    third = Client(server, base=0, received=9)  # it cannot have more than was sent
    assert third.hello == {"error": "messages are missing"}
    third.close()
    server.close()
    assert unique


def test_acknowledgements_come_and_are_taken(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    for _ in range(100):
        c.call(m.GETATTR)
    assert c.acks
    held = server.sessions["test"].channels[0]
    assert len(held.unacked) == 101
    c.sock.sendall(m.IN_HEADER.pack(m.IN_HEADER.size, channel.ACK, 90, 0, 0, 0, 0, 0, 0))
    c.call(m.GETATTR)
    assert len(held.unacked) == 12
    c.close()
    server.close()


def test_a_second_connection_of_a_channel_replaces_the_first(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    first = Client(server)
    first.init()
    second = Client(server, base=0, received=1)
    second.call(m.GETATTR)
    with pytest.raises((ConnectionLost, OSError)):
        first.receive()
    first.close()
    second.close()
    server.close()


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b"not json\n",
        b'{"fuse_pipe": 2}\n',
        b'{"fuse_pipe": 1, "session": "../x", "channel": 0, "base": 0, "received": 0}\n',
        b'{"fuse_pipe": 1, "session": "x", "channel": 9999, "base": 0, "received": 0}\n',
        b'{"fuse_pipe": 1, "session": "x", "channel": 0, "base": %d, "received": 0}\n' % (1 << 64),
        b'{"fuse_pipe": 1, "session": "x", "channel": 0, "base": 0, "received": -1}\n',
        b"x" * 5000,
    ],
)
def test_bad_hellos_end_the_connection(tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(str(tmp_path))
    near, far = socket.socketpair()
    thread = threading.Thread(target=server.connection, args=(far,))
    thread.start()
    near.sendall(line)
    thread.join(60)
    assert not thread.is_alive()
    near.close()
    assert not [record for record in caplog.records if record.exc_info]  # a guest fills no log with tracebacks
    server.close()


def test_many_large_answers_are_not_made_before_the_first_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = channel.Channel.send

    def note(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        sent.append(sum(len(buffer) for message in messages for buffer in message))
        send(self, messages)

    with client(tmp_path) as c:
        node, fh = c.create(b"f")
        os.truncate(tmp_path / "f", 1 << 20)
        monkeypatch.setattr(channel.Channel, "send", note)
        requests = [
            m.encode_request(m.READ, 1000 + 2 * n, node, fh=fh, offset=0, size=1 << size)
            for n, size in enumerate([15] * 100 + [20] * 30)
        ]
        c.sock.sendall(b"".join(requests))
        assert [m.decode_reply(m.READ, c.receive())[0] for _ in requests] == [1000 + 2 * n for n in range(130)]
    assert max(sent) < 4 << 20


def test_names_that_came_and_went_are_not_remembered(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    table = server.sessions["test"].volume.table
    for n in range(20):
        name, other = b"%d" % n, b"%d.new" % n
        assert c.lookup(name).nodeid == 0  # as the kernel does before it creates something
        c.create(name)
        c.call(m.RENAME2, m.ROOT_ID, name, other, newdir=m.ROOT_ID)
        c.call(m.UNLINK, m.ROOT_ID, other)
    assert table.negatives == len(table.root.children) == 0
    directory = c.call(m.MKDIR, m.ROOT_ID, b"d", mode=0o777)[0][0].nodeid
    for parent in (m.ROOT_ID, directory):
        assert c.lookup(b"none", parent).nodeid == 0
    assert table.negatives == 2
    c.send(m.FORGET, directory, nlookup=1)
    c.call(m.GETATTR)
    assert table.negatives == 1
    c.close()
    server.close()


def test_an_open_file_of_a_lost_server_is_not_another_one(tmp_path: Path) -> None:
    handles = []
    for name in (b"a", b"b"):
        server = Server(str(tmp_path))
        c = Client(server)
        c.init()
        handles.append(c.create(name))
        if handles[1:]:
            assert error_of(c.call, m.READ, handles[0][0], fh=handles[0][1], offset=0, size=9) == "EBADF"
        c.close()
        server.close()


def test_what_nobody_acknowledges_is_not_kept_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "KEPT_BYTES", 8 << 20)
    server = Server(str(tmp_path))
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    received = [0] * 4
    for number in (0, 1, 2, 3) * 3:  # channels of one mount, each well below what one may keep
        c = Client(server, number=number, received=received[number])
        c.sock.settimeout(1)
        try:
            if not any(received):
                c.init()
                received[0] += 1
                node = c.lookup(b"f").nodeid
                fh = c.call(m.OPEN, node, flags=os.O_RDONLY)[0][0].fh
                received[0] += 2
            for _ in range(4):
                c.call(m.READ, node, fh=fh, offset=0, size=1 << 20)
                received[number] += 1
        except (OSError, ConnectionLost):
            pass
        c.close()
    kept = sum(sum(map(len, message)) for ch in server.sessions["test"].channels.values() for message in ch.unacked)
    assert kept < 10 << 20
    server.close()


def test_a_channel_that_is_full_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "KEPT_MESSAGES", 3)
    full = channel.server_channel(0)
    for _ in range(9):
        with contextlib.suppress(ProtocolError):
            full.send([(b"answer",)])
    assert len(full.unacked) == 4


def test_a_wait_that_is_asked_for_twice_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[object] = []
    monkeypatch.setattr(session_module, "_wake", woken.append)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9, "type": fcntl.F_WRLCK}
    c.call(m.SETLK, node, owner=1, **lock)
    c.sock.sendall(m.encode_request(m.SETLKW, 1000, node, owner=2, **lock) * 50)
    c.call(m.GETATTR)
    assert sum(thread.name == "fuse_pipe slow" for thread in threading.enumerate()) == 1
    wait_for(lambda: server.sessions["test"].waiting, "the wait")
    c.sock.sendall(m.encode_request(m.INTERRUPT, 1001, node, unique=1000) * 50)
    c.call(m.GETATTR)
    wait_for(lambda: woken, "the interrupt")
    assert len(woken) == 1
    unlocked = c.send(m.SETLK, node, owner=1, **{**lock, "type": fcntl.F_UNLCK})
    assert {m.decode_reply(m.SETLKW, c.receive())[0] for _ in range(2)} == {unlocked, 1000}
    c.close()
    server.close()


def test_without_room_for_threads_requests_fail_and_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    path = tmp_path / "socket"
    with listening(str(path)) as listener:
        accepting = threading.Thread(target=server.accept, args=(listener,), daemon=True)
        accepting.start()
        start = threading.Thread.start

        def none(_: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", none)
        assert error_of(c.call, m.FSYNC, node, fh=fh) == "ENOLCK"
        with socket.socket(socket.AF_UNIX) as refused:
            refused.settimeout(60)
            refused.connect(str(path))
            assert refused.recv(1) == b""
        monkeypatch.setattr(threading.Thread, "start", start)
        c.call(m.FSYNC, node, fh=fh)
        wait_for(lambda: not server.sessions["test"].slow, "the end of the request")
        assert accepting.is_alive()
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join(60)
    c.close()
    server.close()


def test_without_room_for_threads_a_wait_is_interrupted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9, "type": fcntl.F_WRLCK}
    c.call(m.SETLK, node, owner=1, **lock)
    waiting = c.send(m.SETLKW, node, owner=2, **lock)
    wait_for(lambda: server.sessions["test"].waiting, "the wait")

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        c.send(m.INTERRUPT, node, unique=waiting)
        assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (-errno.EINTR, waiting)
        c.call(m.GETATTR)
    c.close()
    server.close()


def test_a_request_whose_thread_cannot_do_anything_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a state would wait for it for ever."""
    this_worker = session_module.this_worker

    def none() -> Any:
        if threading.current_thread().name == "fuse_pipe slow":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return this_worker()

    monkeypatch.setattr(session_module, "this_worker", none)
    with client(tmp_path) as c:
        node, fh = c.create(b"f")
        assert error_of(c.call, m.FSYNC, node, fh=fh) == "ENOMEM"


def test_a_request_is_in_the_state_until_its_answer_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would answer it in a clone."""
    reached, go = threading.Event(), threading.Event()
    send = channel.Channel.send

    def late(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        if threading.current_thread().name == "fuse_pipe slow":
            reached.set()
            assert go.wait(60)
        send(self, messages)

    monkeypatch.setattr(channel.Channel, "send", late)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    unique = c.send(m.FSYNC, node, fh=fh)
    assert reached.wait(60)
    (state,) = server.save()["sessions"]
    assert len(state["waiting"]) == 1
    go.set()
    assert m.decode_reply(m.FSYNC, c.receive())[0] == unique
    wait_for(lambda: not server.save()["sessions"][0]["waiting"], "the end of the request")
    c.close()
    server.close()


def saved_in_time(server: Server) -> dict[str, Any]:
    """The state of the one mount; not having it fails the test rather than hang it."""
    states: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: states.extend(server.save()["sessions"]), daemon=True)
    thread.start()
    thread.join(60)
    assert states, "the state is waited for in vain"
    return states[0]


def test_a_state_waits_for_no_lock_that_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for one whose thread was not there yet when it looked first: who would give it up is held off."""
    go = threading.Event()
    wait = Session._wait

    def late(self: Session, *arguments: Any) -> Any:
        assert go.wait(60)
        return wait(self, *arguments)

    monkeypatch.setattr(Session, "_wait", late)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9}
    c.call(m.SETLK, node, owner=1, type=fcntl.F_WRLCK, **lock)
    waiting = c.send(m.SETLKW, node, owner=2, type=fcntl.F_WRLCK, **lock)
    session = server.sessions["test"]
    wait_for(lambda: session.slow, "the request")
    states: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: states.extend(server.save()["sessions"]), daemon=True)
    thread.start()
    wait_for(lambda: session.idle._waiters, "the look")
    go.set()
    thread.join(60)
    assert [len(state["waiting"]) for state in states] == [1]
    unlocked = c.send(m.SETLK, node, owner=1, type=fcntl.F_UNLCK, **lock)
    assert {m.OUT_HEADER.unpack_from(c.receive())[2] for _ in range(2)} == {unlocked, waiting}
    c.close()
    server.close()


def test_a_state_does_not_miss_the_end_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go = threading.Event(), threading.Event()
    send = channel.Channel.send

    def late(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        if threading.current_thread().name == "fuse_pipe slow":
            reached.set()
            assert go.wait(60)
        send(self, messages)

    class Looked(dict[int, Any]):
        """When it is looked at, the request ends, if it can."""

        def __iter__(self) -> Iterator[int]:
            if not session.lock.locked():
                go.set()
                wait_for(lambda: not session.slow, "the end")
            return super().__iter__()

    monkeypatch.setattr(channel.Channel, "send", late)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    session = server.sessions["test"]
    c.send(m.FSYNC, node, fh=fh)
    assert reached.wait(60)
    session.waiting = Looked()
    assert saved_in_time(server)["name"] == "test"
    go.set()
    c.receive()
    c.close()
    server.close()


def test_who_comes_to_wait_for_a_lock_disturbs_no_state(tmp_path: Path) -> None:
    """The thread of a request that waits is not held off."""
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    c.call(m.SETLK, node, fh=fh, owner=1, start=0, end=9, type=fcntl.F_WRLCK)
    records = server.sessions["test"].volume.records

    class Growing(dict[int, Any]):
        """While one looks at it another owner comes, if it can."""

        def items(self) -> Any:
            for item in super().items():
                yield item
                if not records.lock.locked():
                    records.add(node, 2, item[1].fd, 0)

    records.nodes[node] = Growing(records.nodes[node])
    assert [owner for _, owner, *_ in saved_in_time(server)["volume"]["locks"]] == [1]
    c.close()
    server.close()


def test_a_wait_that_was_interrupted_is_so_in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so once."""
    reached, go = threading.Event(), threading.Event()
    wake = session_module._wake

    def late(waiting: session_module.Waiting) -> None:
        reached.set()
        assert go.wait(60)
        wake(waiting)

    monkeypatch.setattr(session_module, "_wake", late)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9, "type": fcntl.F_WRLCK}
    c.call(m.SETLK, node, owner=1, **lock)
    waiting = c.send(m.SETLKW, node, owner=2, **lock)
    session = server.sessions["test"]
    wait_for(lambda: session.waiting, "the wait")
    c.send(m.INTERRUPT, node, unique=waiting)
    assert reached.wait(60)
    state = server.save()
    other = Server(str(tmp_path), state=state)
    clone = Client(other, base=0, received=3)
    assert m.OUT_HEADER.unpack_from(clone.receive())[1:] == (-errno.EINTR, waiting)
    go.set()
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (-errno.EINTR, waiting)
    wait_for(lambda: not server.sessions["test"].slow, "the end of the request")
    assert not server.sessions["test"].interrupted
    for each in (clone, c, other, server):
        each.close()


def test_answers_that_are_about_to_be_sent_are_in_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request counts as taken in: a clone's relay would not ask again."""
    reached, go = threading.Event(), threading.Event()
    send = channel.Channel.send

    def late(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        if messages:
            reached.set()
            assert go.wait(60)
        send(self, messages)

    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    with monkeypatch.context() as patch:
        patch.setattr(channel.Channel, "send", late)
        unique = c.send(m.GETATTR)
        assert reached.wait(60)
        (before,) = server.save()["sessions"][0]["channels"]
        go.set()
        answer = c.receive()
    (after,) = server.save()["sessions"][0]["channels"]
    assert m.OUT_HEADER.unpack_from(answer)[2] == unique
    assert base64.b64decode(before[3][-1]) == answer
    assert before == after
    c.close()
    server.close()


def test_state_goes_through_json(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    server = Server(str(tmp_path / "root"))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    c.call(m.WRITE, node, b"one", fh=fh, offset=0, size=3)
    c.call(m.SETLK, node, fh=fh, owner=5, start=0, end=9, type=fcntl.F_WRLCK, pid=33)
    state = json.loads(json.dumps(server.save()))
    c.close()
    server.close()
    other = Server(str(tmp_path / "root"), state=state)
    c = Client(other, base=0, received=4)
    assert c.call(m.READ, node, fh=fh, offset=0, size=10)[1] == b"one"
    found = c.call(m.GETLK, node, fh=fh, owner=6, start=0, end=0, type=fcntl.F_WRLCK)[0][0]
    assert (found.type, found.pid, found.end) == (fcntl.F_WRLCK, 33, 9)
    assert c.create(b"g")[1] > fh
    c.close()
    other.close()
    with pytest.raises(FusePipeError):
        Server(str(tmp_path / "root"), state={"version": 99})
    with pytest.raises(FusePipeError):
        Server(str(tmp_path / "root"), state={"version": 1, "sessions": [{"name": "x"}]})


def test_journal_replays_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    journal = Journal(path)
    journal.add(("learn", 1, 0, b"", stat.S_IFDIR, 5, 6))
    journal.add(("learn", 7, 1, b"a", stat.S_IFREG, 5, 8))
    journal.add(("learn", 8, 1, b"b", stat.S_IFREG, 5, 9))
    journal.add(("open", 3, 7, os.O_RDWR))
    journal.add(("rename", 1, b"a", 1, b"c", False))
    journal.add(("lock", 7, 1, 2, 0, 9, fcntl.F_WRLCK))
    journal.add(("answer", 42, b"reply"))
    journal.add(("forget", 8, 1))
    journal.flush()
    with path.open("ab") as file:
        file.write(b"cut sho")  # the server was killed while it wrote
    size = path.stat().st_size
    replay = Replay()
    replay.read(path)
    assert path.stat().st_size == size - len(b"cut sho")  # what is added now can be read
    state = replay.state("x")
    assert [node[:2] for node in state["volume"]["nodes"]] == [[1, 0], [7, 1]]
    assert state["volume"]["handles"] == [[3, 7, os.O_RDWR, fcntl.F_UNLCK, []]]
    assert state["volume"]["locks"] == [[7, 1, 2, [(0, 9, fcntl.F_WRLCK)]]]
    assert len(state["answers"]) == 1
    journal.rewrite(lambda: state)
    again = Replay()
    again.read(path)
    assert [node[:2] for node in again.state("x")["volume"]["nodes"]] == [[1, 0], [7, 1]]
    journal.close(remove=True)
    assert not path.exists()


def test_a_journal_of_much_is_not_rewritten_with_every_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewritten: list[int] = []
    rewrite = Journal.rewrite

    def note(self: Journal, make_state: Callable[[], dict[str, Any]]) -> None:
        rewrite(self, make_state)
        rewritten.append(self.path.stat().st_size)

    monkeypatch.setattr(journal_module, "REWRITE", 2000)
    monkeypatch.setattr(journal_module, "REWRITE_AGAIN", 0.0, raising=False)
    monkeypatch.setattr(server_module, "REWRITE", 2000, raising=False)
    monkeypatch.setattr(Journal, "rewrite", note)
    (tmp_path / "root").mkdir()
    with client(tmp_path / "root", journals=str(tmp_path / "journals")) as c:
        for n in range(200):
            c.create(b"%d" % n)
        wait_for(lambda: rewritten and rewritten[-1] > 4000, "a rewrite")
        before = len(rewritten)
        for _ in range(100):
            c.call(m.GETATTR)
        assert len(rewritten) <= before + 2


def test_a_full_disk_costs_the_journal_and_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "REWRITE_AGAIN", 0.0, raising=False)
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    write = os.write
    room = 0

    def little_room(fd: int, data: bytes | memoryview) -> int:
        if "journal" not in os.readlink(f"/proc/self/fd/{fd}"):
            return write(fd, data)
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, bytes(data)[:room])

    monkeypatch.setattr(os, "write", little_room)
    first = c.create(b"a")
    c.call(m.WRITE, first[0], b"one", fh=first[1], offset=0, size=3)
    room = 100  # bytes at a time
    second = c.create(b"b")
    c.call(m.GETATTR)

    def known() -> bool:
        replay = Replay()
        replay.read(Path(shutil.copy(journals / "test.journal", tmp_path / "look")))
        return second[1] in replay.handles

    wait_for(known, "a new journal")
    c.create(b"c")
    other = Server(str(root), journals=str(shutil.copytree(journals, tmp_path / "copy")))  # as after SIGKILL
    assert other.sessions["test"].volume.handle(first[1]).node.id == first[0]
    assert len(other.sessions["test"].volume.handles) == 3
    other.close()
    c.close()
    server.close()


def killed(server: Server, journals: Path, root: Path) -> Server:
    """A server that starts as after SIGKILL of this one, at this moment."""
    return Server(str(root), journals=str(shutil.copytree(journals, journals.with_name(f"{journals.name}+"))))


def test_what_was_done_is_not_done_again_however_much_came_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the answers to quiet writes: thousands of them are read at once."""
    root, journals, count, done = tmp_path / "root", tmp_path / "journals", 5000, 3000
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server, quiet=True)
    c.init()
    node, fh = c.create(b"log", flags=os.O_WRONLY | os.O_APPEND)
    lines = [b"%07d\n" % n for n in range(count)]
    append = {"fh": fh, "offset": 0, "size": 8, "flags": os.O_WRONLY | os.O_APPEND}
    requests = [bytearray(m.encode_request(m.WRITE, 1000 + 2 * n, node, line, **append)) for n, line in enumerate(lines)]
    for request in requests:
        request[channel.QUIET_AT] = 1
    others: list[Server] = []
    pwritev = os.pwritev

    def until_it_is_killed(*arguments: Any) -> int:
        if (root / "log").stat().st_size == done * 8:
            if not others:
                others.append(killed(server, journals, root))
            raise OSError(errno.EIO, "killed")
        return pwritev(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", until_it_is_killed)
        c.sock.sendall(b"".join(requests))
        with pytest.raises(OSError, match="Bad file"):
            c.call(m.FLUSH, node, fh=fh + 1)
    told = max(ack for ack in c.acks if ack <= done + 2) - 2  # INIT and CREATE; the relay has forgotten these writes
    c.close()
    server.close()
    (other,) = others
    c = Client(other, quiet=True)
    c.unique = 1000 + 2 * count
    c.sock.sendall(b"".join(requests[told:]))
    c.call(m.FLUSH, node, fh=fh)
    assert (root / "log").read_bytes() == b"".join(lines)
    c.close()
    other.close()


def test_answers_outlive_a_second_kill_and_a_new_journal(tmp_path: Path) -> None:
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    made = c.send(m.MKDIR, m.ROOT_ID, b"d", mode=0o755)
    entry = c.receive()
    rewrite_journal(server.sessions["test"])
    once = killed(server, journals, root)
    again = killed(once, Path(f"{journals}+"), root)
    c.close()
    c = Client(again)
    c.unique = made - 2
    assert c.send(m.MKDIR, m.ROOT_ID, b"d", mode=0o755) == made
    assert c.receive() == entry
    c.close()
    for each in (server, once, again):
        each.close()


def test_what_was_forgotten_is_not_forgotten_again(tmp_path: Path) -> None:
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    (root / "f").touch()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node = c.lookup(b"f").nodeid
    c.lookup(b"f")
    forgets = [c.send(m.FORGET, node, nlookup=1)]
    c.call(m.GETATTR)
    other = killed(server, journals, root)
    c.close()
    c = Client(other)
    c.unique = forgets[0] - 2
    c.send(m.FORGET, node, nlookup=1)
    assert c.call(m.GETATTR, node)[0][0].ino == (root / "f").stat().st_ino
    c.send(m.FORGET, node, nlookup=1)
    assert error_of(c.call, m.GETATTR, node) == "ESTALE"
    c.close()
    server.close()
    other.close()


def test_a_lock_is_noted_before_its_answer_goes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c, notifications = Client(server), Client(server, number=channel.NOTIFY)
    c.init()
    node, fh = c.create(b"f")
    noted: list[object] = []
    send = channel.Channel.send

    def look(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        if self.number == channel.NOTIFY and messages:
            replay = Replay()
            replay.read(Path(shutil.copy(journals / "test.journal", tmp_path / "look")))
            noted.append(replay.state("test")["volume"]["locks"])
        send(self, messages)

    monkeypatch.setattr(channel.Channel, "send", look)
    c.send(m.SETLK, node, fh=fh, owner=5, start=0, end=9, type=fcntl.F_WRLCK, pid=33)
    notifications.receive()
    wait_for(lambda: noted, "the answer")
    assert noted[0] == [[node, 5, 33, [(0, 9, fcntl.F_WRLCK)]]]
    c.close()
    notifications.close()
    server.close()


def test_a_lock_of_an_open_file_ends_with_it_in_the_next_server_too(tmp_path: Path) -> None:
    """One of F_OFD_SETLK: no FLUSH names its owner, only RELEASE gives it up."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    c.call(m.SETLK, node, fh=fh, owner=77, start=0, end=9, type=fcntl.F_WRLCK, pid=33)
    state = server.save()
    shutil.copytree(journals, tmp_path / "killed")
    c.close()
    server.close()
    for options in ({"journals": str(tmp_path / "killed")}, {"journals": str(tmp_path / "killed")}, {"state": state}):
        server = Server(str(root), **options)
        assert held(server) == [(node, 77)]
        copy = shutil.copytree(tmp_path / "killed", tmp_path / "at work")
        c = Client(server, received=3)
        c.unique = 1000
        c.call(m.FLUSH, node, fh=fh, lock_owner=5)
        assert held(server) == [(node, 77)]
        c.call(m.RELEASE, node, fh=fh)
        assert held(server) == []
        c.close()
        server.close()
        shutil.rmtree(tmp_path / "killed")
        copy.rename(tmp_path / "killed")


def held(server: Server) -> list[tuple[int, int]]:
    """Node and owner of record locks, as a saved state has them."""
    (session,) = server.save()["sessions"]
    return [(node, owner) for node, owner, *_ in session["volume"]["locks"]]


def test_a_lock_that_is_got_while_the_journal_begins_anew_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for one is not held off meanwhile."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    with (root / "f").open("r+b") as host:
        linux.ofd_lock(host.fileno(), linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 10)
        fcntl.flock(host, fcntl.LOCK_EX)
        c.send(m.SETLKW, node, fh=fh, owner=5, start=0, end=9, type=fcntl.F_WRLCK, pid=33)
        c.send(m.SETLKW, node, fh=fh, owner=6, start=0, end=9, type=fcntl.F_WRLCK, lk_flags=m.LK_FLOCK)
        session = server.sessions["test"]
        wait_for(lambda: len(session.waiting) == 2, "the waits")
        volume = session.volume
        save_volume = state_module._save_volume

        def granted_behind(saved: Volume) -> dict[str, Any]:
            state = save_volume(saved)
            fcntl.flock(host, fcntl.LOCK_UN)
            linux.ofd_lock(host.fileno(), linux.F_OFD_SETLK, fcntl.F_UNLCK, 0, 0)
            wait_for(lambda: held_by(volume, node, 5) and volume.handles[fh].flock == fcntl.F_WRLCK, "the locks")
            return state

        with monkeypatch.context() as patch:
            patch.setattr(state_module, "_save_volume", granted_behind)
            rewrite_journal(session)
        for _ in range(2):
            c.receive()
        replay = Replay()
        replay.read(Path(shutil.copy(journals / "test.journal", tmp_path / "look")))
        state = replay.state("test")["volume"]
        assert state["locks"] == [[node, 5, 33, [(0, 9, fcntl.F_WRLCK)]]]
        assert state["handles"] == [[fh, node, os.O_RDWR, fcntl.F_WRLCK, [5]]]
        c.close()
        server.close()


def test_a_journal_that_cannot_begin_anew_has_what_was_added_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.journal"
    journal = Journal(path)
    journal.add(("open", 3, 7, os.O_RDWR))

    def state() -> dict[str, Any]:
        journal.add(("flock", 3, fcntl.F_WRLCK))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        journal.rewrite(state)
    journal.flush()
    replay = Replay()
    replay.read(path)
    assert replay.handles == {3: [3, 7, os.O_RDWR, fcntl.F_WRLCK, []]}
    journal.close(remove=True)


def test_nobody_answers_before_what_another_thread_writes_for_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.journal"
    journal = Journal(path)
    begun, go = threading.Event(), threading.Event()
    write = journal_module._write

    def late(fd: int, data: bytes) -> None:
        begun.set()
        assert go.wait(60)
        write(fd, data)

    monkeypatch.setattr(journal_module, "_write", late)
    sizes: list[int] = []

    def flush() -> None:
        journal.flush()
        sizes.append(path.stat().st_size)

    journal.add(("flock", 3, fcntl.F_WRLCK))
    first = threading.Thread(target=flush, daemon=True)
    first.start()
    assert begun.wait(60)
    second = threading.Thread(target=flush, daemon=True)
    second.start()
    second.join(0.2)
    go.set()
    for thread in (first, second):
        thread.join(60)
    assert sizes == [path.stat().st_size] * 2
    assert 0 not in sizes
    journal.close(remove=True)


def test_a_journal_that_is_closed_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thread may come late: the number of the journal's descriptor is another file's by then."""
    journal = Journal(tmp_path / "x.journal")
    journal.close(remove=True)
    with (tmp_path / "precious").open("wb"):
        journal.add(("flock", 3, fcntl.F_WRLCK))
        journal.flush()
        journal.rewrite(dict)
    assert (tmp_path / "precious").read_bytes() == b""
    assert os.listdir(tmp_path) == ["precious"]
    assert not caplog.records


def test_a_gate_is_open_when_everybody_who_closed_it_has_opened_it() -> None:
    gate = session_module.Gate()
    entered = threading.Event()

    def enter() -> None:
        with gate:
            entered.set()

    gate.close()
    gate.close()  # a state is saved while a journal begins anew
    gate.open()
    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    assert not entered.wait(0.2)
    gate.open()
    assert entered.wait(60)
    thread.join(60)
    gate.close()
    gate.end()
    gate.open()
    with pytest.raises(ConnectionLost), gate:
        pass


def held_by(volume: Volume, node: int, number: int) -> bool:
    owner = volume.records.owner(node, number)
    return owner is not None and bool(owner.held)


def test_a_lost_journal_is_not_replaced_by_an_older_state(tmp_path: Path) -> None:
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root))
    c = Client(server)
    c.init()
    _, handle = c.create(b"a")
    state = server.save()
    c.close()
    server.close()
    journals.mkdir()
    (journals / "test.journal").touch()
    other = Server(str(root), state=state, journals=str(journals))
    assert handle not in other.sessions["test"].volume.handles
    other.close()


def test_a_directory_that_is_gone_gives_eio(tmp_path: Path) -> None:
    with client(tmp_path / "none") as c:
        for opcode in (m.GETATTR, m.STATFS, m.OPENDIR):
            assert error_of(c.call, opcode) == "EIO"


def test_reader_refuses_impossible_lengths() -> None:
    near, far = socket.socketpair()
    near.sendall(b"\xff\xff\xff\xff")
    reader = channel.Reader(far, 16, 1000)
    reader.more()
    with pytest.raises(ProtocolError):
        reader.next()
    near.close()
    with pytest.raises(ConnectionLost):
        reader.more()
    far.close()


class LikeVsock(socket.socket):
    """A stream that is not waited on for more than its buffer can hold, as Linux's vsock (``__vsock_stream_recvmsg``)."""

    family = socket.AF_VSOCK

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        if flags & socket.MSG_WAITALL and (nbytes or len(buffer)) >= 256 * 1024:
            raise OSError(errno.ENOMEM, "more than the buffer")
        return super().recv_into(buffer, nbytes, flags)


def test_a_message_that_is_longer_than_the_buffer_of_vsock_is_read() -> None:
    near, far = socket.socketpair()
    message = (1 << 20).to_bytes(4, "little") + os.urandom((1 << 20) - 4)
    with near, LikeVsock(fileno=far.detach()) as sock:
        sender = threading.Thread(target=near.sendall, args=(message,))
        sender.start()
        reader = channel.Reader(sock, 16, m.MAX_REQUEST)
        found = None
        while found is None:
            reader.more()
            found = reader.next()
        sender.join()
        assert found == message


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30), st.integers(0, 30), st.sampled_from([fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK])
        ),
        max_size=12,
    )
)
def test_ranges_are_what_they_are_byte_by_byte(operations: list[tuple[int, int, int]]) -> None:
    held: list[tuple[int, int, int]] = []
    bytes_: dict[int, int] = {}
    for a, b, kind in operations:
        start, end = min(a, b), max(a, b)
        held = set_range(held, start, end, kind)
        for n in range(start, end + 1):
            bytes_[n] = kind
        expanded = {n: kind for first, last, kind in held for n in range(first, last + 1)}
        assert expanded == {n: kind for n, kind in bytes_.items() if kind != fcntl.F_UNLCK}
        assert all(one[1] + 1 < two[0] or one[2] != two[2] for one, two in itertools.pairwise(held))


def test_what_a_mount_may_lock_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each owner of locks takes a descriptor, which other mounts of this process need too."""
    monkeypatch.setattr(records_module, "RANGES", 10)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    with contextlib.closing(server), contextlib.closing(c):
        node, fh = c.create(b"f")
        records = server.sessions["test"].volume.records

        def lock(owner: int, at: int, end: int | None = None, kind: int = fcntl.F_RDLCK) -> None:
            c.call(m.SETLK, node, fh=fh, owner=owner, start=at, end=at if end is None else end, type=kind)

        records.most = 4
        for owner in range(4):
            lock(owner, 0)
        assert error_of(lock, 4, 0) == "ENOLCK"
        lock(3, 0)
        c.call(m.FLUSH, node, fh=fh, lock_owner=3)
        lock(4, 0)
        for n in range(1, 7):
            lock(0, 10 * n)
        assert error_of(lock, 0, 90) == "ENOLCK"
        lock(0, 0, 60)  # one instead of seven
        for n in range(1, 7):
            lock(0, 10 * n, kind=fcntl.F_UNLCK)
        lock(0, 3, kind=fcntl.F_UNLCK)
        assert error_of(lock, 0, 5, kind=fcntl.F_UNLCK) == "ENOLCK"
        c.call(m.FLUSH, node, fh=fh, lock_owner=0)
        for n in range(7):
            lock(1, 10 * n)
        assert (records.owners, records.ranges) == (3, 9)
        c.send(m.RELEASE, node, fh=fh)
        c.receive()
        assert (records.owners, records.ranges) == (0, 0)


def test_a_lock_taken_through_another_open_file_is_not_given_up_with_the_first(tmp_path: Path) -> None:
    """A process locks and unlocks through a file that another one has inherited, and then through its own."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node, shared = c.create(b"f")
    own = c.call(m.OPEN, node, flags=os.O_RDWR)[0][0].fh
    lock = {"owner": 5, "start": 0, "end": 9, "type": fcntl.F_WRLCK}
    c.call(m.SETLK, node, fh=shared, **lock)
    c.call(m.FLUSH, node, fh=shared, lock_owner=5)
    c.call(m.SETLK, node, fh=own, **lock)
    replay = Replay()
    replay.read(Path(shutil.copy(journals / "test.journal", tmp_path / "look")))
    assert [replay.handles[fh][4] for fh in (shared, own)] == [[], [5]]
    c.call(m.RELEASE, node, fh=shared)
    assert held(server) == [(node, 5)]
    c.close()
    server.close()


def locked_on_host(path: Path) -> bool:
    """Whether somebody has a record lock on the first byte."""
    with path.open("r+b") as host:
        return error_of(linux.ofd_lock, host.fileno(), linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 1) != ""


def test_a_lock_that_is_got_after_its_owner_closed_the_file_elsewhere_is_held(tmp_path: Path) -> None:
    """One thread of a process waits for a lock; another one closes the file, which gives up what the process has so far."""
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9, "type": fcntl.F_WRLCK}
    with (tmp_path / "f").open("r+b") as host:
        linux.ofd_lock(host.fileno(), linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 10)
        waiting = c.send(m.SETLKW, node, owner=5, **lock)
        session = server.sessions["test"]
        records = session.volume.records
        wait_for(lambda: (owner := records.owner(node, 5)) and owner.waits, "the wait")
        c.call(m.FLUSH, node, fh=fh, lock_owner=5)
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, waiting)
    wait_for(lambda: not session.slow, "the end of the request")
    assert locked_on_host(tmp_path / "f")
    assert held(server) == [(node, 5)]
    c.call(m.RELEASE, node, fh=fh)
    assert not locked_on_host(tmp_path / "f")
    assert (records.owners, records.ranges) == (0, 0)
    c.close()
    server.close()


def test_what_is_noted_of_a_lock_is_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread of its owner unlocks just when the wait for it ends."""
    ofd_lock = linux.ofd_lock
    unlocked: list[int] = []

    def unlock_first(fd: int, command: int, *arguments: int) -> Any:
        result = ofd_lock(fd, command, *arguments)
        if command == linux.F_OFD_SETLKW and not unlocked:
            unlocked.append(fd)
            server.sessions["test"].volume.records.set(node, 5, owner, fcntl.F_UNLCK, 0, 9, False)
        return result

    monkeypatch.setattr(linux, "ofd_lock", unlock_first)
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    with (tmp_path / "f").open("r+b") as host:
        ofd_lock(host.fileno(), linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 10)
        c.send(m.SETLKW, node, fh=fh, owner=5, start=0, end=9, type=fcntl.F_WRLCK)
        owner = wait_for(lambda: server.sessions["test"].volume.records.owner(node, 5), "the owner")
        wait_for(lambda: owner.waits, "the wait")
    c.receive()
    assert unlocked
    assert (locked_on_host(tmp_path / "f"), owner.held) == (True, [(0, 9, fcntl.F_WRLCK)])
    c.close()
    server.close()


def test_a_flock_that_is_lost_in_the_attempt_to_change_it_is_not_noted(tmp_path: Path) -> None:
    """flock(2): the lock is given up first, and the new one may not be had."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "owner": 5, "lk_flags": m.LK_FLOCK, "start": 0, "end": 9}
    with (root / "f").open("r+b") as host:
        fcntl.flock(host, fcntl.LOCK_SH)
        c.call(m.SETLK, node, type=fcntl.F_RDLCK, **lock)
        assert error_of(c.call, m.SETLK, node, type=fcntl.F_WRLCK, **lock) == "EAGAIN"
        fcntl.flock(host, fcntl.LOCK_EX | fcntl.LOCK_NB)
        replay = Replay()
        replay.read(Path(shutil.copy(journals / "test.journal", tmp_path / "look")))
        assert [handle[3] for handle in replay.handles.values()] == [fcntl.F_UNLCK]
        waiting = c.send(m.SETLKW, node, type=fcntl.F_WRLCK, **lock)
        wait_for(lambda: server.sessions["test"].waiting, "the wait")
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, waiting)
    state = server.save()
    assert [handle[3] for handle in state["sessions"][0]["volume"]["handles"]] == [fcntl.F_WRLCK]
    other = Server(str(root), state=state)  # a clone's: the lock is the original's
    assert [handle.flock for handle in other.sessions["test"].volume.handles.values()] == [fcntl.F_UNLCK]
    other.close()
    c.close()
    server.close()


def test_many_ranges_cost_no_more_each_than_few() -> None:
    def cost(count: int) -> float:
        held: list[tuple[int, int, int]] = []
        begun = time.thread_time()
        for n in range(count):
            held = set_range(held, 2 * n, 2 * n, fcntl.F_WRLCK)
        return (time.thread_time() - begun) / count

    assert cost(8000) < 0.0003  # ten times more where each looked through all of them


def test_quiet_requests_are_answered_only_when_a_write_fails(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    try:
        c = Client(server, quiet=True)
        c.init()
        node, fh = c.create(b"f")
        c.send(m.WRITE, node, b"hello", fh=fh, offset=3, size=5, quiet=True)
        c.send(m.WRITE, node, b"lost", fh=fh + 1, offset=0, size=4, quiet=True)
        c.send(m.RELEASE, node, fh=fh + 1, quiet=True)
        c.call(m.FLUSH, node, fh=fh)  # comes after all of them
        assert (tmp_path / "f").read_bytes() == b"\0\0\0hello"
        assert (channel.FAILED, node, struct.pack("<i4xQ", errno.EBADF, fh)) in c.ahead
        c.send(m.RELEASE, node, fh=fh, quiet=True)
        with pytest.raises(OSError, match="Bad file descriptor"):
            c.call(m.READ, node, fh=fh, offset=0, size=1)
        c.close()
    finally:
        server.close()


def test_the_failure_of_a_quiet_write_comes_before_the_answer_to_fsync(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    try:
        c = Client(server, quiet=True)
        c.init()
        node, fh = c.create(b"f")
        write = bytearray(m.encode_request(m.WRITE, 1000, node, b"lost", fh=fh + 1, offset=0, size=4))
        write[channel.QUIET_AT] = 1
        more = [m.encode_request(m.GETATTR, 2000 + n, node) for n in range(500)]  # the answers go out together, at last
        for _ in range(5):
            c.sock.sendall(b"".join((write, m.encode_request(m.FSYNC, 1001, node, fh=fh), *more)))
            failed_first = False
            for _ in range(1 + len(more)):
                if m.OUT_HEADER.unpack_from(c.receive())[2] == 1001:
                    failed_first = [code for code, *_ in c.ahead] == [channel.FAILED]
            assert failed_first
            c.ahead.clear()
        c.close()
    finally:
        server.close()


def test_what_is_asked_next_goes_ahead(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"content")
    (tmp_path / "large").write_bytes(bytes(33 << 10))
    server = Server(str(tmp_path))
    try:
        c, notifications = Client(server, quiet=True), Client(server, quiet=True, number=channel.NOTIFY)
        c.init()
        node, fh = c.create(b"f")
        c.call(m.WRITE, node, b"hello", fh=fh, offset=0, size=5)
        c.call(m.FLUSH, node, fh=fh)
        (_, directory, first), (_, file, second) = c.ahead
        assert (directory, file) == (m.ROOT_ID, node)
        assert m.ATTR_OUT.decode(first[8:]).ino == tmp_path.stat().st_ino
        assert m.ATTR_OUT.decode(second[8:]).size == 5
        c.ahead.clear()
        for name in (b"small", b"large"):
            opened = c.call(m.OPEN, c.lookup(name).nodeid, flags=os.O_RDONLY)[0][0]
            if name == b"small":
                code, _, rest = c.ahead.pop()
                assert (code, rest[8:]) == (channel.CONTENT, opened.fh.to_bytes(8, "little") + b"content")
        c.call(m.OPEN, c.lookup(b"small").nodeid, flags=os.O_RDWR)
        c.call(m.RENAME2, m.ROOT_ID, b"f", b"g", newdir=m.ROOT_ID)
        assert [(code, directory) for code, directory, _ in c.ahead] == [(channel.ATTRIBUTES, m.ROOT_ID)]
        c.close()
        notifications.close()
    finally:
        server.close()


def test_a_relay_that_does_not_know_of_it_gets_nothing_ahead(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    try:
        c, notifications = Client(server), Client(server, number=channel.NOTIFY)
        c.init()
        c.create(b"f")
        assert c.ahead == []
        c.close()
        notifications.close()
    finally:
        server.close()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["serve", ".", "--socket", "precious"], 1, "precious is there already and is not a socket"),
        (["serve", ".", "--socket", "live"], 1, "a server listens on live already"),
        (["serve", "missing", "--socket", "new"], 1, "missing does not exist"),
        (["serve", "/dev/null", "--socket", "new"], 1, "/dev/null is neither a directory nor a file"),
        (["mount", "none", "."], 1, "none cannot be mounted on .: No such file"),
        (["serve", ".", "--socket", "new", "--owner", "joe"], 2, "'joe' is not UID:GID in numbers"),
        (["serve", ".", "--socket", "new", "--owner", "1:users"], 2, "'1:users' is not UID:GID in numbers"),
        (["mount", "live", ".", "--channels", "0"], 2, "'0' is not a number from 1 to 64"),
        (["mount", "live", ".", "--channels", "65"], 2, "'65' is not a number from 1 to 64"),
    ],
)
def test_commands_that_make_no_sense_say_why(
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("precious").write_text("content")
    with listening("live"):
        assert exit_code(arguments) == code
    assert words in capsys.readouterr().err
    assert Path("precious").read_text() == "content"
    assert not Path("new").exists()


def test_the_socket_of_a_server_that_is_gone_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
    with listening(str(path)) as listener, socket.socket(socket.AF_UNIX) as connecting:
        connecting.connect(str(path))
        listener.accept()[0].close()


def exit_code(arguments: list[str]) -> object:
    """Of ``python -m fuse_pipe``."""
    try:
        return command.main(arguments)
    except SystemExit as ended:
        return ended.code


def test_notifications_that_were_dropped_are_made_up_for_as_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More names are known than a connection may have unacknowledged: what does not fit was dropped once more, for good."""
    monkeypatch.setattr(session_module, "KEPT_MESSAGES", 64)
    names = {f"file-{number}".encode() for number in range(200)}
    for name in names:
        (tmp_path / name.decode()).touch()
    server = Server(str(tmp_path))
    try:
        c = Client(server)
        c.init()
        for name in names:
            c.lookup(name)
        for _ in range(40):  # while there is no connection for them
            server.sessions["test"]._notify(m.notification(m.NOTIFY_INVAL_INODE, m.ROOT_ID, 0, 0))
        notifications = Client(server, number=channel.NOTIFY)
        told: set[bytes] = set()
        for count in itertools.count(1):
            message = notifications.receive()
            if m.OUT_HEADER.unpack_from(message)[1] == m.NOTIFY_INVAL_ENTRY:
                told.add(message[m.OUT_HEADER.size + m.NOTIFY_INVAL_ENTRY_OUT.size :].rstrip(b"\0"))
            if told == names:
                break
            if count % 8 == 0:
                notifications.sock.sendall(m.IN_HEADER.pack(m.IN_HEADER.size, channel.ACK, count, 0, 0, 0, 0, 0, 0))
        c.close()
        notifications.close()
    finally:
        server.close()


def test_what_was_dropped_is_made_up_for_in_a_clone_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel still believes what it was not told of, and the server has to know that it does."""
    monkeypatch.setattr(session_module, "KEPT_MESSAGES", 16)
    names = {f"file-{number}".encode() for number in range(40)}
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    for name in names:
        assert not c.lookup(name).nodeid
    session = server.sessions["test"]
    watcher = session.volume.watcher
    assert watcher is not None
    for name in names:  # while there is no connection for notifications
        (tmp_path / name.decode()).touch()
        watcher.check_name(session.volume.table.root, name)
    assert session._unnotified
    state = server.save()
    clone = Server(str(tmp_path), state=state)
    for each, message in ((server, "the server"), (clone, "the clone")):
        assert dropped_names(Client(each, number=channel.NOTIFY), names) == names, message
    c.close()
    for each in (server, clone):
        each.close()


def dropped_names(notifications: Client, wanted: set[bytes]) -> set[bytes]:
    """What the kernel is told to ask for again, all of it taken, until that is what is wanted or nothing more comes."""
    told: set[bytes] = set()
    notifications.sock.settimeout(20)
    with contextlib.suppress(ConnectionLost):
        for count in itertools.count(1):
            message = notifications.receive()
            if m.OUT_HEADER.unpack_from(message)[1] == m.NOTIFY_INVAL_ENTRY:
                told.add(message[m.OUT_HEADER.size + m.NOTIFY_INVAL_ENTRY_OUT.size :].rstrip(b"\0"))
            if wanted <= told:
                break
            notifications.sock.sendall(m.IN_HEADER.pack(m.IN_HEADER.size, channel.ACK, count, 0, 0, 0, 0, 0, 0))
    notifications.close()
    return told


def test_a_mount_that_ends_while_dropped_notifications_are_made_up_for(tmp_path: Path) -> None:
    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    session = server.sessions["test"]
    volume = session.volume
    watcher, nodes = volume.watcher, volume.nodes

    def until_it_ends() -> Iterator[None]:
        volume.watcher = volume.nodes = None
        yield from ()

    session._unnotified = True
    session._making_up = until_it_ends()
    session.make_up(session.channel(channel.NOTIFY))
    volume.watcher, volume.nodes = watcher, nodes
    c.close()
    server.close()


def test_two_files_that_are_closed_at_once_by_one_owner_of_locks(tmp_path: Path) -> None:
    class Taken(set[int]):
        """Another thread removes what was just looked for."""

        def __contains__(self, owner: object) -> bool:
            self.discard(5)
            return True

    server = Server(str(tmp_path))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    server.sessions["test"].volume.handle(fh).owners = Taken({5})
    c.call(m.FLUSH, node, fh=fh, lock_owner=5)
    c.close()
    server.close()


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("sent_again", [False, True])
def test_a_wait_for_a_lock_goes_on_after_a_kill(tmp_path: Path, anew: bool, sent_again: bool) -> None:
    """The relay was told that the request had been taken in, and does not send it again; or it does, if it was not told."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    server = Server(str(root), journals=str(journals))
    c, notifications = Client(server), Client(server, number=channel.NOTIFY)
    c.init()
    node, fh = c.create(b"f")
    lock = {"fh": fh, "start": 0, "end": 9}
    locked = c.send(m.SETLK, node, owner=1, type=fcntl.F_WRLCK, **lock)
    assert lock_answer(notifications) == (0, locked)
    waiting = c.send(m.SETLKW, node, owner=2, type=fcntl.F_WRLCK, **lock)
    while not c.acks:
        c.call(m.GETATTR)
    assert c.acks[0] >= 4
    session = server.sessions["test"]
    wait_for(lambda: session.waiting, "the wait")
    if anew:
        rewrite_journal(session)
    copy = shutil.copytree(journals, tmp_path / "killed")
    for each in (c, notifications, server):
        each.close()
    wait_for(lambda: not session.waiting, "the end of the thread")

    server = Server(str(root), journals=str(copy))
    session = server.sessions["test"]
    c, notifications = Client(server, base=100, received=99), Client(server, number=channel.NOTIFY)

    def ask_again() -> None:
        c.unique = waiting - 2
        assert c.send(m.SETLKW, node, owner=2, type=fcntl.F_WRLCK, **lock) == waiting
        c.unique = 1000
        c.call(m.GETATTR)

    if sent_again:
        ask_again()
    c.unique = 2000
    c.send(m.SETLK, node, owner=1, type=fcntl.F_UNLCK, **lock)
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, c.unique)
    assert lock_answer(notifications) == (0, waiting)
    assert holders(server) == [2]
    wait_for(lambda: not session.slow, "the end of the request")
    c.call(m.SETLK, node, owner=2, type=fcntl.F_UNLCK, **lock)
    if sent_again:  # it may come as late as this
        c.unique = waiting - 2
        c.send(m.SETLKW, node, owner=2, type=fcntl.F_WRLCK, **lock)
        assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, waiting)
    assert holders(server) == []
    replay = Replay()
    replay.read(copy / "test.journal")
    assert not replay.waiting
    for each in (c, notifications, server):
        each.close()


def holders(server: Server) -> list[int]:
    """Owners of record locks."""
    (session,) = server.save()["sessions"]
    return [owner for _, owner, _, held in session["volume"]["locks"] if held]


def lock_answer(notifications: Client) -> tuple[int, int]:
    """Error and unique of the next answer that comes behind notifications."""
    while True:
        _, error, unique = m.OUT_HEADER.unpack_from(notifications.receive())
        if unique:
            return error, unique


def test_what_took_long_and_was_not_answered_is_answered_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not done again."""
    root, journals = tmp_path / "root", tmp_path / "journals"
    root.mkdir()
    reached, go = threading.Event(), threading.Event()
    send = channel.Channel.send

    def late(self: channel.Channel, messages: Sequence[channel.Buffers]) -> None:
        if threading.current_thread().name == "fuse_pipe slow":
            reached.set()
            assert go.wait(60)
        send(self, messages)

    monkeypatch.setattr(channel.Channel, "send", late)
    server = Server(str(root), journals=str(journals))
    c = Client(server)
    c.init()
    node, fh = c.create(b"f")
    fields = {"fh": fh, "offset": 0, "length": 10, "mode": 0}
    unique = c.send(m.FALLOCATE, node, **fields)
    assert reached.wait(60)
    copy = shutil.copytree(journals, tmp_path / "killed")
    go.set()
    c.receive()
    c.close()
    server.close()
    os.truncate(root / "f", 0)
    server = Server(str(root), journals=str(copy))
    c = Client(server, base=3, received=2)
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, unique)
    c.unique = unique - 2
    c.send(m.FALLOCATE, node, **fields)
    assert m.OUT_HEADER.unpack_from(c.receive())[1:] == (0, unique)
    assert (root / "f").stat().st_size == 0
    c.close()
    server.close()
