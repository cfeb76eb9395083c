"""fcvm.snapshots.store: published whole or not at all, and not removed while in use."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fc_agent import structs
from fc_agent.protocol import PROTOCOL
from fcvm import config as settings
from fcvm.errors import ConflictError, HostError, NotFoundError, SnapshotError, UsageError
from fcvm.firecracker.boot import Hardware
from fcvm.snapshots import manifest, server, store
from fcvm.snapshots.manifest import Manifest
from fcvm.storage.layout import Layout
from fcvm.vm import boot_snapshot, clone, warm
from fcvm.vm.start import Boot, Start


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def a_manifest(**changes: object) -> Manifest:
    made = Manifest(
        hardware=Hardware(cpu=1, memory=64, boot_args="quiet", tap=None, mac=None),
        disks={"root.img": "guest/key/root.img"},
        firecracker="1.12.1",
        host=manifest.this_host(),
        created_at=1000.0,
        image={"reference": "localhost/demo", "id": "sha256:1", "digest": "sha256:2"},
        spec={"name": "demo"},
    )
    return structs.replace(made, **changes)  # type: ignore[arg-type]


def fill(directory: Path, **changes: object) -> None:
    """Write the files of a snapshot into ``directory``."""
    a_manifest(**changes).write(directory)
    (directory / store.VMSTATE).write_bytes(b"state")
    (directory / store.SCRATCH).write_bytes(b"disk")
    (directory / store.VOLUMES).write_text("[]")
    with open(directory / store.MEMORY, "wb") as file:
        file.truncate(8 << 20)
        file.seek(1 << 20)
        file.write(b"memory")


def make(layout: Layout, tag: str, **changes: object) -> None:
    with store.creating(layout, tag) as directory:
        fill(directory, **changes)


@pytest.mark.parametrize(("kind", "other"), [("boot", "warm"), ("warm", "boot")])
def test_only_the_newest_boot_snapshots_and_warm_starts_stay(layout: Layout, kind: str, other: str) -> None:
    for number in range(boot_snapshot.KEPT + 2):
        make(layout, f"it-{number}", created_at=float(number), kind=kind)
    make(layout, "mine", created_at=0.0)
    make(layout, "other", created_at=0.0, kind=other)
    with store.use(layout, "it-0"):
        boot_snapshot.trim(layout, kind)
    newest = [f"it-{number}" for number in range(2, boot_snapshot.KEPT + 2)]
    assert store.tags(layout) == ["it-0", *newest, "mine", "other"]


def test_made_found_listed_removed(layout: Layout) -> None:
    make(layout, "second", created_at=2.0)
    make(layout, "first", created_at=1.0)
    assert store.tags(layout) == ["first", "second"]
    assert [s.tag for s in store.snapshots(layout)] == ["first", "second"]
    found = store.find(layout, "first")
    assert found.manifest == a_manifest(created_at=1.0)
    assert found.memory.read_bytes()[1 << 20 :].startswith(b"memory")
    assert found.volumes() == []
    assert 0 < found.bytes_on_disk() < 8 << 20, "the memory file must stay sparse"
    assert store.remove(layout, "first") > 0
    assert store.tags(layout) == ["second"]
    assert sorted(p.name for p in layout.snapshots.iterdir()) == ["second"], "nothing else may be left"


def test_published_files_are_read_only(layout: Layout) -> None:
    make(layout, "warm")
    for file in (layout.snapshots / "warm").iterdir():
        assert file.stat().st_mode & 0o777 == 0o400, file


def test_unknown_snapshot(layout: Layout) -> None:
    for action in (store.find, store.remove):
        with pytest.raises(NotFoundError, match="no snapshot named 'nothing'"):
            action(layout, "nothing")
    with pytest.raises(NotFoundError), store.use(layout, "nothing"):
        pass


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "-a", "a" * 64, "x.creating", "x.removing", "a b"])
def test_bad_tags_are_refused(layout: Layout, tag: str) -> None:
    with pytest.raises(UsageError):
        make(layout, tag)


def test_name_that_is_taken(layout: Layout) -> None:
    make(layout, "warm")
    with pytest.raises(ConflictError, match="exists already"):
        make(layout, "warm")
    assert store.tags(layout) == ["warm"]
    assert not (layout.snapshots / "warm.creating").exists()


def test_one_maker_at_a_time(layout: Layout) -> None:
    with store.creating(layout, "warm") as directory:
        with pytest.raises(ConflictError, match="being made"):
            make(layout, "warm")
        assert directory.exists(), "the second maker must not disturb the first"
        assert store.tags(layout) == []
        assert store.sweep(layout) == []
        fill(directory)
    assert store.tags(layout) == ["warm"]


def test_failed_making_leaves_nothing(layout: Layout) -> None:
    def fail() -> None:
        with store.creating(layout, "warm") as directory:
            fill(directory)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(layout.snapshots.iterdir()) == []


def test_incomplete_snapshot_is_not_published(layout: Layout) -> None:
    def leave_out() -> None:
        with store.creating(layout, "warm") as directory:
            fill(directory)
            (directory / store.MEMORY).unlink()

    with pytest.raises(SnapshotError, match=r"memory\.bin missing"):
        leave_out()
    assert list(layout.snapshots.iterdir()) == []


MAKER = """
import sys
from pathlib import Path
from fcvm.snapshots import store
from fcvm.storage.layout import Layout
from fcvm.vm import boot_snapshot, clone, warm
from fcvm.vm.start import Boot, Start
with store.creating(Layout(Path(sys.argv[1])), "warm") as directory:
    (directory / "memory.bin").write_bytes(b"half")
    print("making", flush=True)
    sys.stdin.read()
"""

USER = """
import sys
from pathlib import Path
from fcvm.snapshots import store
from fcvm.storage.layout import Layout
from fcvm.vm import boot_snapshot, clone, warm
from fcvm.vm.start import Boot, Start
with store.use(Layout(Path(sys.argv[1])), "warm"):
    print("using", flush=True)
    sys.stdin.read()
"""


def other_process(program: str, layout: Layout) -> "subprocess.Popen[bytes]":
    """``program`` in a process of its own, once it has printed its line."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(layout.base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_killed_maker_leaves_no_snapshot_and_does_not_stand_in_the_way(layout: Layout) -> None:
    with other_process(MAKER, layout) as maker:
        with pytest.raises(ConflictError):
            make(layout, "warm")
        maker.send_signal(signal.SIGKILL)
    assert store.tags(layout) == []
    assert [name for name, _ in store.sweep(layout)] == ["warm.creating"]
    with other_process(MAKER, layout) as maker:
        maker.kill()
    make(layout, "warm")
    assert store.find(layout, "warm").memory.stat().st_size == 8 << 20, "what the killed maker wrote must be gone"


def test_snapshot_in_use_is_not_removed(layout: Layout) -> None:
    make(layout, "warm")
    assert not store.in_use(layout, "warm")
    with other_process(USER, layout) as user:
        assert store.in_use(layout, "warm")
        with store.use(layout, "warm"), pytest.raises(ConflictError, match="in use"):
            store.remove(layout, "warm")
        with pytest.raises(ConflictError, match="in use"):
            store.remove(layout, "warm")
        assert store.prune(layout, everything=True) == []
        user.kill()
    store.remove(layout, "warm")
    assert store.tags(layout) == []


@contextlib.contextmanager
def others(look: Callable[[], object]) -> Iterator[None]:
    """Inside the block two others ``look`` again and again."""
    ended = threading.Event()

    def body() -> None:
        while not ended.is_set():
            look()

    threads = [threading.Thread(target=body) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_whoever_looks_is_no_user(layout: Layout) -> None:
    """Two `fcvm snapshots ls` at once said that a snapshot was in use, and one made `rm` fail."""
    make(layout, "warm")
    with others(lambda: store.in_use(layout, "warm")):
        assert not any(store.in_use(layout, "warm") for _ in range(100))
        store.remove(layout, "warm")


def test_whoever_sweeps_does_not_stand_in_a_makers_way(layout: Layout) -> None:
    """Nor sweeps away what one has just begun."""
    with others(lambda: store.sweep(layout)):
        for number in range(30):
            with contextlib.suppress(SnapshotError), store.creating(layout, f"warm-{number}"):
                pass  # all is missing


def test_prune_keeps_what_the_user_made(layout: Layout) -> None:
    make(layout, "mine")
    make(layout, "boot-1", kind="boot")
    make(layout, "warm-1", kind="warm")
    make(layout, "broken")
    os.chmod(layout.snapshots / "broken/config.json", 0o644)
    (layout.snapshots / "broken/config.json").write_text("{")
    (layout.snapshots / "left.creating").mkdir()
    (layout.snapshots / "left.creating/memory.bin").write_bytes(b"x" * 10000)
    removed = dict(store.prune(layout))
    assert sorted(removed) == ["boot-1", "broken", "left.creating", "warm-1"]
    assert removed["left.creating"] >= 10000
    assert store.tags(layout) == ["mine"]
    assert [name for name, _ in store.prune(layout, everything=True)] == ["mine"]


@pytest.mark.parametrize("content", [
    "", "{", "[]", "[" * 100_000, '{"schema": 1}', '{"schema": 99}', {"created_at": "then"}, {"disks": []}, {"disks": {"a": 1}}, {"image": []},
])  # fmt: skip
def test_damaged_manifest_is_a_clear_error(layout: Layout, content: str | dict[str, object]) -> None:
    make(layout, "warm")
    path = layout.snapshots / "warm/config.json"
    path.chmod(0o644)
    if isinstance(content, dict):  # all but this is right
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(SnapshotError, match="'warm'") as caught:
        store.find(layout, "warm")
    assert "fcvm snapshots rm warm" in str(caught.value.hint)
    assert store.snapshots(layout) == []
    assert store.tags(layout) == ["warm"]
    store.remove(layout, "warm")


def test_absolute_paths_are_not_recorded(layout: Layout) -> None:
    for path in ("/guest/root.img", "../root.img"):
        with pytest.raises(ValueError, match="not relative"):
            make(layout, "warm", disks={"root.img": path})


def test_optional_file_is_added_in_one_step(layout: Layout) -> None:
    make(layout, "warm")
    found = store.find(layout, "warm")
    store.add(found, store.WORKING_SET, "[]")
    store.add(found, store.WORKING_SET, "[[0, 1]]")
    assert (found.path / store.WORKING_SET).read_text() == "[[0, 1]]"
    assert len(list(found.path.iterdir())) == len(store.REQUIRED) + 1


# ---- compatibility


def test_guest_agent_of_another_protocol_is_refused() -> None:
    """Before its VM is loaded, and not by the hello of an agent that nobody can answer."""
    other = a_manifest(protocol=PROTOCOL + 1)
    with pytest.raises(SnapshotError, match=f"agent of 'warm' speaks version {PROTOCOL + 1} .* this fcvm version {PROTOCOL}"):
        manifest.check("warm", other, firecracker="1.12.1", host=other.host)


def check(made_on: manifest.Host, restored_on: manifest.Host, firecracker: str = "1.12.1") -> None:
    manifest.check("warm", a_manifest(host=made_on), firecracker=firecracker, host=restored_on)


HOST = manifest.Host(kernel="6.12.1-amd64", cpu="EPYC", vendor="x86_64 AuthenticAMD", flags=("avx2", "sse2"))


def test_same_host_is_compatible() -> None:
    here = manifest.this_host()
    assert here.flags
    assert here.vendor
    check(here, here)


def test_more_features_and_newer_kernels_are_compatible() -> None:
    newer = structs.replace(HOST, flags=("avx2", "avx512f", "sse2"), kernel="7.0.0")
    check(HOST, newer, "1.12.9")


@pytest.mark.parametrize(
    ("changes", "firecracker", "message"),
    [
        ({}, "1.13.0", "made by Firecracker 1.12.1, and here is 1.13.0"),
        ({"vendor": "x86_64 GenuineIntel", "cpu": "Xeon"}, "1.12.1", "another kind of CPU: EPYC, and this is Xeon"),
        ({"flags": ("sse2",), "cpu": "Old"}, "1.12.1", "EPYC, which has CPU features that Old lacks: avx2"),
        ({"kernel": "6.1.0"}, "1.12.1", r"under Linux 6.12.1-amd64, newer than this host's 6.1.0"),
    ],
)
def test_incompatible_hosts_are_refused(changes: dict[str, object], firecracker: str, message: str) -> None:
    with pytest.raises(SnapshotError, match=message):
        check(HOST, structs.replace(HOST, **changes), firecracker)  # type: ignore[arg-type]


def test_host_is_read_from_an_arm64_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
    )
    host = manifest.this_host(path)
    assert host.flags == ("asimd", "fp")
    assert host.vendor.endswith("0x41")
    assert host.cpu == "0xd0c"


@pytest.mark.parametrize("name", ["lost+found", "two words", "-dash"])
def test_directories_that_cannot_be_snapshots_are_left_alone(layout: Layout, name: str) -> None:
    (layout.snapshots / name).mkdir()
    assert store.tags(layout) == []
    assert store.prune(layout, everything=True) == []
    assert (layout.snapshots / name).is_dir()


def test_what_goes_while_others_are_pruned_is_no_error(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    make(layout, "boot", kind="boot")
    monkeypatch.setattr(store, "tags", lambda _layout: ["gone", "boot"])
    assert [tag for tag, _ in store.prune(layout)] == ["boot"]


@pytest.mark.parametrize(
    "disks",
    [
        {"../../outside": "guest/root.img"},
        {"/tmp/outside": "guest/root.img"},
        {"..": "guest/root.img"},
        {"root.img": "/etc/passwd"},
        {"root.img": "../../etc/passwd"},
        {"root.img": 1},
    ],
)
def test_a_snapshot_from_elsewhere_reaches_no_files_outside(layout: Layout, disks: dict[str, object]) -> None:
    make(layout, "strange")
    path = layout.snapshots / "strange/config.json"
    path.chmod(0o600)
    path.write_text(json.dumps({**json.loads(path.read_text()), "disks": disks}))
    with pytest.raises(SnapshotError, match="damaged"):
        store.find(layout, "strange")


@pytest.mark.parametrize("spec", [{"name": "x"}, {"image": 1}, {"image": {}, "from": "the future"}])
def test_a_snapshot_of_a_vm_of_another_kind_is_refused(layout: Layout, spec: dict[str, object]) -> None:
    make(layout, "strange", spec=spec)
    with pytest.raises(SnapshotError, match="does not know how to run"):
        clone.spec_of(store.find(layout, "strange"), name="x")


def test_a_snapshot_of_a_time_that_no_calendar_has_is_damaged(layout: Layout) -> None:
    make(layout, "strange", created_at=1e300)
    with pytest.raises(SnapshotError, match="created_at"):
        store.find(layout, "strange")


def test_a_server_of_a_snapshot_that_does_not_fit_this_host_does_not_start(layout: Layout) -> None:
    make(layout, "strange", host=structs.replace(manifest.this_host(), vendor="x86_64 Elsewhere"))
    assets = SimpleNamespace(firecracker_version="1.12.1")
    served = server.CloneServer(server.Settings("strange"), settings.load({"base_dir": str(layout.base)}), assets)  # type: ignore[arg-type]
    with pytest.raises(SnapshotError, match="another kind of CPU"):
        served.run()


@pytest.mark.parametrize("kind", ["boot", "warm"])
def test_one_of_ours_that_cannot_be_restored_is_removed_and_made_again(layout: Layout, kind: str) -> None:
    make(layout, "stale", kind=kind)
    start: Start
    other: Start
    if kind == "boot":
        start = boot_snapshot.Restore(None, warm="w", source="stale")  # type: ignore[arg-type]
        other = boot_snapshot.BootAndCapture(None, warm="w", name="stale")  # type: ignore[arg-type]
    else:
        start, other = warm.Warm(None, "stale", otherwise=Boot(None)), Boot(None, warm="stale")  # type: ignore[arg-type]
    assert start.instead(layout) == other
    assert store.tags(layout) == []
    assert other.instead(layout) is None


def test_a_disk_too_full_to_begin_is_told_as_any_other(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose boot snapshot cannot be taken goes on by this error only."""
    before = layout.snapshots

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(HostError, match="no space left"), store.creating(layout, "x"):
        pytest.fail("it begins")
    monkeypatch.undo()
    assert list(before.iterdir()) == []


def test_one_that_may_not_be_removed_is_told_and_is_no_reason_to_end_a_run(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for number in range(boot_snapshot.KEPT + 1):
        make(layout, f"it-{number}", created_at=float(number), kind="boot")
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SnapshotError, match="cannot be removed: Permission denied"):
        store.remove(layout, "it-0")
    boot_snapshot.trim(layout, "boot")
    assert len(store.tags(layout)) == boot_snapshot.KEPT + 1
