"""Pages that a restored VM will write, made its own before it runs."""

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
    return {page for mapping in written._mappings(pid, snapshot.memory) for page, _ in written._own(pid, mapping)}


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
    written.give(loaded.pid, recorded)
    assert pages(recorded) <= own(loaded.pid, recorded)
    restore.resume(loaded.api)
    with Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, PAGES, seed=1) == 0
        guest.fill(FIRST, PAGES, seed=3)
        assert guest.wrong(FIRST, PAGES, seed=3) == 0
    assert recorded.memory.read_bytes() == memory


@pytest.mark.parametrize("record", ["[[0, 1e9]]", "[[999999, 10], [0, 1]]", "nonsense", "[]"])
def test_a_record_that_is_wrong_costs_nothing_but_the_pages(
    tmp_path: Path, recorded: store.Snapshot, loaded: baremetal.Firecracker, record: str
) -> None:
    store.add(recorded, store.WRITTEN, record)
    written.give(loaded.pid, recorded)
    restore.resume(loaded.api)
    with Guest(tmp_path / "clone") as guest:
        assert guest.wrong(FIRST, PAGES, seed=1) == 0


def test_only_so_much_is_given(recorded: store.Snapshot, loaded: baremetal.Firecracker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written, "MOST", 20 * written.PAGE)
    before = own(loaded.pid, recorded)
    written.give(loaded.pid, recorded)
    assert len(own(loaded.pid, recorded) - before) <= 20
    assert own(loaded.pid, recorded) - before


def test_of_a_process_that_is_gone_nothing_is_recorded_and_none_is_given(snapshot: store.Snapshot) -> None:
    written.record(1 << 22, snapshot)
    assert not (snapshot.path / store.WRITTEN).exists()
    store.add(snapshot, store.WRITTEN, "[[0, 1]]")
    written.give(1 << 22, snapshot)
