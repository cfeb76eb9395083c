"""The record of each VM and the question whether it lives."""

import argparse
import errno
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fc_agent import structs
from fcvm import config
from fcvm.cli import ls
from fcvm.cli.context import Context
from fcvm.errors import ConflictError, NotFoundError, UsageError
from fcvm.storage.layout import Layout
from fcvm.vm import state


def record(name: str = "a", **changes: object) -> state.Record:
    values = {"id": state.new_id(), "name": name, "pid": os.getpid(), "status": "running", "health": "healthy",
              "image": "i", "created_at": time.time(), "cpu": 1, "memory_mib": 128}  # fmt: skip
    return state.Record(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def left(layout: Layout) -> list[str]:
    return sorted(str(p.relative_to(layout.base)) for p in layout.base.rglob("*") if (p.is_file() or p.is_symlink()) and p.name != ".register.lock")


def test_names_are_unique_until_the_vm_ends(layout: Layout) -> None:
    entry = state.register(layout, record("web"))
    with pytest.raises(ConflictError, match="web"):
        state.register(layout, record("web"))
    entry.close()
    state.register(layout, record("web")).close()
    assert left(layout) == []


def test_find_by_name_id_beginning_and_pid(layout: Layout) -> None:
    entry = state.register(layout, record("web"))
    vm_id = entry.record.id
    for found in (state.find(layout, name="web"), state.find(layout, name=vm_id), state.find(layout, name=vm_id[:5]),
                  state.find(layout, pid=os.getpid())):  # fmt: skip
        assert found.id == vm_id
    with pytest.raises(NotFoundError, match="other"):
        state.find(layout, name="other")
    entry.close()


def test_one_vm_of_many_is_found_and_entered_without_a_look_at_the_others(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [state.register(layout, record(f"web-{number}")) for number in range(20)]
    looks: list[str] = []
    read = state.read
    monkeypatch.setattr(state, "read", lambda layout, vm_id: looks.append(vm_id) or read(layout, vm_id))
    wanted = entries[7].record
    assert state.find(layout, name="web-7") == state.find(layout, name=wanted.id) == wanted
    assert looks == [wanted.id] * 2
    with pytest.raises(ConflictError):
        state.register(layout, record("web-7"))
    entries.append(state.register(layout, record("web-20")))
    assert looks == [wanted.id] * 3
    for entry in entries:
        entry.close()
    assert left(layout) == []


def test_the_name_of_one_may_be_the_id_of_another(layout: Layout) -> None:
    one = state.register(layout, record("web"))
    other = state.register(layout, record(one.record.id))
    with pytest.raises(UsageError, match="There are 2 VMs"):
        state.find(layout, name=one.record.id)
    other.close()
    assert state.find(layout, name=one.record.id) == one.record
    one.close()


def test_a_vm_that_an_older_fcvm_has_entered_is_found(layout: Layout) -> None:
    entry = state.register(layout, record("web"))
    (layout.state / "web.name").unlink()
    assert state.find(layout, name="web") == entry.record
    entry.close()


@pytest.mark.parametrize("name", ["../web", "web/", "x" * 300, "."])
def test_what_is_no_name_names_nothing(layout: Layout, name: str) -> None:
    with pytest.raises(NotFoundError):
        state.find(layout, name=name)


def test_a_name_that_was_left_without_a_record_is_free_and_swept(layout: Layout) -> None:
    for name in ("web", "other"):
        (layout.state / f"{name}.name").symlink_to("0123456789ab")
    entry = state.register(layout, record("web"))
    assert state.sweep(layout) == []
    assert state.find(layout, name="web") == entry.record
    entry.close()
    assert left(layout) == []


def test_a_pid_of_several_clones_names_none_of_them(layout: Layout) -> None:
    entries = [state.register(layout, record(f"web-{number}", created_at=float(number))) for number in range(3)]
    with pytest.raises(UsageError, match=r"There are 3 VMs with pid .*: web-0, web-1, web-2") as caught:
        state.find(layout, pid=os.getpid())
    assert caught.value.hint == "give the name of one"
    for entry in entries:
        entry.close()


def test_a_kept_vm_stays_and_is_not_alive(layout: Layout) -> None:
    entry = state.register(layout, record("web", keep=True))
    entry.update(status="exited", exit_code=3)
    entry.close()
    assert state.sweep(layout) == []
    assert state.find(layout, name="web", alive=False).exit_code == 3
    with pytest.raises(NotFoundError, match="not running"):
        state.find(layout, name="web")
    with pytest.raises(ConflictError, match="kept"):
        state.register(layout, record("web"))


HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {src!r})
from fcvm.storage.layout import Layout
from fcvm.vm import state
layout = Layout(Path({base!r}))
state.register(layout, state.Record(id="0123456789ab", name="crash", pid=1, status="running", health="healthy", image="i",
               created_at=0.0, cpu=1, memory_mib=128))
(layout.vms / "0123456789ab").mkdir()
(layout.vms / "0123456789ab" / "scratch.img").write_text("x")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("swept", [True, False])
def test_a_killed_supervisor_is_seen_at_once_and_swept(layout: Layout, swept: bool) -> None:
    src = str(Path(__file__).parents[2] / "src")
    code = HOLDER.format(src=src, base=str(layout.base))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert state.is_alive(layout, "0123456789ab")
        assert state.sweep(layout) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not state.is_alive(layout, "0123456789ab")
    state.register(layout, record("other")).close()
    assert [found.name for found in state.records(layout)] == ["crash"]
    if swept:
        assert state.sweep(layout) == ["crash"]
    else:  # somebody wants its name before anybody has swept
        state.register(layout, record("crash")).close()
    assert left(layout) == []
    assert list(layout.vms.iterdir()) == []


def test_a_firecracker_whose_owner_died_too_early_is_swept_and_nobody_else(layout: Layout) -> None:
    directory = layout.vms / "0123456789ab"
    directory.mkdir()
    sleep = ["sh", "-c", "echo; read line", "firecracker"]
    with (
        subprocess.Popen([*sleep, "--api-sock", "a.sock"], cwd=directory, stdin=-1, stdout=-1) as stray,
        subprocess.Popen(sleep, cwd=directory, stdin=-1, stdout=-1) as shell,
    ):
        for process in (stray, shell):
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"  # it has become what it is called
        state.sweep(layout)
        assert stray.wait() == -signal.SIGKILL
        assert shell.poll() is None
        shell.kill()


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "x" * 64, "ä", ".."])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError):
        state.check_name(name)


@pytest.mark.parametrize("content", ['{"schema": 99}', "{", "[]", "null", '"text"', '{"schema": 1, "created_at": "then"}'])
def test_a_record_of_another_schema_or_torn_is_ignored(layout: Layout, content: str) -> None:
    entry = state.register(layout, record("web"))
    (layout.state / "x.json").write_text(content)
    assert [found.name for found in state.records(layout)] == ["web"]
    entry.close()


def test_a_dead_vm_seems_dead_to_all_who_look_at_once(layout: Layout) -> None:
    (layout.state / "dead.lock").touch()
    with open(layout.state / "dead.lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as is_alive does, in another process
        assert not state.is_alive(layout, "dead")


def test_a_full_disk_costs_the_record_and_not_the_vm(layout: Layout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    entry = state.register(layout, record("web"))
    with monkeypatch.context() as patch:
        patch.setattr(state, "write", full)
        entry.update(health="unhealthy")
    assert "record of web cannot be written: No space left" in capsys.readouterr().err
    entry.update(status="stopping")
    assert [(r.status, r.health) for r in state.records(layout)] == [("stopping", "unhealthy")]
    entry.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's identity")
def test_what_may_not_be_written_to_can_be_looked_at(layout: Layout) -> None:
    state.write(layout, record("crashed"))
    layout.vms.mkdir(exist_ok=True)
    for path in (layout.base, *layout.base.parents[:2]):
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        assert state.sweep(layout) == []
        assert [found.name for found in state.records(layout)] == ["crashed"]
    finally:
        os.seteuid(0)
    assert state.sweep(layout) == ["crashed"]


def test_a_pool_whose_server_was_killed_is_swept(layout: Layout) -> None:
    for name in (".pool-1", ".pool-2", ".floor"):
        (layout.vms / name / "clone").mkdir(parents=True)
    lock = state.hold(layout.vms / ".pool-2")
    assert state.sweep(layout) == []
    assert sorted(path.name for path in layout.vms.iterdir()) == [".floor", ".pool-2"]
    os.close(lock)
    state.sweep(layout)
    assert sorted(path.name for path in layout.vms.iterdir()) == [".floor"]


@pytest.mark.parametrize("also", [{"schema": 2}, {"from_the_future": 1}, {"schema": 2, "status": {"is": "exited"}}])
def test_a_kept_vm_of_a_newer_version_is_not_swept(layout: Layout, also: dict[str, object]) -> None:
    entry = state.register(layout, record("kept", status="exited", keep=True))
    entry.close()
    vm_id = entry.record.id
    (layout.vms / vm_id).mkdir()
    path = layout.state / f"{vm_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **also}))
    state.sweep(layout)
    assert (layout.vms / vm_id).exists()
    assert [found.name for found in state.records(layout)] == ([] if "schema" in also else ["kept"])


def test_a_vm_that_cannot_be_entered_leaves_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(state, "write", refuse)
    with pytest.raises(OSError, match="No space"):
        state.register(layout, record())
    assert left(layout) == []
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("also", [{"id": "VICTIM"}, {"id": "ffffffffffff"}, {"created_at": 1e300}, {"created_at": -1e18}])
def test_a_damaged_record_names_no_other_vm_and_no_other_time(tmp_path: Path, also: dict[str, object]) -> None:
    """Its id names what is removed."""
    victim = tmp_path / "victim"
    victim.mkdir()
    layout = Layout(tmp_path / "data")
    entry = state.register(layout, record("x", status="running"))
    vm_id = entry.record.id
    path = layout.state / f"{vm_id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **also}).replace("VICTIM", str(victim)))
    assert list(state.records(layout)) == []
    os.close(entry.lock)  # it has crashed
    state.sweep(layout)
    assert victim.exists()
    assert left(layout) == []


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The way to everything in ``value``."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def test_whatever_a_damaged_record_holds_the_others_are_listed(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    port = {"host_ip": "127.0.0.1", "host_port": 8080, "guest_port": 80, "protocol": "tcp", "loopback_only": False}
    network = {"mode": "bridged", "host_ip": "10.0.0.1", "ports": [port], "dns": ["1.1.1.1"]}
    full = record("damaged", status="exited", keep=True, exit_code=0, network=network, labels={"a": "b"},
                  volumes=[{"host": "/srv", "guest": "/data", "read_only": True}])  # fmt: skip
    sound = record("sound", status="exited", keep=True)
    for entry in (full, sound):
        state.write(layout, entry)
    for path in places(structs.asdict(full)):
        for strange in (None, True, -1, 1 << 70, 0.5, "", "x", [], [[]], [None], ["x"], [5], {}, {"x": 5}, {"guest": 5}):
            values = json.loads(json.dumps(structs.asdict(full)))
            *parents, last = path
            functools.reduce(lambda value, key: value[key], parents, values)[last] = strange
            (layout.state / f"{full.id}.json").write_text(json.dumps(values))
            for as_json in (False, True):
                assert ls.run(argparse.Namespace(all=True, pid=None, json=as_json), Context(config.load({"base_dir": str(layout.base)}))) == 0, values
                assert "sound" in capsys.readouterr().out
