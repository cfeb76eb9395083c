"""What a machine says about itself, who may start it, and paths of the host."""

import errno
import fcntl
import json
import os
import socket
import threading
from pathlib import Path

import pytest

from fcvm import config as settings
from fcvm import hostpath
from fcvm.errors import HostError, MachineError, UsageError
from fcvm.machine import keeper, state
from fcvm.machine.keeper import Job, Keeper
from fcvm.machine.machine import Machine, boot_key, memory
from fcvm.machine.state import Places, State
from fcvm.network.ports import reserve
from fcvm.network.publish import Publish
from fcvm.setup.assets import Assets
from fcvm.storage.layout import Layout


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    monkeypatch.setattr(settings, "default_runtime_dir", lambda: tmp_path / "run")
    places = Places.of(tmp_path / "base")
    places.make()
    return places


def hold(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_never_started(places: Places) -> None:
    assert state.read(places) == State("stopped")
    assert not state.alive(places)


def test_running_while_its_keeper_holds_the_lock(places: Places) -> None:
    state.write(places, State("running", pid=123, qemu_pid=124, cpus=2))
    fd = hold(places.lock)
    assert state.alive(places)
    assert state.read(places) == State("running", pid=123, qemu_pid=124, cpus=2)
    os.close(fd)
    assert not state.alive(places)
    assert state.read(places).phase == "stopped"
    assert state.read(places).pid == 0, "a number that may be another process's by now"


def test_broken_says_why_after_the_end(places: Places) -> None:
    state.write(places, State("broken", pid=5, error="No disk.", hint="fcvm machine rm"))
    now = state.read(places)
    assert (now.phase, now.error, now.hint, now.pid) == ("broken", "No disk.", "fcvm machine rm", 0)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"phase": "running", "new": 1}'])
def test_a_state_of_another_version_or_none_is_stopped(places: Places, text: str) -> None:
    places.state.write_text(text)
    assert state.read(places).phase == "stopped"


def test_directories_are_for_their_owner(places: Places) -> None:
    for directory in (places.directory, places.runtime):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
def test_sockets_in_a_foreign_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "default_runtime_dir", lambda: tmp_path / "run")
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 12345, 12345)
    with pytest.raises(HostError, match="somebody else"):
        Places.of(tmp_path / "base").make()


def test_each_data_directory_has_its_own_machine(tmp_path: Path) -> None:
    assert Places.of(tmp_path / "a").runtime != Places.of(tmp_path / "b").runtime
    assert Places.of(tmp_path / "a").runtime == Places.of(tmp_path / "b/../a").runtime


def test_stop_of_what_does_not_run(tmp_path: Path) -> None:
    config = settings.load({"base_dir": str(tmp_path)}, env={})
    assert Machine(config, Layout(tmp_path)).stop() is False


def test_remove_of_what_never_was(tmp_path: Path) -> None:
    config = settings.load({"base_dir": str(tmp_path)}, env={})
    Machine(config, Layout(tmp_path)).remove()
    assert list(tmp_path.iterdir()) == []


def test_memory_leaves_some_to_the_host() -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    assert memory(settings.load({"machine_mem": "100t"}, env={})) < host
    if host > 4096:
        assert memory(settings.load({"machine_mem": "2g"}, env={})) == 2048


def test_boot_key_changes_with_what_it_is_started_from() -> None:
    paths = dict.fromkeys(("vmlinux", "vmlinuz", "root_image", "initrd", "machine_initrd", "tools", "firecracker"), Path("/x"))
    assets = Assets(**paths, kernel_version="6", firecracker_version="1")  # type: ignore[arg-type]
    other = Assets(**{**paths, "root_image": Path("/y")}, kernel_version="6", firecracker_version="1")  # type: ignore[arg-type]
    config = settings.load({"machine_mem": "1g", "machine_cpus": "1"}, env={})
    assert boot_key(config, assets) == boot_key(config, assets)
    assert boot_key(config, assets) != boot_key(config, other)
    assert boot_key(config, assets) != boot_key(settings.load({"machine_mem": "1g", "machine_cpus": "2"}, env={}), assets)


def test_job_survives_json() -> None:
    job = Job(Path("/b"), 2, 1024, 2048, Path("/k"), Path("/i"), Path("/r"), "quiet", "key", 3, 4)
    assert Job.from_json(job.to_json()) == job


def test_disk_is_sparse_and_only_grows(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    keeper.make_disk(disk, 64)
    assert (disk.stat().st_size, disk.stat().st_blocks) == (64 << 20, 0)
    disk.write_bytes(b"data")
    keeper.make_disk(disk, 64)
    assert disk.read_bytes()[:4] == b"data"
    assert disk.stat().st_size == 64 << 20
    keeper.make_disk(disk, 32)
    assert disk.stat().st_size == 64 << 20
    assert list(tmp_path.iterdir()) == [disk]


def test_disk_where_none_can_be(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be made"):
        keeper.make_disk(tmp_path / "nowhere/disk.img", 1)


def test_paths_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FCVM_HOST_ROOT", raising=False)
    assert hostpath.resolve("/a/b") == Path("/a/b")
    assert hostpath.original("/a/b") == Path("/a/b")
    monkeypatch.setenv("FCVM_HOST_ROOT", "/host")
    assert hostpath.resolve("/a/b") == Path("/host/a/b")
    assert hostpath.resolve(Path("/")) == Path("/host")
    assert hostpath.resolve("a/b") == Path("a/b"), "relative paths are made absolute where the user is"
    assert hostpath.original("/host/a/b") == Path("/a/b")
    assert hostpath.original("/mnt/a") == Path("/mnt/a")


def test_unknown_setting_for_the_machine() -> None:
    with pytest.raises(UsageError):
        settings.load({"machine_mem": "lots"}, env={})


def test_the_logs_of_the_run_before_are_kept(places: Places) -> None:
    for run in ("first", "second", "third"):
        places.console.write_text(run)
        places.keep_previous()
    assert not places.console.exists()
    assert state.previous(places.console).read_text() == "third"


def test_a_look_at_the_lock_does_not_keep_a_keeper_from_it(places: Places) -> None:
    look = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(look, fcntl.LOCK_SH)  # as state.alive() does, for a moment
    threading.Timer(0.2, os.close, (look,)).start()
    lock = keeper.own(places)
    assert state.alive(places)
    os.close(lock)


def test_a_second_keeper_gives_up(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LOCK_TIME", 0.1)
    fd = hold(places.lock)
    with pytest.raises(BlockingIOError):
        keeper.own(places)
    os.close(fd)


@pytest.fixture
def kept(places: Places) -> Keeper:
    return Keeper(Job(places.base, 1, 1024, 1024, Path("/k"), Path("/i"), Path("/r"), "", "key", -1, -1), places)


def test_a_full_disk_does_not_keep_the_machine_from_a_proper_end(kept: Keeper, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def stopped(_: object) -> None:
        monkeypatch.setattr(state, "write", full)
        monkeypatch.setattr(keeper, "print", full, raising=False)
        raise keeper.Stop

    shut_down: list[bool] = []
    monkeypatch.setattr(kept, "_start", stopped)
    monkeypatch.setattr(kept, "_shut_down", lambda: shut_down.append(True))
    assert kept.run() == 0
    assert shut_down == [True]


class NoPorts:
    """QEMU does not answer."""

    def publish(self, number: int, wanted: Publish) -> int:
        (reservation,) = reserve([wanted])
        reservation.close()
        raise MachineError("QEMU does not answer.")

    def withdraw(self, number: int) -> None:
        raise MachineError("QEMU does not answer.")


@pytest.mark.parametrize(
    "request_",
    [
        {"type": "publish", "protocol": "tcp", "host_ip": "127.0.0.1", "host_port": 70000, "port": 1},
        {"type": "publish", "protocol": "sctp", "host_ip": "127.0.0.1", "host_port": 0, "port": 1},
        {"type": "publish", "protocol": "tcp", "host_ip": "a\0b", "host_port": 0, "port": 1},
        {"type": "publish", "protocol": "tcp", "host_ip": "127.0.0.1", "host_port": 0},
        {"type": "publish", "protocol": "tcp", "host_ip": "127.0.0.1", "host_port": 0, "port": 1},
    ],
)
def test_what_cannot_be_published_is_answered_and_the_machine_goes_on(kept: Keeper, request_: dict[str, object]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kept._control, kept._ports = ours, NoPorts()  # type: ignore[assignment]
        kept._on_message({"id": 7, **request_})
        answer = json.loads(theirs.recv(4096))
        assert answer["id"] == 7
        assert answer["error"]
        kept._on_message({"type": "unpublish", "id": 7})


def test_a_machine_is_not_removed_while_it_is_being_started(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    places.disk.touch()
    machine = Machine(settings.load({"base_dir": str(places.base)}, env={}), Layout(places.base))
    starting = hold(places.starting)
    thread = threading.Thread(target=machine.remove, daemon=True)
    thread.start()
    thread.join(0.3)
    assert places.disk.exists()
    os.close(starting)
    thread.join(20)
    assert not places.directory.exists()


def test_a_bug_of_the_keepers_is_the_reason_that_commands_see(
    kept: Keeper, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: object) -> None:
        raise KeyError("uptime")

    monkeypatch.setattr(kept, "_start", wrong)
    assert kept.run() == 1
    assert "KeyError('uptime')" in state.read(places).error
