"""Mounts that outlive their connections and servers: restarts, kills, saved states, and directories that are gone."""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fuse_support
import pytest
from fuse_support import Mount, error_of
from fuse_tree import as_user

from fuse_pipe import linux
from fuse_pipe.server import listening


@pytest.fixture
def base() -> Iterator[Path]:
    with fuse_support.scratch() as path:
        yield path


def in_thread(function: object) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)  # type: ignore[arg-type]
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_restarts_under_open_files(base: Path, number: int) -> None:
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        path = mounted.path
        (path / "dir" / "deep").mkdir(parents=True)
        (path / "dir" / "gone").write_text("unlinked")
        file = (path / "dir" / "deep" / "f").open("w+b", buffering=0)
        locked = (path / "locked").open("w+b", buffering=0)
        flocked = (path / "flocked").open("w+b", buffering=0)
        directory = os.open(path / "dir", os.O_RDONLY)
        file.write(b"before")
        fcntl.lockf(locked, fcntl.LOCK_EX, 10, 5)
        fcntl.flock(flocked, fcntl.LOCK_EX)
        (path / "dir" / "deep").rename(path / "dir" / "renamed")
        for _ in range(3):
            mounted.stop_server(number)
            mounted.start_server()
            file.write(b" after")
        assert os.pread(file.fileno(), 100, 0) == b"before after after after"
        assert (mounted.host / "dir" / "renamed" / "f").read_bytes() == b"before after after after"
        assert sorted(os.listdir(directory)) == ["gone", "renamed"]
        with (mounted.host / "locked").open("r+b") as host:
            assert error_of(fcntl.lockf, host, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 5) in ("EAGAIN", "EACCES")
            fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)
        with (mounted.host / "flocked").open() as host:
            assert error_of(fcntl.flock, host, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EWOULDBLOCK")
        file.close()
        locked.close()
        with (mounted.host / "locked").open("r+b") as host:
            fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(directory)
        flocked.close()


def test_requests_while_there_is_no_server_wait(base: Path) -> None:
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        mounted.stop_server(signal.SIGKILL)
        thread = in_thread(lambda: (mounted.path / "made").mkdir())
        assert not (mounted.host / "made").exists()
        mounted.start_server()
        thread.join(60)
        assert (mounted.host / "made").is_dir()


def test_every_request_is_done_once_however_often_the_server_dies(base: Path) -> None:
    """Requests that must not be done twice, among them writes that nobody waits for, while the server is killed."""
    kills = 8
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        path = mounted.path
        failures: list[str] = []
        stop = threading.Event()
        counts: dict[str, int] = {}

        def append(log: BinaryIO) -> None:
            count = 0
            while not stop.is_set():
                log.write(b"%07d\n" % count)  # none crosses a page: a kill may leave the part of a write that is in one
                count += 1
            counts["log"] = count

        def rename() -> None:
            count = 0
            while not stop.is_set():
                (path / f"{count}").mkdir()
                (path / f"{count}").rename(path / f"{count}-renamed")
                count += 1
            counts["names"] = count

        def work(function: Callable[[], None]) -> None:
            try:
                function()
            except OSError as error:
                failures.append(str(error))

        with (path / "log").open("ab", buffering=0) as log:
            threads = [in_thread(lambda: work(lambda: append(log))), in_thread(lambda: work(rename))]
            for _ in range(kills):
                before = (mounted.host / "log").stat().st_size
                fuse_support.wait_for(
                    lambda before=before: (mounted.host / "log").stat().st_size > before + 7000 or failures, "work"
                )
                mounted.stop_server(signal.SIGKILL)
                mounted.start_server()
            stop.set()
            for thread in threads:
                thread.join(60)
        # The one request that a kill interrupts half-way is done twice: a line is there again, right behind itself, and a
        # name exists or is gone already, which ends the thread.
        lines = (mounted.host / "log").read_bytes().split()
        assert len(lines) <= counts["log"] + kills
        assert [line for line, _ in itertools.groupby(lines)] == [b"%07d" % n for n in range(counts["log"])]
        assert len(failures) <= 1
        if not failures:
            assert {f"{n}-renamed" for n in range(counts["names"])} <= set(os.listdir(mounted.host))


def test_what_is_closed_while_there_is_no_server_is_closed_and_unlocked(base: Path) -> None:
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        (mounted.path / "f").touch()
        for turn in range(3):
            near, far = socket.socketpair()
            with near, far:
                with (mounted.path / "f").open("r+b", buffering=0) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    socket.send_fds(near, [b"x"], [file.fileno()])
                mounted.stop_server(signal.SIGKILL)
            # The file is closed for good with the message that it was in; closing a descriptor would wait for the server.
            mounted.start_server()
            assert not (mounted.path / f"{turn}").exists()  # no name that the kernel knows: the new server has answered
            with (mounted.host / "f").open() as host:
                fuse_support.wait_for(
                    lambda host=host: not error_of(fcntl.flock, host, fcntl.LOCK_EX | fcntl.LOCK_NB), "the lock", 10
                )


def test_a_lock_of_an_open_file_is_given_up_with_it_whenever_that_is_closed(base: Path) -> None:
    """F_OFD_SETLK: by a close while there is no server, or later."""
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        (mounted.path / "f").touch()

        def is_locked() -> bool:
            """Asked without a lock of our own, which would be in the way of who takes his again."""
            with (mounted.host / "f").open("r+b") as host:
                return linux.ofd_lock(host.fileno(), linux.F_OFD_GETLK, fcntl.F_WRLCK, 0, 0)[0] != fcntl.F_UNLCK

        for early in (False, True):
            near, far = socket.socketpair()
            with near, far:
                with (mounted.path / "f").open("r+b", buffering=0) as file:
                    linux.ofd_lock(file.fileno(), linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 0)
                    socket.send_fds(near, [b"x"], [file.fileno()])
                mounted.stop_server(signal.SIGKILL)
                if not early:
                    mounted.start_server()
                    assert not (mounted.path / "one").exists()  # the new server has answered
                    assert is_locked()
            if early:
                mounted.start_server()
                assert not (mounted.path / "other").exists()  # nor is this a name that the kernel knows
            fuse_support.wait_for(lambda: not is_locked(), "the lock", 10)


def test_who_is_killed_while_there_is_no_server_waits_for_no_lock(base: Path) -> None:
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        (mounted.path / "f").touch()
        inode = (mounted.host / "f").stat().st_ino
        with (mounted.path / "f").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            waits = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX)"
            with subprocess.Popen([sys.executable, "-c", waits, mounted.path / "f"]) as waiter:
                fuse_support.wait_for(
                    lambda: any("->" in line and f":{inode} " in line for line in Path("/proc/locks").read_text().splitlines()),
                    "the wait",
                )
                mounted.stop_server(signal.SIGKILL)
                waiter.kill()
                mounted.start_server()
                try:
                    assert waiter.wait(60) == -signal.SIGKILL
                finally:
                    fcntl.lockf(file, fcntl.LOCK_UN)


def test_server_without_memory_heals_names(base: Path) -> None:
    """Nothing was kept: open files fail, but every path works again."""
    with fuse_support.mount(base) as mounted:
        (mounted.path / "d" / "e").mkdir(parents=True)
        (mounted.path / "d" / "e" / "f").write_text("content")
        mounted.stop_server(signal.SIGKILL)
        mounted.start_server()
        assert (mounted.path / "d" / "e" / "f").read_text() == "content"
        (mounted.path / "d" / "e" / "g").write_text("new")
        assert (mounted.host / "d" / "e" / "g").read_text() == "new"


class Proxy:
    """Stands between relay and server and breaks every connection after a while, in the middle of messages."""

    def __init__(self, listener: socket.socket, server: Path) -> None:
        self.listener, self.server = listener, server
        self.breaks = 0

    def run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self.server))
            except OSError:  # it has ended
                near.close()
                far.close()
                continue
            self.breaks += 1
            budget = 3000 + self.breaks * 200_011 % 4_000_000
            in_thread(lambda near=near, far=far, budget=budget: self.carry(near, far, budget))

    def carry(self, near: socket.socket, far: socket.socket, budget: int) -> None:
        with near, far:
            back = in_thread(lambda: self.pump(far, near, budget))
            self.pump(near, far, budget)
            back.join()

    def pump(self, source: socket.socket, sink: socket.socket, budget: int) -> None:
        with contextlib.suppress(OSError):
            while budget > 0 and (data := source.recv(min(budget, 65536))):
                sink.sendall(data)
                budget -= len(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def test_broken_connections_lose_nothing(base: Path) -> None:
    mounted = Mount(base, channels=2)
    mounted.relay_socket = base / "proxy"
    with listening(str(mounted.relay_socket)) as listener:
        proxy = Proxy(listener, mounted.socket)
        accepting = in_thread(proxy.run)
        try:
            mounted.start()
            point, host = mounted.path, mounted.host
            data = os.urandom(3_000_000)
            for n in range(40):
                (point / f"d{n}").mkdir()
                (point / f"d{n}" / "f").write_bytes(data[n * 1000 :])
                (point / f"d{n}").rename(point / f"r{n}")
                with (point / "log").open("ab") as log:
                    log.write(b"%03d" % n)
            for n in range(40):
                assert (point / f"r{n}" / "f").read_bytes() == data[n * 1000 :]
            assert (host / "log").read_bytes() == b"".join(b"%03d" % n for n in range(40))
            assert proxy.breaks > 10
        finally:
            mounted.stop()
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join(60)


def test_state_saved_and_taken_over_by_another_server(base: Path) -> None:
    """What a clone does: another process starts from the saved state, and the relay connects to it instead."""
    mounted = Mount(base)
    try:
        mounted.start(program=SAVING)
        point, host = mounted.path, mounted.host
        (point / "a" / "b").mkdir(parents=True)
        file = (point / "a" / "b" / "f").open("w+b", buffering=0)
        file.write(b"one")
        (point / "x").write_text("replaced on the host")
        replaced = (point / "x").open()
        (point / "a").rename(point / "c")
        locked = (point / "l").open("w+b", buffering=0)
        fcntl.lockf(locked, fcntl.LOCK_EX)
        waiter = in_thread(lambda: as_user(wait_and_note, point / "l"))
        fuse_support.wait_for(lambda: (point / "waiting").exists(), "the waiter")
        mounted.stop_server(signal.SIGTERM)  # it saves
        assert json.loads((base / "state").read_text())["version"] == 1
        (host / "x").unlink()
        (host / "x").write_text("another")
        (host / "c" / "new").touch()
        mounted.start_server(program=SAVING)
        file.write(b" two")
        assert os.pread(file.fileno(), 100, 0) == b"one two"
        assert sorted(os.listdir(point / "c")) == ["b", "new"]
        assert (point / "x").read_text() == "another"
        with (host / "l").open("r+b") as other:
            assert error_of(fcntl.lockf, other, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")
        assert error_of(os.fstat, replaced.fileno()) in ("", "ESTALE", "EIO")
        assert not (point / "locked").exists()
        locked.close()
        waiter.join(60)
        assert (host / "locked").exists()
        for each in (file, replaced):
            each.close()
    finally:
        mounted.stop()


def wait_and_note(path: Path) -> None:
    with path.open("r+b") as file:
        (path.parent / "waiting").touch()
        fcntl.lockf(file, fcntl.LOCK_EX)
        (path.parent / "locked").touch()


# A server that starts from the state beside its socket if there is one, and saves it when it is told to end.
SAVING = """
import json, os, signal, socket, sys
from fuse_pipe.server import Server, listening
host, path = sys.argv[1:3]
saved = os.path.dirname(path) + "/state"
with listening(path) as listener:
    signal.signal(signal.SIGTERM, lambda *_: listener.shutdown(socket.SHUT_RDWR))
    server = Server(host, state=json.load(open(saved)) if os.path.exists(saved) else None)
    server.accept(listener)
    json.dump(server.save(), open(saved, "w"))
"""


def test_state_of_a_directory_that_is_gone_gives_eio(base: Path) -> None:
    with fuse_support.mount(base, serve=("--journals", str(base / "journals"))) as mounted:
        (mounted.path / "f").write_text("x")
        file = (mounted.path / "f").open("r+b", buffering=0)
        mounted.stop_server(signal.SIGKILL)
        shutil.rmtree(mounted.host)
        mounted.start_server()

        def write() -> None:
            file.write(b"y")
            os.fsync(file.fileno())  # a write may be answered before it is done

        assert error_of(write) == "EIO"
        assert error_of(os.listdir, mounted.path) == "EIO"
        with contextlib.suppress(OSError):
            file.close()


def test_relay_needs_a_server_to_mount(base: Path) -> None:
    point = base / "mount"
    point.mkdir()
    process = fuse_support.spawn("mount", base / "nothing", point)
    assert process.wait(60) == 1
    assert not fuse_support.is_mounted(point)
