"""The pool of loaded clones, against real Firecrackers."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import baremetal
import pytest
from baremetal import FIRST, Guest

from fc_agent import structs
from fcvm.errors import NetworkError, SnapshotError
from fcvm.firecracker import boot
from fcvm.network import attach, spec
from fcvm.snapshots import pool as pools
from fcvm.snapshots import store
from fcvm.snapshots.memory import MemoryServer
from fcvm.snapshots.pool import Kit, Pool
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout
from fcvm.vm import state

PAGES = 64


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    """A guest that halts once it has answered its first request after the resume, so that many fit on two CPUs."""
    directory = tmp_path_factory.mktemp("snapshot")
    with baremetal.booted(directory / "vm") as vmm:
        with Guest(directory / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
            guest.on_reset(baremetal.STOP_AFTER_REQUEST)
        return baremetal.snapshot(Layout(directory / "data"), "warm", vmm)


@pytest.fixture
def kit(snapshot: Snapshot, tmp_path: Path) -> Kit:
    disks = {}
    for name in (boot.ROOT_DISK, boot.IMAGE_DISK):
        disks[name] = tmp_path / name
        disks[name].write_bytes(bytes(4096))
    return Kit(snapshot=snapshot, firecracker=baremetal.firecracker(), disks=disks)


@pytest.fixture
def vms(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "vms"
    directory.mkdir()
    yield directory
    assert [p for p in directory.iterdir() if p.name.startswith(".")] == [], "a pool leaves nothing"


def take(pool: Pool, count: int) -> list[pools.Loaded]:
    """So many clones, asked for at the same time by a thread each, as in a server; or, with those closed that there were, the first error."""
    with ThreadPoolExecutor(count) as threads:
        taken = [threads.submit(pool.take) for _ in range(count)]
    errors = [error for one in taken if (error := one.exception()) is not None]
    if errors:
        for one in taken:
            if one.exception() is None:
                one.result().close()
        raise errors[0]
    return [one.result() for one in taken]


def wait_for(pool: Pool, condition: Callable[[], bool]) -> None:
    """Wait until the pool is as ``condition`` wants it."""
    tick = threading.Event()
    for _ in range(6000):
        if condition():
            return
        tick.wait(0.01)
    raise AssertionError(f"it did not happen within a minute: {pool.status()}")


def test_taken_clone_runs_as_soon_as_it_is_resumed(kit: Kit, vms: Path) -> None:
    with Pool(kit, vms) as pool:
        pool.fill()
        assert pool.status() == pools.Status(ready=1, target=1, taken=0, late=0)
        with pool.take() as clone:
            assert clone.firecracker.api.get("/")["state"] == "Paused"
            clone.resume()
            with Guest(clone.directory) as guest:
                assert guest.wrong(FIRST, PAGES, seed=1) == 0
            directory, pid = clone.directory, clone.firecracker.pid
        assert not directory.exists()
        assert not Path(f"/proc/{pid}").exists()
        wait_for(pool, lambda: pool.status().ready == 1)
        assert pool.status().late == 0


def test_clones_have_disks_and_memory_of_their_own(kit: Kit, vms: Path) -> None:
    with Pool(kit, vms, minimum=2) as pool, contextlib.ExitStack() as stack:
        one, other = (stack.enter_context(clone) for clone in take(pool, 2))
        assert one.id != other.id
        (one.directory / "scratch.img").write_bytes(b"one")
        assert (other.directory / "scratch.img").read_bytes().startswith(b"scratch.img")
        one.resume()
        other.resume()
        with Guest(one.directory) as guest:
            guest.fill(FIRST, PAGES, seed=2)
        with Guest(other.directory) as guest:
            assert guest.wrong(FIRST, PAGES, seed=1) == 0


def test_many_at_once_even_more_than_are_ready(kit: Kit, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(kit, vms, minimum=2, maximum=4) as pool, contextlib.ExitStack() as stack:
        pool.fill()
        make, asked = pool._make, threading.Event()

        def make_when_all_have_asked(count: int) -> None:
            if not asked.is_set():
                wait_for(pool, lambda: pool._waiting == 18)
                asked.set()
            make(count)

        monkeypatch.setattr(pool, "_make", make_when_all_have_asked)
        clones = take(pool, 20)
        for clone in clones:
            stack.enter_context(clone)
        assert pool.status().late == 18
        for clone in clones:
            clone.resume()
        guests = [stack.enter_context(Guest(clone.directory)) for clone in clones]
        for number, guest in enumerate(guests):
            guest.send(baremetal.ECHO, argument=number)
        assert [guest.receive() for guest in guests] == list(range(20))


def test_pool_adapts_to_what_is_asked_of_it(kit: Kit, vms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "MEMORY", 600.0)
    with Pool(kit, vms, minimum=1, maximum=3) as pool:
        pool.fill()
        for clone in take(pool, 5):
            clone.close()
        wait_for(pool, lambda: pool.status().target == 3 and pool.status().ready == 3)
        monkeypatch.setattr(pools, "MEMORY", 0.1)
        pool._refill()  # so that it waits for no more than that
        wait_for(pool, lambda: pool.status().target == 1 and pool.status().ready == 1)
        wait_for(pool, lambda: len(list(pool.directory.iterdir())) == len(baremetal.children()) == 1)


def test_pool_without_a_minimum_makes_clones_when_asked(kit: Kit, vms: Path) -> None:
    with Pool(kit, vms, minimum=0, maximum=0) as pool:
        assert pool.status().ready == 0
        with pool.take() as clone:
            clone.resume()
            with Guest(clone.directory) as guest:
                assert guest.echo(3) == 3
        assert list(pool.directory.iterdir()) == []


def test_clone_that_died_in_the_pool_is_not_handed_out(kit: Kit, vms: Path) -> None:
    with Pool(kit, vms) as pool:
        pool.fill()
        (directory,) = pool.directory.iterdir()
        (pid,) = baremetal.children()
        died = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([died], [], [], 60)[0]
        os.close(died)
        with pool.take() as clone:
            assert clone.directory != directory
            clone.resume()
            with Guest(clone.directory) as guest:
                assert guest.echo(4) == 4


def test_clone_moves_to_a_directory_of_the_callers(kit: Kit, vms: Path) -> None:
    with Pool(kit, vms) as pool:
        with pool.take() as clone:
            before = clone.directory
            (vms / "mine").mkdir()
            clone.move(vms / "mine")
            clone.resume()
            with Guest(vms / "mine") as guest:
                assert guest.wrong(FIRST, PAGES, seed=1) == 0
            assert (before / "vsock.sock").exists(), "the old path leads there"
        assert (vms / "mine").exists(), "it is the caller's"
        assert not before.is_symlink(), "a server's directory does not grow with every clone"


def test_each_clone_is_in_a_namespace_of_its_own(kit: Kit, vms: Path) -> None:
    def network(clone_id: str, directory: Path) -> contextlib.AbstractContextManager[attach.Network]:
        assert directory.name == clone_id
        return attach.create(spec.parse("none"), clone_id, directory)

    with Pool(structs.replace(kit, network=network), vms, minimum=2) as pool:
        clones = take(pool, 2)
        try:
            spaces = {os.readlink(f"/proc/{clone.firecracker.pid}/ns/net") for clone in clones}
            assert len(spaces | {os.readlink("/proc/self/ns/net")}) == 3
            assert clones[0].network.tap == "tap0"
        finally:
            for clone in clones:
                clone.close()


def test_network_that_cannot_be_had_is_told_to_who_asks(kit: Kit, vms: Path) -> None:
    def network(clone_id: str, directory: Path) -> contextlib.AbstractContextManager[None]:
        raise NetworkError("no network today")

    with Pool(structs.replace(kit, network=network), vms) as pool:
        with pytest.raises(NetworkError, match="no network today"):
            pool.take()
        with pytest.raises(NetworkError, match="no network today"):
            take(pool, 3)
        assert list(pool.directory.iterdir()) == []


def test_snapshot_that_cannot_be_loaded_is_told_to_who_asks(kit: Kit, vms: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / store.VMSTATE).write_bytes(b"nonsense")
    (copy / store.MEMORY).symlink_to(kit.snapshot.memory)
    (copy / store.SCRATCH).symlink_to(kit.snapshot.scratch)
    broken = structs.replace(kit, snapshot=structs.replace(kit.snapshot, path=copy))
    with Pool(broken, vms) as pool, pytest.raises(SnapshotError, match="'warm' cannot be restored"):
        pool.take()


def test_uffd_backend_with_one_memory_server_for_all(kit: Kit, vms: Path, tmp_path: Path) -> None:
    with MemoryServer(kit.snapshot.memory, tmp_path / "s") as server:
        served = structs.replace(kit, backend="uffd", memory_socket=server.socket)
        with Pool(served, vms, minimum=3) as pool, contextlib.ExitStack() as stack:
            clones = take(pool, 3)
            for clone in clones:
                stack.enter_context(clone)
            for clone in clones:
                clone.resume()
            for clone in clones:
                with Guest(clone.directory) as guest:
                    assert guest.wrong(FIRST, PAGES, seed=1) == 0
            assert {clone.firecracker.pid for clone in clones} <= {faults.pid for faults in server.faults()}


def test_taking_ends_when_the_pool_closes(kit: Kit, vms: Path) -> None:
    stop = threading.Event()

    def network(clone_id: str, directory: Path) -> contextlib.AbstractContextManager[None]:
        stop.wait(60)
        raise NetworkError("too late")

    pool = Pool(structs.replace(kit, network=network), vms)
    errors: list[Exception] = []

    def take() -> None:
        try:
            pool.take()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    closer = threading.Thread(target=pool.close)
    wait_for(pool, lambda: pool._waiting == 1)
    closer.start()
    thread.join(60)
    stop.set()
    closer.join(60)
    assert [type(error) for error in errors] == [SnapshotError]


OWNER = """
import sys
from pathlib import Path
import baremetal
from fcvm.snapshots import store
from fcvm.snapshots.pool import Kit, Pool
from fcvm.storage.layout import Layout
base, vms = Path(sys.argv[1]), Path(sys.argv[2])
disks = {name: vms.parent / name for name in ("root.img", "image.img")}
pool = Pool(Kit(store.find(Layout(base), "warm"), baremetal.firecracker(), disks), vms, minimum=2)
taken = pool.take()
taken.resume()
pool.fill()
print(taken.firecracker.pid, *(clone.firecracker.pid for clone in pool._ready), flush=True)
sys.stdin.read()
"""


def test_owner_killed_ends_all_clones_and_the_next_sweeps(kit: Kit, vms: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, kit.snapshot.path.parent.parent, vms],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as owner:
        assert owner.stdout is not None
        pidfds = [os.pidfd_open(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(pidfds) == 3
        try:
            state.sweep(Layout(vms.parent))
            assert len(list(vms.iterdir())) == 1, "a living pool is left alone"
            owner.kill()
            for pidfd in pidfds:
                assert select.select([pidfd], [], [], 60)[0]
        finally:
            for pidfd in pidfds:
                os.close(pidfd)
    state.sweep(Layout(vms.parent))
    assert list(vms.iterdir()) == []


def test_two_hundred_clones_leave_nothing_behind(kit: Kit, vms: Path) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Pool(kit, vms, minimum=1, maximum=4) as pool:
        pool.fill()
        before = held()
        for _ in range(50):
            clones = take(pool, 4)
            for clone in clones:
                clone.resume()
            for clone in clones:
                clone.close()
        assert pool.status().taken == 200
    assert baremetal.children() == []
    after = held()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
