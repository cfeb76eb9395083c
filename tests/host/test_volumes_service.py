"""The process behind a VM's volumes: killed, replaced, taken over by a clone's, and never left behind.

Its owner is a process of its own, as the supervisor of a VM is, and the relay of ``fuse_pipe`` mounts here what a guest would.
"""

import contextlib
import ctypes
import fcntl
import json
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuse_support
import pytest
from fuse_support import error_of, is_mounted, wait_for

from fcvm.volumes import service
from fcvm.volumes.service import JOURNALS, LOG, Volumes
from fcvm.volumes.spec import Volume
from fuse_pipe import linux

MS_REMOUNT = 32

OWNER = """
import json, os, sys
from pathlib import Path
from fcvm.volumes.service import Volumes
from fcvm.volumes.spec import parse_all

directory, states, user, *maps = sys.argv[1:]
os.setresgid(int(user), int(user), int(user))
os.setresuid(int(user), int(user), int(user))
sys.stdin.readline()
volumes = Volumes(parse_all(maps), Path(directory) / "vsock.sock", owner=(0, 0), states=Path(states) if states else None)
print("ready", flush=True)
for line in sys.stdin:
    method, *paths = line.split()
    print(json.dumps(getattr(volumes, method)(*map(Path, paths))), flush=True)
volumes.close()
"""


class Owner:
    """A process that has volumes; ``maps`` as on the command line.

    With ``later`` it has them from ``start`` on. For the child that becomes it has the test's files open until its exec,
    and closing them takes a relay that does not stand still.
    """

    def __init__(
        self, directory: Path, *maps: str, states: Path | None = None, user: int = 0, later: bool = False
    ) -> None:
        self.directory = directory
        sources, python = fuse_support.SOURCE, sys.executable
        if user:  # who may not reach them where we have them
            sources, python = directory.parent / "src", "/usr/bin/python3"
            shutil.copytree(fuse_support.SOURCE, sources)
        self.process = subprocess.Popen(
            [python, "-c", OWNER, directory, str(states or ""), str(user), *maps],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(sources)},
        )
        if not later:
            self.start()

    def start(self) -> None:
        self.send("start")
        assert self.answer() == "ready"

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def ask(self, what: str) -> Any:
        """Call a method of the volumes, with paths behind its name."""
        self.send(what)
        return json.loads(self.answer())

    def server(self) -> int:
        """The pid of the serving process, once there is one."""
        return int(wait_for(lambda: next(iter(children(self.process.pid)), None), "the server"))

    def kill_server(self) -> int:
        """Kill the serving process and wait for the next one; its pid."""
        pid = self.server()
        os.kill(pid, signal.SIGKILL)
        return int(wait_for(lambda: next((p for p in children(self.process.pid) if p != pid), None), "another server"))

    def end(self) -> None:
        """End it as a supervisor ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def __enter__(self) -> "Owner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z" and b"fcvm.volumes.server" in (path.parent / "cmdline").read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.fixture
def base() -> Iterator[Path]:
    with fuse_support.scratch() as path:
        for name in ("host", "vm", "mount"):
            (path / name).mkdir()
        yield path


@contextlib.contextmanager
def mounted(socket: Path, point: Path, relays: "list[subprocess.Popen[bytes]] | None" = None) -> Iterator[Path]:
    """What a guest sees of the volume behind ``socket``; the relay is added to ``relays``."""
    relay = fuse_support.spawn("mount", socket, point)
    if relays is not None:
        relays.append(relay)
    watchdog = threading.Timer(120, relay.kill)  # a request that is never answered cannot be interrupted
    watchdog.start()
    try:
        wait_for(lambda: is_mounted(point) or relay.poll() is not None, "the mount")
        assert is_mounted(point)
        yield point
    finally:
        watchdog.cancel()
        relay.kill()
        relay.wait()
        while is_mounted(point):
            linux.umount(str(point), linux.MNT_DETACH)


def test_a_killed_server_is_replaced_under_open_files(base: Path) -> None:
    (base / "second").mkdir()
    (base / "ro").mkdir()
    (base / "ro" / "f").touch()
    with (
        Owner(base / "vm", f"{base}/host:/a", f"{base}/ro:/b:ro") as owner,
        mounted(base / "vm/vsock.sock_5000", base / "mount") as point,
        mounted(base / "vm/vsock.sock_5001", base / "second") as second,
    ):
        (point / "d").mkdir()
        with (point / "d" / "f").open("w+b", buffering=0) as file:
            for n in range(3):
                file.write(b"%d" % n)
                owner.kill_server()
            (point / "d").rename(point / "e")
            file.write(b"3")
            assert os.pread(file.fileno(), 100, 0) == b"0123"
        assert (base / "host" / "e" / "f").read_bytes() == b"0123"
        assert error_of((second / "g").touch) == "EROFS"
        assert [f.name for f in second.iterdir()] == ["f"]
        owner.end()
    assert sorted(p.name for p in (base / "vm").glob("vsock*")) == []


def test_a_clones_server_goes_on_with_open_files(base: Path) -> None:
    (base / "clone").mkdir()
    link = base / "socket"
    link.symlink_to(base / "vm" / "vsock.sock_5000")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(Owner(base / "vm", f"{base}/host:/a"))
        clone = stack.enter_context(Owner(base / "clone", f"{base}/host:/a", states=base / "volumes.json", later=True))
        relays: list[subprocess.Popen[bytes]] = []
        point = stack.enter_context(mounted(link, base / "mount", relays))
        (point / "d").mkdir()
        file = stack.enter_context((point / "d" / "f").open("w+b", buffering=0))
        file.write(b"one")
        source.ask("save")
        file.write(b" two")  # saving is no end
        relays[0].send_signal(signal.SIGSTOP)  # as the guest stands still
        threading.Event().wait(1)  # what the server has to say of the last write is said
        (base / "volumes.json").write_text(json.dumps(source.ask("save")))
        clone.start()
        clone.server()
        source.end()
        (base / "host" / "d").rename(base / "host" / "e")
        link.unlink()
        link.symlink_to(base / "clone" / "vsock.sock_5000")
        relays[0].send_signal(signal.SIGCONT)
        assert os.pread(file.fileno(), 100, 0) == b"one two"
        for text in (b" three", b" four"):
            clone.kill_server()
            file.write(text)
        assert (base / "host" / "e" / "f").read_bytes() == b"one two three four"
        assert [len(state["sessions"]) for state in clone.ask("save")] == [1]
        file.close()
        assert clone.ask(f"restart {base}/volumes.json") is None  # the guest is replaced by one that is restored again
        assert [len(state["sessions"]) for state in clone.ask("save")] == [1]


def test_nothing_of_a_restored_guest_is_held_for_one_that_is_booted_instead(base: Path) -> None:
    (base / "clone").mkdir()
    with (
        Owner(base / "vm", f"{base}/host:/a") as source,
        mounted(base / "vm/vsock.sock_5000", base / "mount") as point,
        (point / "f").open("w") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        (base / "volumes.json").write_text(json.dumps(source.ask("save")))
    with (
        Owner(base / "clone", f"{base}/host:/a", states=base / "volumes.json") as clone,
        (base / "host" / "f").open() as file,
    ):
        assert [len(state["sessions"]) for state in clone.ask("save")] == [1]
        assert error_of(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EWOULDBLOCK")
        clone.ask("restart")
        assert [state["sessions"] for state in clone.ask("save")] == [[]]
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_what_ends_the_server_each_time_is_given_up(base: Path) -> None:
    journals = base / "vm" / JOURNALS / "0"
    journals.mkdir(parents=True)
    (journals / "broken.journal").write_bytes(marshal.dumps(("nonsense", 1)))
    with Owner(base / "vm", f"{base}/host:/a") as owner, mounted(base / "vm/vsock.sock_5000", base / "mount") as point:
        (point / "f").write_text("served")
        assert (base / "host" / "f").read_text() == "served"
        assert (base / "vm" / LOG).read_text().count("nonsense") == 3
        owner.end()


def test_a_directory_that_is_gone_fails_alone(base: Path) -> None:
    (base / "gone").mkdir()
    (base / "second").mkdir()
    with (
        Owner(base / "vm", f"{base}/gone:/a", f"{base}/host:/b") as owner,
        mounted(base / "vm/vsock.sock_5000", base / "mount") as point,
        mounted(base / "vm/vsock.sock_5001", base / "second") as second,
    ):
        (base / "gone").rmdir()
        owner.kill_server()
        assert error_of(os.listdir, point) == "EIO"
        (second / "f").touch()


def test_as_an_ordinary_user_files_are_that_users(base: Path) -> None:
    for name in ("host", "vm"):
        os.chown(base / name, 1000, 1000)
    with (
        Owner(base / "vm", f"{base}/host:/a", user=1000),
        mounted(base / "vm/vsock.sock_5000", base / "mount") as point,
    ):
        (point / "f").touch()
        assert (point / "f").stat().st_uid == 0
        assert (base / "host" / "f").stat().st_uid == 1000


def test_kill_9_of_the_owner_leaves_no_process(base: Path) -> None:
    with Owner(base / "vm", f"{base}/host:/a") as owner:
        pidfd = os.pidfd_open(owner.server())
        owner.process.kill()
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)


def test_a_server_that_does_not_answer_is_replaced(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "SAVE_TIME", 20.0)
    (base / "stuck").mkdir()
    volumes = Volumes([Volume(str(base / "host"), "/data")], base / "stuck" / "vsock.sock")
    try:
        assert [state["sessions"] for state in volumes.save()] == [[]]
        volumes._process.send_signal(signal.SIGSTOP)
        assert [state["sessions"] for state in volumes.save()] == [[]]
    finally:
        volumes.close()


def test_without_volumes_there_is_no_process(tmp_path: Path) -> None:
    with contextlib.closing(Volumes([], tmp_path / "vsock.sock")) as volumes:
        volumes.restart()
        assert volumes.save() == []
        assert list(tmp_path.iterdir()) == []


def test_read_only_is_the_servers_word(base: Path) -> None:
    """Whatever the guest makes of its own mount."""
    (base / "host" / "f").write_text("content")
    with Owner(base / "vm", f"{base}/host:/a:ro"), mounted(base / "vm/vsock.sock_5000", base / "mount") as point:
        assert ctypes.CDLL(None).mount(None, os.fsencode(point), None, MS_REMOUNT, None) == 0
        assert error_of((point / "new").touch) == "EROFS"
        assert error_of((point / "f").write_text, "x") == "EROFS"
    assert (base / "host" / "f").read_text() == "content"
