"""Pages that a restored VM will write, made its own before it runs."""

import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import baremetal
import pytest
from baremetal import FIRST, Guest

from fcvm.snapshots import restore, store, working_set, written
from fcvm.storage.layout import Layout

PAGES = 512


@pytest.fixture
def snapshot(tmp_path: Path) -> store.Snapshot:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        return baremetal.snapshot(Layout(tmp_path / "data"), "warm", vmm)


@pytest.fixture
def recorded(tmp_path: Path, snapshot: store.Snapshot) -> store.Snapshot:
    """One whose first clone has written a tenth of the pages, here and there."""
    with baremetal.clone(tmp_path / "first", snapshot) as vmm, Guest(tmp_path / "first") as guest:
        for number in range(0, PAGES, 10):
            guest.fill(FIRST + number, 1, seed=2)
        written.record(vmm.pid, snapshot)
    return snapshot


def pages(snapshot: store.Snapshot) -> set[int]:
    """Those recorded."""
    return {page for first, count in working_set.load(snapshot.path / store.WRITTEN) for page in range(first, first + count)}


def own(pid: int, snapshot: store.Snapshot) -> set[int]:
    """Those that are no more the file's."""
    with open(f"/proc/{pid}/pagemap", "rb") as pagemap:
        return {page for found in written._mappings(pid, snapshot.memory) for page in written._own(pagemap.fileno(), found)}


@pytest.fixture
def loaded(tmp_path: Path, recorded: store.Snapshot) -> Iterator[baremetal.Firecracker]:
    with baremetal.clone(tmp_path / "clone", recorded, resume=False) as vmm:
        yield vmm


def test_what_a_clone_writes_is_recorded(recorded: store.Snapshot) -> None:
    wanted = set(range(FIRST, FIRST + PAGES, 10))
    assert wanted <= pages(recorded)
    assert len(pages(recorded) & set(range(FIRST, FIRST + PAGES))) == len(wanted)


def test_the_next_one_has_these_pages_before_it_runs_with_the_snapshots_content(
    tmp_path: Path, recorded: store.Snapshot, loaded: baremetal.Firecracker
) -> None:
    memory = recorded.memory.read_bytes()
    assert not pages(recorded) <= own(loaded.pid, recorded)
    written.give(loaded, recorded)
    assert pages(recorded) <= own(loaded.pid, recorded)
    restore.resume(loaded.api)
    with Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, PAGES, seed=1) == 0
        guest.fill(FIRST, PAGES, seed=3)
        assert guest.wrong(FIRST, PAGES, seed=3) == 0
    assert recorded.memory.read_bytes() == memory


def test_what_firecracker_has_written_meanwhile_is_left_alone(
    tmp_path: Path, recorded: store.Snapshot, loaded: baremetal.Firecracker
) -> None:
    (address, start, _), *_ = written._mappings(loaded.pid, recorded.memory)
    newer = (FIRST, FIRST + 10, FIRST + 30)
    with open(f"/proc/{loaded.pid}/mem", "r+b", buffering=0) as memory:
        for page in newer:
            os.pwrite(memory.fileno(), b"a packet", address + (page - start) * written.PAGE)
        written.give(loaded, recorded)
        for page in newer:
            assert os.pread(memory.fileno(), 8, address + (page - start) * written.PAGE) == b"a packet"
    assert pages(recorded) <= own(loaded.pid, recorded)
    restore.resume(loaded.api)
    with Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, PAGES, seed=1) == len(newer)


def test_no_thread_of_firecracker_runs_meanwhile(
    tmp_path: Path, recorded: store.Snapshot, loaded: baremetal.Firecracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def states() -> set[str]:
        tasks = Path(f"/proc/{loaded.pid}/task").glob("*/stat")
        return {task.read_text().rpartition(")")[2].split()[0] for task in tasks}

    seen: list[set[str]] = []
    monkeypatch.setattr(written, "_give", lambda *_: seen.append(states()))
    written.give(loaded, recorded)
    assert seen == [{"T"}]
    assert "T" not in states()


def test_it_dies_with_us_while_it_is_stopped(loaded: baremetal.Firecracker) -> None:
    with written._stopped(loaded):
        loaded._leash.close()  # as the kernel does when we are killed
        assert select.select([loaded.pidfd], [], [], 60)[0], "it has ended"
    assert loaded.process.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("record", ["[[0, 1e9]]", "[[999999, 10], [0, 1]]", "nonsense", "[]"])
def test_a_record_that_is_wrong_costs_nothing_but_the_pages(
    tmp_path: Path, recorded: store.Snapshot, loaded: baremetal.Firecracker, record: str
) -> None:
    store.add(recorded, store.WRITTEN, record)
    written.give(loaded, recorded)
    restore.resume(loaded.api)
    with Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, PAGES, seed=1) == 0


def test_only_so_much_is_given(recorded: store.Snapshot, loaded: baremetal.Firecracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MOST", 20 * written.PAGE)
    before = own(loaded.pid, recorded)
    written.give(loaded, recorded)
    assert len(own(loaded.pid, recorded) - before) <= 20
    assert own(loaded.pid, recorded) - before


def test_of_a_process_that_is_gone_nothing_is_recorded_and_none_is_given(
    snapshot: store.Snapshot, recorded: store.Snapshot, loaded: baremetal.Firecracker
) -> None:
    written.record(1 << 22, snapshot)
    kept = (snapshot.path / store.WRITTEN).read_text()
    os.kill(loaded.pid, signal.SIGKILL)
    written.give(loaded, recorded)
    assert (snapshot.path / store.WRITTEN).read_text() == kept
    loaded.kill()
    written.give(loaded, recorded)
