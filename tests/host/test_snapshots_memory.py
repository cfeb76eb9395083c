"""The memory server with real clones: every page right, whatever dies."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import baremetal
import pytest
from baremetal import ABOVE_GAP, FIRST, Guest

from fcvm.errors import SnapshotError
from fcvm.firecracker.process import Firecracker
from fcvm.linux import sockets
from fcvm.snapshots import restore, working_set
from fcvm.snapshots.memory import MemoryServer
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout

PAGES = 4096  # filled with the pattern of seed 1
HOLE = 2000  # pages after these that nobody has touched
TOP = 48  # pages at the end of memory, where Firecracker puts the initrd
RANDOM = (0x5851F42D4C957F2D, 12345, PAGES - 1)  # an order that visits each page once


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """32 MiB that the guest uses itself, PAGES with a pattern, HOLE."""
    directory = tmp_path_factory.mktemp("snapshot")
    with baremetal.booted(directory / "vm", memory=(FIRST + PAGES + HOLE + TOP) * 4096 >> 20) as vmm:
        with Guest(directory / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        return baremetal.snapshot(Layout(directory / "data"), "warm", vmm)


class Failures:
    """Collects what ``on_failure`` is told, and wakes who waits for it."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, str]] = []
        self.arrived = threading.Event()

    def __call__(self, pid: int, message: str) -> None:
        self.messages.append((pid, message))
        self.arrived.set()


@pytest.fixture
def failures() -> Failures:
    return Failures()


@pytest.fixture
def server(snapshot: Snapshot, tmp_path: Path, failures: Failures) -> Iterator[MemoryServer]:
    with MemoryServer(snapshot.memory, tmp_path / "server.sock", on_failure=failures) as started:
        yield started
    assert not (tmp_path / "server.sock").exists()


@contextlib.contextmanager
def a_clone(server: MemoryServer, snapshot: Snapshot, directory: Path, **options: bool) -> Iterator[Firecracker]:
    with baremetal.clone(directory, snapshot, backend="uffd", memory_socket=server.socket, **options) as vmm:
        yield vmm


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another process does and no descriptor tells."""
    deadline = threading.Event()
    for _ in range(6000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("it did not happen within a minute")


def test_every_page_is_right(server: MemoryServer, snapshot: Snapshot, tmp_path: Path) -> None:
    with a_clone(server, snapshot, tmp_path / "clone") as vmm, Guest(tmp_path / "clone") as guest:
        assert guest.call(baremetal.CHECK, first=FIRST, count=PAGES, seed=1, order=RANDOM) == 0
        assert guest.not_zero(FIRST + PAGES, HOLE) == 0
        assert guest.wrong(FIRST, PAGES, seed=1) == 0
        guest.fill(FIRST + PAGES, HOLE, seed=2)
        assert guest.wrong(FIRST + PAGES, HOLE, seed=2) == 0
        (faults,) = server.faults()
    assert faults.pid == vmm.pid
    assert faults.copied >= PAGES
    assert faults.zeroed >= HOLE
    assert PAGES // 16 <= faults.faults < PAGES // 4, "a fault brings in a window"
    wait_for(lambda: not server.faults())
    assert server.served() >= faults.faults, "ended clones count as well"


def test_many_clones_at_once_have_memory_of_their_own(server: MemoryServer, snapshot: Snapshot, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        directories = [tmp_path / f"clone{n}" for n in range(8)]
        for directory in directories:
            stack.enter_context(a_clone(server, snapshot, directory))
        guests = [stack.enter_context(Guest(directory)) for directory in directories]
        for number, guest in enumerate(guests):
            guest.send(baremetal.FILL, first=FIRST + number * 100, count=100, seed=100 + number)
        assert [guest.receive() for guest in guests] == [100] * 8
        for guest in guests:
            guest.send(baremetal.CHECK, first=FIRST, count=PAGES, seed=1, order=RANDOM)
        assert [guest.receive() for guest in guests] == [100] * 8, "each sees its own hundred pages, and nobody else's"
        assert len(server.faults()) == 8
    wait_for(lambda: not server.faults())


def test_memory_above_the_gap(tmp_path: Path, failures: Failures) -> None:
    with baremetal.booted(tmp_path / "vm", memory=4096) as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, 64, seed=1)
            guest.fill(ABOVE_GAP, 64, seed=2)
        snapshot = baremetal.snapshot(Layout(tmp_path / "data"), "large", vmm)
    assert snapshot.memory.stat().st_size == 4096 << 20
    with (
        MemoryServer(snapshot.memory, tmp_path / "server.sock", on_failure=failures) as server,
        a_clone(server, snapshot, tmp_path / "clone"),
        Guest(tmp_path / "clone") as guest,
    ):
        assert guest.wrong(ABOVE_GAP, 64, seed=2) == 0
        assert guest.wrong(FIRST, 64, seed=1) == 0
        assert guest.not_zero(ABOVE_GAP + 64, 1000) == 0
    assert failures.messages == []


def test_pages_given_to_the_balloon_read_as_zeros(server: MemoryServer, snapshot: Snapshot, tmp_path: Path) -> None:
    with a_clone(server, snapshot, tmp_path / "clone"), Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, 1024, seed=1) == 0
        guest.balloon(FIRST, 512)  # present ones
        guest.balloon(FIRST + 2048, 512)  # missing ones
        assert guest.not_zero(FIRST, 512) == 0
        assert guest.not_zero(FIRST + 2048, 512) == 0
        assert guest.wrong(FIRST + 512, 1536, seed=1) == 0
        assert guest.wrong(FIRST + 2560, PAGES - 2560, seed=1) == 0
        guest.fill(FIRST, 512, seed=7)
        assert guest.wrong(FIRST, 512, seed=7) == 0
        guest.balloon(FIRST, 512)
        assert guest.not_zero(FIRST, 512) == 0, "and again"
        (faults,) = server.faults()
    assert faults.removed >= 1536


def test_process_killed_while_it_serves(
    server: MemoryServer, snapshot: Snapshot, tmp_path: Path, failures: Failures
) -> None:
    with a_clone(server, snapshot, tmp_path / "clone"), Guest(tmp_path / "clone") as guest:
        guest.balloon(FIRST + PAGES - 256, 256)
        for part in range(3):
            before = server.pid
            count = (PAGES - 256) // 3
            guest.send(baremetal.CHECK, first=FIRST + part * count, count=count, seed=1)
            os.kill(before, signal.SIGKILL)
            assert guest.receive() == 0
            wait_for(lambda before=before: server.pid != before)
        assert guest.not_zero(FIRST + PAGES - 256, 256) == 0, "what was removed must stay removed"
    assert failures.messages == []


def test_process_that_was_stopped_and_killed_has_taken_faults_with_it(
    server: MemoryServer, snapshot: Snapshot, tmp_path: Path
) -> None:
    with a_clone(server, snapshot, tmp_path / "clone"), Guest(tmp_path / "clone") as guest:
        os.kill(server.pid, signal.SIGSTOP)
        guest.send(baremetal.CHECK, first=FIRST, count=PAGES, seed=1)
        guest.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            guest.receive()
        guest.socket.settimeout(60)
        os.kill(server.pid, signal.SIGKILL)
        assert guest.receive() == 0


def test_process_that_keeps_dying_ends_its_clones_with_a_message(
    server: MemoryServer, snapshot: Snapshot, tmp_path: Path, failures: Failures
) -> None:
    with a_clone(server, snapshot, tmp_path / "clone") as vmm:
        while not failures.messages:
            pid = server.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for(lambda pid=pid: bool(failures.messages) or server.pid != pid)
        assert select.select([vmm.pidfd], [], [], 60)[0], "a clone that nobody serves must not hang"
    assert failures.messages == [(vmm.pid, "the memory server has stopped: its process died 5 times within 10 seconds")]
    with (
        pytest.raises(SnapshotError, match="cannot be restored"),
        a_clone(server, snapshot, tmp_path / "late"),
    ):
        pass


def test_memory_that_cannot_be_read_ends_the_clone_with_a_message(tmp_path: Path, failures: Failures) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, 64, seed=1)
        snapshot = baremetal.snapshot(Layout(tmp_path / "data"), "warm", vmm)
    with MemoryServer(snapshot.memory, tmp_path / "server.sock", on_failure=failures) as server:
        with a_clone(server, snapshot, tmp_path / "clone") as vmm, Guest(tmp_path / "clone") as guest:
            snapshot.memory.chmod(0o644)
            os.truncate(snapshot.memory, FIRST * 4096)  # as a disk that fails would
            with pytest.raises(OSError):  # noqa: PT011
                guest.wrong(FIRST, 64, seed=1)
            assert failures.arrived.wait(60)
            assert select.select([vmm.pidfd], [], [], 60)[0]
        assert failures.messages == [(vmm.pid, "[Errno 14] Bad address")]


def test_what_a_clone_held_is_freed_when_it_dies(server: MemoryServer, snapshot: Snapshot, tmp_path: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{server.pid}/fd"))

    with a_clone(server, snapshot, tmp_path / "first"):
        wait_for(lambda: bool(server.faults()))  # it may not have heard of the clone when that is loaded
    wait_for(lambda: not server.faults())
    before = held()
    for number in range(5):
        with a_clone(server, snapshot, tmp_path / f"clone{number}") as vmm:
            os.kill(vmm.pid, signal.SIGKILL)
    # The process may have let go of the first one after we had looked.
    wait_for(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))


def test_strange_client_does_no_harm(server: MemoryServer, snapshot: Snapshot, tmp_path: Path) -> None:
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(b'nonsense'); s.recv(1)"
    done = subprocess.run([sys.executable, "-c", program, server.socket], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL, "whoever asks for memory in an unknown way is ended"
    sockets.connect(server.socket).close()
    with a_clone(server, snapshot, tmp_path / "clone"), Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, 16, seed=1) == 0


def test_working_set_is_recorded_and_replayed(snapshot: Snapshot, tmp_path: Path) -> None:
    used = range(FIRST, FIRST + 1000, 8)
    with MemoryServer(snapshot.memory, tmp_path / "server.sock", window=1) as server:
        with a_clone(server, snapshot, tmp_path / "recorded") as vmm, Guest(tmp_path / "recorded") as guest:
            for page in used:
                assert guest.wrong(page, 1, seed=1) == 0
            # a guest goes on before its last page is marked, and counted
            wait_for(lambda: (used[-1], 1) in server.used(vmm.pid))
            ranges = server.used(vmm.pid)
            recorded = {page for first, count in ranges for page in range(first, first + count)}
            assert {page for page in recorded if page >= FIRST} == set(used), "exactly what was touched"
            wait_for(lambda: server.faults()[0].copied + server.faults()[0].zeroed == len(recorded))
        server.widen(16)
        working_set.save(snapshot, ranges)
        server.replay(working_set.path(snapshot))
        with a_clone(server, snapshot, tmp_path / "replayed", resume=False):
            total = sum(count for _, count in working_set.load(working_set.path(snapshot)))
            wait_for(lambda: server.faults()[0].replayed == total)
            assert total >= 1000 - 8, "near ranges are joined"
    working_set.path(snapshot).unlink()


def test_replayed_clone_asks_for_nothing_that_was_recorded(snapshot: Snapshot, tmp_path: Path) -> None:
    with MemoryServer(snapshot.memory, tmp_path / "server.sock", window=1) as server:
        with a_clone(server, snapshot, tmp_path / "recorded") as vmm, Guest(tmp_path / "recorded") as guest:
            assert guest.wrong(FIRST, 500, seed=1) == 0
            assert server.faults()[0].faults >= 500
            total = working_set.save(snapshot, server.used(vmm.pid))
        server.replay(working_set.path(snapshot))
        with a_clone(server, snapshot, tmp_path / "replayed", resume=False) as vmm:
            wait_for(lambda: server.faults()[0].replayed == total)
            before = server.faults()[0].faults
            restore.resume(vmm.api)
            with Guest(tmp_path / "replayed") as guest:
                assert guest.wrong(FIRST, 500, seed=1) == 0
                assert server.faults()[0].faults - before <= 2
                assert guest.wrong(FIRST, PAGES, seed=1) == 0
            assert server.faults()[0].faults - before >= PAGES - 500 - 16
    working_set.path(snapshot).unlink()


OWNER = """
import sys
from pathlib import Path
import baremetal
from fcvm.snapshots import store
from fcvm.snapshots.memory import MemoryServer
from fcvm.storage.layout import Layout
base, place = Path(sys.argv[1]), Path(sys.argv[2])
snapshot = store.find(Layout(base), "warm")
with MemoryServer(snapshot.memory, place / "s") as server:
    with baremetal.clone(place / "clone", snapshot, backend="uffd", memory_socket=server.socket) as vmm:
        print(server.pid, vmm.pid, flush=True)
        sys.stdin.read()
"""


def test_owner_killed_ends_process_and_clones(snapshot: Snapshot, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, snapshot.path.parent.parent, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as owner:
        assert owner.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        try:
            owner.kill()
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], 60)[0]
        finally:
            for pidfd in pidfds:
                os.close(pidfd)


def test_memory_file_that_is_missing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="cannot be served"):
        MemoryServer(tmp_path / "memory.bin", tmp_path / "s")
    (tmp_path / "memory.bin").write_bytes(b"\0" * 4096)
    (tmp_path / "set").write_text("nonsense")
    with pytest.raises(SnapshotError, match="damaged"):
        MemoryServer(tmp_path / "memory.bin", tmp_path / "s", working_set=tmp_path / "set")
