"""Snapshots of real VMs: consistent, complete, small, and never at the cost of the VM that they are of."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import baremetal
import pytest
from baremetal import FIRST, Guest

from fc_agent import structs
from fcvm.errors import FirecrackerError, HostError, SnapshotError
from fcvm.process import run
from fcvm.snapshots import create, restore, store
from fcvm.storage.layout import Layout

PAGES = 2048


def differing_pages(one: Path, other: Path) -> list[int]:
    with open(one, "rb") as a, open(other, "rb") as b:
        pairs = enumerate(zip(iter(lambda: a.read(4096), b""), iter(lambda: b.read(4096), b""), strict=True))
        return [page for page, (left, right) in pairs if left != right]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "data")


@pytest.fixture
def reflinks() -> Iterator[Path]:
    """A directory on a file system with reflinks: a btrfs of its own."""
    with tempfile.TemporaryDirectory(prefix="fcvm-test-") as name:
        image, mount = Path(name) / "btrfs.img", Path(name) / "mnt"
        mount.mkdir()
        with open(image, "wb") as file:
            file.truncate(1 << 30)
        run(["mkfs.btrfs", "-q", image])
        run(["mount", "-o", "loop", image, mount])
        try:
            yield mount
        finally:
            run(["umount", mount])


def test_first_snapshot_is_complete_and_sparse(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm", memory=512) as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        (tmp_path / "full").mkdir()
        with create.paused(vmm):  # so that both are of the same moment
            snapshot = baremetal.snapshot(layout, "first", vmm)
            create.relative_to(tmp_path / "vm", None)
            timings = create.create(vmm, tmp_path / "vm", tmp_path / "full")
    assert timings.kind == "Full"
    different = differing_pages(snapshot.memory, tmp_path / "full" / store.MEMORY)
    # Taking the second one told the guest of it through vsock's event queue: its used ring and its buffer.
    assert 1 <= len(different) <= 4, "a first Diff is a Full one"
    assert max(different) < FIRST
    assert snapshot.memory.stat().st_size == 512 << 20
    assert snapshot.memory.stat().st_blocks * 512 < 64 << 20, "a Diff holds what the guest has touched"
    assert (tmp_path / "full" / store.MEMORY).stat().st_blocks * 512 < 64 << 20, "a Full one gets its holes afterwards"
    assert baremetal.wrong_in_file(snapshot.memory, FIRST, PAGES, seed=1) == 0


def test_source_runs_on_and_the_clone_has_its_memory_and_disk(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        (tmp_path / "vm/scratch.img").write_bytes(b"disk at the snapshot".ljust(4096, b"\0"))
        snapshot = baremetal.snapshot(layout, "warm", vmm)
        (tmp_path / "vm/scratch.img").write_bytes(b"disk later".ljust(4096, b"\0"))
        assert vmm.api.get("/")["state"] == "Running"
        with Guest(tmp_path / "vm") as source:
            source.fill(FIRST, PAGES, seed=2)
            with baremetal.clone(tmp_path / "clone", snapshot), Guest(tmp_path / "clone") as clone:
                assert clone.wrong(FIRST, PAGES, seed=1) == 0
                assert source.wrong(FIRST, PAGES, seed=2) == 0
                clone.fill(FIRST, PAGES, seed=3)
                assert source.wrong(FIRST, PAGES, seed=2) == 0
    assert (tmp_path / "clone/scratch.img").read_bytes().startswith(b"disk at the snapshot")
    assert baremetal.wrong_in_file(snapshot.memory, FIRST, PAGES, seed=1) == 0, "a clone must not write to the snapshot"


def test_clone_of_a_clone_of_a_clone(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "0") as vmm:
        with Guest(tmp_path / "0") as guest:
            guest.fill(FIRST, PAGES, seed=100)
        snapshot = baremetal.snapshot(layout, "g0", vmm)
    for generation in range(1, 4):
        directory = tmp_path / str(generation)
        with baremetal.clone(directory, snapshot) as vmm:
            with Guest(directory) as guest:
                for older in range(1, generation):
                    assert guest.wrong(FIRST + older * 16, 16, seed=100 + older) == 0
                assert guest.wrong(FIRST + generation * 16, PAGES - generation * 16, seed=100) == 0
                guest.fill(FIRST + generation * 16, 16, seed=100 + generation)
            snapshot = baremetal.snapshot(layout, f"g{generation}", vmm)
    assert store.tags(layout) == ["g0", "g1", "g2", "g3"]


@pytest.mark.parametrize("where", ["tmp_path", "reflinks"])
def test_later_snapshots_hold_what_has_changed(where: str, request: pytest.FixtureRequest) -> None:
    place: Path = request.getfixturevalue(where)
    layout = Layout(place)
    vm = layout.vms / "vm"
    with baremetal.booted(vm) as vmm:
        with Guest(vm) as guest:
            guest.fill(FIRST, PAGES, seed=1)
        baremetal.snapshot(layout, "first", vmm)
        with Guest(vm) as guest:
            guest.fill(FIRST + 100, 50, seed=2)
        assert create.take(layout, "second", vmm, baremetal.manifest(vmm)).kind == "Diff"
        store.remove(layout, "first")  # the next one is relative to the second, which stays
        with Guest(vm) as guest:
            guest.fill(FIRST, 10, seed=3)
        store.remove(layout, "second")  # and now the base is gone from the store as well
        third = baremetal.snapshot(layout, "third", vmm)
        with Guest(vm) as guest:
            guest.fill(FIRST, PAGES, seed=4)
        for start, count, seed in ((0, 10, 3), (10, 90, 1), (100, 50, 2), (150, PAGES - 150, 1)):
            assert baremetal.wrong_in_file(third.memory, FIRST + start, count, seed) == 0
        with baremetal.clone(layout.vms / "clone", third), Guest(layout.vms / "clone") as clone:
            assert clone.wrong(FIRST, 10, seed=3) == 0
            assert clone.wrong(FIRST + 100, 50, seed=2) == 0


def test_later_snapshot_shares_the_blocks_of_the_one_before(reflinks: Path) -> None:
    layout = Layout(reflinks)
    with baremetal.booted(layout.vms / "vm") as vmm:
        with Guest(layout.vms / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        baremetal.snapshot(layout, "first", vmm)
        with Guest(layout.vms / "vm") as guest:
            guest.fill(FIRST, 5, seed=2)
        second = baremetal.snapshot(layout, "second", vmm)
    _, exclusive, _ = (
        run(["btrfs", "filesystem", "du", "--raw", "-s", second.memory]).stdout.split(b"\n")[1].split()[:3]
    )
    assert second.memory.stat().st_blocks * 512 > PAGES * 4096
    assert int(exclusive) < PAGES * 4096 // 4


def test_vm_restored_without_dirty_tracking_gets_a_full_snapshot(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        snapshot = baremetal.snapshot(layout, "warm", vmm)
    with baremetal.clone(tmp_path / "clone", snapshot, dirty_tracking=False) as vmm:
        with Guest(tmp_path / "clone") as guest:
            guest.fill(FIRST, 10, seed=2)
        assert create.take(layout, "again", vmm, baremetal.manifest(vmm)).kind == "Full"
        with Guest(tmp_path / "clone") as guest:
            guest.fill(FIRST, 5, seed=3)
        assert create.take(layout, "and-again", vmm, baremetal.manifest(vmm)).kind == "Full"
    memory = store.find(layout, "again").memory
    assert baremetal.wrong_in_file(memory, FIRST, 10, seed=2) == 0
    assert baremetal.wrong_in_file(memory, FIRST + 10, PAGES - 10, seed=1) == 0
    memory = store.find(layout, "and-again").memory
    assert baremetal.wrong_in_file(memory, FIRST, 5, seed=3) == 0
    assert baremetal.wrong_in_file(memory, FIRST + 5, 5, seed=2) == 0
    assert memory.stat().st_nlink == 1, "the VM keeps no memory file that it has no use for"


def test_vm_booted_without_dirty_tracking_gets_full_snapshots(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm", dirty_tracking=False) as vmm:
        for seed in (1, 2, 3):
            with Guest(tmp_path / "vm") as guest:
                guest.fill(FIRST, PAGES, seed=seed)
            tag = f"number-{seed}"
            assert create.take(layout, tag, vmm, baremetal.manifest(vmm)).kind == "Full"
            assert baremetal.wrong_in_file(store.find(layout, tag).memory, FIRST, PAGES, seed=seed) == 0


def test_after_a_snapshot_that_did_not_reach_the_disk_the_next_one_is_of_all_memory(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what of the failed one's file can be read again, and its pages count as clean."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(SnapshotError, match="Input/output error"):
                create.take(layout, "lost", vmm, baremetal.manifest(vmm))
        assert create.take(layout, "next", vmm, baremetal.manifest(vmm)).kind == "Full"
        assert baremetal.wrong_in_file(store.find(layout, "next").memory, FIRST, PAGES, seed=1) == 0
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, 10, seed=2)
        assert create.take(layout, "last", vmm, baremetal.manifest(vmm)).kind == "Diff"
    memory = store.find(layout, "last").memory
    assert baremetal.wrong_in_file(memory, FIRST, 10, seed=2) == 0
    assert baremetal.wrong_in_file(memory, FIRST + 10, PAGES - 10, seed=1) == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system with 6 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", mount])
    try:
        yield mount
    finally:
        run(["umount", mount])


def test_full_disk_leaves_the_source_running_and_no_snapshot(tmp_path: Path, small: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        with pytest.raises(HostError, match="no space left") as caught:
            baremetal.snapshot(Layout(small), "warm", vmm)
        assert "fcvm snapshots prune" in str(caught.value.hint)
        assert list((small / "snapshots").iterdir()) == []
        assert vmm.api.get("/")["state"] == "Running"
        with Guest(tmp_path / "vm") as guest:
            assert guest.wrong(FIRST, PAGES, seed=1) == 0
        # What the failed one has written counts as clean for Firecracker: the next must hold it nevertheless.
        snapshot = baremetal.snapshot(layout, "warm", vmm)
    assert baremetal.wrong_in_file(snapshot.memory, FIRST, PAGES, seed=1) == 0


def test_disk_that_does_not_fit_leaves_the_source_running(tmp_path: Path, small: Path) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        (tmp_path / "vm/scratch.img").write_bytes(b"x" * (8 << 20))
        with pytest.raises(HostError, match="no space left"):
            baremetal.snapshot(Layout(small), "warm", vmm)
        assert vmm.api.get("/")["state"] == "Running"
        with Guest(tmp_path / "vm") as guest:
            assert guest.echo(1) == 1


def test_dead_source_is_an_error_and_leaves_no_snapshot(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        os.kill(vmm.pid, signal.SIGKILL)
        vmm.process.wait()
        with pytest.raises(FirecrackerError):
            baremetal.snapshot(layout, "warm", vmm)
    assert list(layout.snapshots.iterdir()) == []


def test_source_that_stood_still_goes_on_standing_still(tmp_path: Path, layout: Layout) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm, create.paused(vmm):
        baremetal.snapshot(layout, "warm", vmm)
        assert vmm.api.get("/")["state"] == "Paused"


MAKER = """
import os, signal, sys
from pathlib import Path
import baremetal
from fcvm.snapshots import create, store
from fcvm.storage.layout import Layout

point, layout, vm = sys.argv[1], Layout(Path(sys.argv[2])), Path(sys.argv[3])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

with baremetal.booted(vm) as vmm:
    if point == "paused":
        create._write = die
    elif point == "written":
        create.files.clone = die
    elif point == "cloned":
        create.Manifest.write = die
    elif point == "complete":
        Path.chmod = die
    baremetal.snapshot(layout, "warm", vmm)
"""


def wait_until_nobody_works_in(directory: Path) -> None:
    for _ in range(600):
        if not any(at(process / "cwd", directory) for process in Path("/proc").glob("[0-9]*")):
            return
        time.sleep(0.1)
    raise AssertionError(f"a process works in {directory}")


def at(link: Path, directory: Path) -> bool:
    try:
        return link.samefile(directory)
    except OSError:  # the process has ended
        return False


@pytest.mark.parametrize("point", ["paused", "written", "cloned", "complete"])
def test_maker_killed_at_any_point_leaves_no_snapshot(tmp_path: Path, layout: Layout, point: str) -> None:
    baremetal.kernel()
    done = subprocess.run(
        [sys.executable, "-c", MAKER, point, layout.base, tmp_path / "vm"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert store.tags(layout) == []
    wait_until_nobody_works_in(tmp_path / "vm")  # the source is its maker's: it ends, it does not stay behind paused
    with baremetal.booted(tmp_path / "other") as vmm:
        baremetal.snapshot(layout, "warm", vmm)
    assert [p.name for p in layout.snapshots.iterdir()] == ["warm"]


# ---- restoring


@pytest.fixture
def snapshot(tmp_path: Path, layout: Layout) -> store.Snapshot:
    with baremetal.booted(tmp_path / "vm") as vmm:
        with Guest(tmp_path / "vm") as guest:
            guest.fill(FIRST, PAGES, seed=1)
        return baremetal.snapshot(layout, "warm", vmm)


def test_loaded_clone_stands_still_until_it_is_resumed(tmp_path: Path, snapshot: store.Snapshot) -> None:
    with baremetal.clone(tmp_path / "clone", snapshot, resume=False) as vmm:
        assert vmm.api.get("/")["state"] == "Paused"
        restore.resume(vmm.api)
        with Guest(tmp_path / "clone") as guest:
            assert guest.wrong(FIRST, PAGES, seed=1) == 0


def test_stale_vsock_socket_does_not_stand_in_the_way(tmp_path: Path, snapshot: store.Snapshot) -> None:
    directory = tmp_path / "clone"
    baremetal.furnish_clone(directory, snapshot)
    (directory / "vsock.sock").touch()
    with baremetal.Firecracker(baremetal.firecracker(), directory, "clone") as vmm:
        restore.load(vmm, snapshot, resume=True)
        with Guest(directory) as guest:
            assert guest.echo(1) == 1


@pytest.mark.parametrize("damage", ["vmstate.bin", "memory.bin"])
def test_damaged_snapshot_is_refused_and_the_vmm_killed(tmp_path: Path, snapshot: store.Snapshot, damage: str) -> None:
    path = snapshot.path / damage
    path.chmod(0o644)
    os.truncate(path, 100)
    directory = tmp_path / "clone"
    baremetal.furnish_clone(directory, snapshot)
    with baremetal.Firecracker(baremetal.firecracker(), directory, "clone") as vmm:
        with pytest.raises(SnapshotError, match="'warm' cannot be restored"):
            restore.load(vmm, snapshot, resume=True)
        assert vmm.ended()


def test_missing_disk_is_refused_with_the_image_to_pull(
    tmp_path: Path, snapshot: store.Snapshot, layout: Layout
) -> None:
    manifest = structs.replace(
        snapshot.manifest, disks={"image.img": "images/abc.img"}, image={"reference": "localhost/demo"}
    )
    needs = structs.replace(snapshot, manifest=manifest)
    with pytest.raises(SnapshotError, match=r"needs .*images/abc\.img") as caught:
        restore.find_disks(needs, layout)
    assert caught.value.hint == "fcvm images pull localhost/demo"
    (layout.images / "abc.img").write_bytes(b"image")
    assert restore.find_disks(needs, layout) == {"image.img": layout.images / "abc.img"}


def test_compatibility_is_asked_of_the_running_vmm(tmp_path: Path, snapshot: store.Snapshot) -> None:
    with baremetal.clone(tmp_path / "clone", snapshot) as vmm:
        restore.check(snapshot, vmm)
        other = structs.replace(snapshot, manifest=structs.replace(snapshot.manifest, firecracker="0.9.0"))
        with pytest.raises(SnapshotError, match=r"made by Firecracker 0\.9\.0"):
            restore.check(other, vmm)


def test_drive_is_replaced_before_the_clone_runs(tmp_path: Path, snapshot: store.Snapshot) -> None:
    with baremetal.clone(tmp_path / "clone", snapshot, resume=False) as vmm:
        (tmp_path / "clone/other.img").write_bytes(b"x" * (1 << 20))
        restore.replace_drive(vmm.api, "image", "other.img")
        restore.resume(vmm.api)
        configuration = vmm.api.get("/vm/config")
    assert {d["drive_id"]: d["path_on_host"] for d in configuration["drives"]}["image"] == "other.img"
