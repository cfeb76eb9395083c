"""Warm starts: what names one, and which of the first run's output comes again."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fc_agent import structs
from fcvm.setup import Assets
from fcvm.snapshots import create, store
from fcvm.snapshots.store import Snapshot
from fcvm.storage.layout import Layout
from fcvm.vm import boot_snapshot, warm
from fcvm.vm.output import LOG, Output
from fcvm.vm.spec import ImageUse, RunSpec
from fcvm.vm.start import Boot

IMAGE = ImageUse(reference="localhost/demo", id="sha256:1", digest="sha256:2", path="/nowhere.img")
SPEC = RunSpec(name="one", image=IMAGE, command=["serve"], env={"A": "1"}, warm=True)
NOWHERE = Path("/nowhere")
ASSETS = Assets(NOWHERE, NOWHERE, "", NOWHERE, NOWHERE, NOWHERE, NOWHERE, NOWHERE, "1.12.1")


@pytest.mark.parametrize(
    "changes",
    [
        {"image": structs.replace(IMAGE, digest="sha256:3")},
        {"image": structs.replace(IMAGE, id="sha256:3")},
        {"command": ["serve", "-v"]},
        {"command": None},
        {"entrypoint": ["sh"]},
        {"env": {"A": "2"}},
        {"user": "1000"},
        {"workdir": "/tmp"},
        {"privileged": True},
        {"tty": True},
        {"health_check": "http://localhost/"},
        {"dns": ["192.0.2.1"]},
        {"volumes": ["/a:/b"]},
        {"cpu": 1},
        {"memory": 512},
        {"scratch_size": 100},
        {"kernel": "/vmlinux"},
    ],
)
def test_whatever_shapes_the_container_is_in_the_name(changes: dict[str, object]) -> None:
    assert warm.tag(structs.replace(SPEC, **changes), ASSETS) != warm.tag(SPEC, ASSETS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "two"},
        {"publish": ["8080:80"]},
        {"network": "none"},
        {"detach": True},
        {"remove": False},
        {"log_prefix": True},
        {"timings": True},
        {"image": structs.replace(IMAGE, reference="localhost/other", path="/elsewhere.img")},
    ],
)
def test_whatever_is_a_runs_own_is_not(changes: dict[str, object]) -> None:
    assert warm.tag(structs.replace(SPEC, **changes), ASSETS) == warm.tag(SPEC, ASSETS)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", ["kernel", "firecracker"])
@pytest.mark.parametrize("name", [boot_snapshot.tag, warm.tag])
def test_a_file_of_the_users_own_is_known_by_more_than_its_path(
    tmp_path: Path, own: str, name: Callable[[RunSpec, Assets], str]
) -> None:
    file = tmp_path / "own"
    spec = structs.replace(SPEC, kernel=str(file)) if own == "kernel" else SPEC
    assets = structs.replace(ASSETS, firecracker=file) if own == "firecracker" else ASSETS
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    first = name(spec, assets)
    assert name(spec, assets) == first
    file.write_bytes(b"two")  # built again in its place
    second = name(spec, assets)
    assert second != first
    built = tmp_path / "built"
    built.write_bytes(b"new")
    shutil.copystat(file, built)
    built.rename(file)
    assert name(spec, assets) not in (first, second)


def test_no_boot_snapshot_is_taken_of_a_kernel_that_was_replaced_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have the name of one of the two, and nobody knows which of them has booted."""
    taken: list[str] = []

    def take(layout: Layout, tag: str, *_: object) -> create.Timings:
        taken.append(tag)
        return create.Timings("Diff", 0, 0, 0, 0)

    monkeypatch.setattr(boot_snapshot.create, "take", take)
    layout, kernel = Layout(tmp_path), tmp_path / "vmlinux"
    kernel.write_bytes(b"one")
    spec = structs.replace(SPEC, kernel=str(kernel))
    name, start = boot_snapshot.tag(spec, ASSETS), boot_snapshot.choose(spec, ASSETS, layout)
    network, timings = SimpleNamespace(tap=None, mac=None), SimpleNamespace(mark=str)
    vm: Any = SimpleNamespace(spec=spec, layout=layout, network=network, firecracker=None, timings=timings)
    assert start.capture(vm)
    kernel.write_bytes(b"another")
    assert not start.capture(vm)
    assert taken == [name]


def test_a_kernel_is_found_where_the_hosts_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = structs.replace(SPEC, kernel="/vmlinux")
    monkeypatch.setenv("FCVM_HOST_ROOT", str(tmp_path))
    (tmp_path / "vmlinux").write_bytes(b"one")
    first = boot_snapshot.tag(spec, ASSETS)
    (tmp_path / "vmlinux").write_bytes(b"another")
    assert boot_snapshot.tag(spec, ASSETS) != first


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    made = Output(tmp_path / LOG, 200, show=False, prefix=False)
    yield made
    made.close()


def test_as_much_output_comes_again_as_the_guest_knows_to_have_been_taken(output: Output, tmp_path: Path) -> None:
    output.write("stdout", b"one\n")
    output.write("stderr", b"two\n")
    output.write("stdout", b"three\n")
    warm._keep(output, tmp_path / "kept")
    assert list(warm._written(tmp_path / "kept", 3)) == [
        ("stdout", b"one\n"),
        ("stderr", b"two\n"),
        ("stdout", b"three\n"),
    ]
    assert list(warm._written(tmp_path / "kept", 2)) == [("stdout", b"one\n"), ("stderr", b"two\n")]
    assert list(warm._written(tmp_path / "kept", 0)) == []
    assert list(warm._written(tmp_path / "kept", -1)) == []


def test_output_that_the_log_has_lost_does_not_come_again(output: Output, tmp_path: Path) -> None:
    for number in range(20):  # 200 bytes hold fewer than eight records of 23 bytes
        output.write("stdout", b"line %05d\n" % number)
    warm._keep(output, tmp_path / "kept")
    again = [data for _, data in warm._written(tmp_path / "kept", 19)]
    assert again[-1] == b"line 00018\n"
    assert 8 <= len(again) < 19


def test_first_run_takes_it_and_the_next_one_starts_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    cold = Boot(ASSETS)
    monkeypatch.setattr(boot_snapshot, "choose", lambda *_: cold)
    name = warm.tag(SPEC, ASSETS)
    assert warm.choose(structs.replace(SPEC, warm=False), ASSETS, layout) is cold
    assert warm.choose(SPEC, ASSETS, layout) == Boot(ASSETS, warm=name)

    manifest = Snapshot("x", tmp_path, None)  # type: ignore[arg-type]
    monkeypatch.setattr(store, "find", lambda layout, tag: manifest)
    monkeypatch.setattr(warm.restore, "find_disks", lambda snapshot, layout: {})
    start = warm.choose(SPEC, ASSETS, layout)
    assert isinstance(start, warm.Warm)
    assert start.source == name
    assert start.warm is None
    assert start.another() is cold


def test_damaged_one_is_removed_and_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path)
    monkeypatch.setattr(boot_snapshot, "choose", lambda *_: Boot(ASSETS))
    name = warm.tag(SPEC, ASSETS)
    (layout.snapshots / name).mkdir()
    (layout.snapshots / name / "config.json").write_text("{")
    assert warm.choose(SPEC, ASSETS, layout) == Boot(ASSETS, warm=name)
    assert not (layout.snapshots / name).exists()


@pytest.mark.parametrize("start", [Boot(ASSETS, warm="x"), boot_snapshot.BootAndCapture(ASSETS)])
def test_a_guest_that_does_not_start_is_started_once_more_under_emulation(start: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_snapshot.host, "emulated", lambda: True)
    second = start.another()
    assert type(second) is type(start)
    assert second.warm == start.warm
    assert second.another() is None
    monkeypatch.setattr(boot_snapshot.host, "emulated", lambda: False)
    assert start.another() is None


def test_a_boot_snapshot_that_is_gone_when_its_container_runs_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot_snapshot.host, "emulated", lambda: True)
    vm: Any = SimpleNamespace(layout=Layout(tmp_path))
    boot_snapshot.Restore(ASSETS, source="boot-gone").started(vm)
