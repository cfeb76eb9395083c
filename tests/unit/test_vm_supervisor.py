"""A VM's supervisor without a VM: what happens when it cannot even start."""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fc_agent.structs import replace
from fcvm import config as settings
from fcvm.cli import stop
from fcvm.cli.context import Context
from fcvm.errors import AgentError, ConflictError, FcvmError, NotFoundError, SnapshotError
from fcvm.firecracker.process import Console
from fcvm.linux import sockets
from fcvm.storage.layout import Layout
from fcvm.vm import background, messages, post_mortem, requests, rpc, run, state, supervisor
from fcvm.vm.spec import ImageUse, RunSpec
from fcvm.vm.start import Boot
from fcvm.vm.supervisor import Supervisor


@pytest.fixture
def refused(tmp_path: Path) -> Supervisor:
    """A supervisor whose VM's name is taken."""
    layout = Layout(tmp_path)
    spec = RunSpec(name="taken", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    record = state.Record(
        id=state.new_id(), name=spec.name, pid=os.getpid(), status="running", health="healthy", image="image",
        created_at=0, cpu=1, memory_mib=128, keep=True,
    )  # fmt: skip
    state.register(layout, record)
    return Supervisor(spec, settings.load({"base_dir": str(tmp_path)}), Boot(None))  # type: ignore[arg-type]


def test_streams_of_a_vm_that_never_started_end_quietly(refused: Supervisor) -> None:
    with pytest.raises(ConflictError):
        refused.run()
    refused.carry_streams()
    refused.ask({"op": "stop"})


def test_streams_may_wait_for_a_vm_that_does_not_start(refused: Supervisor) -> None:
    thread = threading.Thread(target=refused.carry_streams)
    thread.start()
    with pytest.raises(ConflictError):
        refused.run()
    thread.join(30)
    assert not thread.is_alive()


def test_a_vm_whose_streams_break_ends_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its container would wait for ever to be read."""
    spec = RunSpec(name="mute", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    vm = Supervisor(spec, settings.load({"base_dir": str(tmp_path)}), Boot(None))  # type: ignore[arg-type]
    monkeypatch.setattr(supervisor, "STREAMS_MARGIN", 0.05)
    with contextlib.ExitStack() as stack:
        quiet = [stack.enter_context(socket.socket()) for _ in range(3)]  # nobody writes to these
        for one in quiet:
            one.listen()
        vm.firecracker = SimpleNamespace(  # type: ignore[assignment]
            pidfd=quiet[0].fileno(), console=SimpleNamespace(quote=lambda: " (console)")
        )
        vm.control, vm.requests, vm.network = quiet[1], quiet[2], SimpleNamespace(watch=[])  # type: ignore[assignment]
        vm.output = SimpleNamespace(write=None, closed=False, end_lines=lambda: None)  # type: ignore[assignment]
        vm.phase = "running"
        vm.attachable.set()
        vm.carry_streams()  # there is no vsock device
        with pytest.raises(AgentError, match=r"cannot be read any more: .*No such file.* \(console\)"):
            vm._loop()


@pytest.mark.parametrize("phase", ["starting", "warming", "captured"])
def test_a_stop_before_there_is_a_container_ends_the_vm(phase: str, tmp_path: Path) -> None:
    """Its agent would keep the wish for its container, in the boot snapshot that is about to be taken as well."""
    spec = RunSpec(name="early", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    captured: list[object] = []
    start = SimpleNamespace(capture=captured.append)
    vm = Supervisor(spec, settings.load({"base_dir": str(tmp_path)}), start)  # type: ignore[arg-type]
    killed: list[bool] = []
    vm.firecracker = SimpleNamespace(process=SimpleNamespace(kill=lambda: killed.append(True)))  # type: ignore[assignment]
    vm.phase = phase
    requests.carry_out(vm, {"op": "stop"})
    messages.deal(vm, {"type": "warmed"})  # it was on its way
    assert killed
    assert not captured


@pytest.mark.parametrize("request_", [b"[]", b"x", b"", b'{"op": "stop", "timeout": "soon"}', b"[" * 100_000, b'{"op": 1}'])
def test_a_malformed_request_does_not_end_a_vm(request_: bytes, tmp_path: Path) -> None:
    spec = RunSpec(name="calm", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    vm = Supervisor(spec, settings.load({"base_dir": str(tmp_path)}), Boot(None))  # type: ignore[arg-type]
    theirs, ours = socket.socketpair()
    vm.requests = SimpleNamespace(accept=lambda: (ours, None))  # type: ignore[assignment]
    with theirs:
        theirs.sendall(request_ + b"\n")
        requests.serve(vm)
        assert "error" in json.loads(theirs.makefile().readline())


def test_a_supervisor_that_ends_while_it_is_asked_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(socket.socket):
        def sendall(self, *_: object) -> None:  # type: ignore[override]
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(rpc.sockets, "connect", lambda *_, **__: Gone())
    assert rpc.call(tmp_path, {"op": "stop"}) is None


def test_a_stop_of_a_vm_that_is_ending_waits_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network and its files go when it does not listen any more, and its name last."""
    config = settings.load({"base_dir": str(tmp_path)})
    spec = RunSpec(name="web", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    vm = Supervisor(spec, config, Boot(None))  # type: ignore[arg-type]
    ending, returned, early = threading.Event(), threading.Event(), []

    def end() -> None:
        ending.set()
        early.append(returned.wait(0.5))

    def acquire(stack: contextlib.ExitStack) -> None:
        record = state.Record(vm.id, "web", os.getpid(), "running", "healthy", "image", 0.0, 1, 128)
        stack.enter_context(contextlib.closing(state.register(vm.layout, record)))
        vm.directory.mkdir()
        stack.callback(end)
        stack.enter_context(sockets.listen(vm.directory / rpc.SOCKET))
        vm.exit = {"code": 0}

    monkeypatch.setattr(vm, "_acquire", acquire)
    monkeypatch.setattr(vm, "_loop", lambda: None)
    running = threading.Thread(target=vm.run)
    running.start()
    assert ending.wait(60)
    args = argparse.Namespace(all=False, timeout=None, words=[], name="web", pid=None)
    assert stop.run(args, Context(config)) == 0
    returned.set()
    running.join()
    assert early == [False]


def test_a_stop_of_a_vm_that_begins_waits_until_it_can_be_asked(tmp_path: Path) -> None:
    """It has its name before it listens; a stop that came in between was lost, and `fcvm stop` waited for the VM's own end."""
    config = settings.load({"base_dir": str(tmp_path)})
    layout = Layout(tmp_path)
    (layout.vms / "1").mkdir()
    entry = state.register(layout, state.Record("1", "web", os.getpid(), "starting", "starting", "image", 0.0, 1, 128))
    args = argparse.Namespace(all=False, timeout=None, words=[], name="web", pid=None)
    stopping = threading.Thread(target=stop.run, args=(args, Context(config)), daemon=True)
    stopping.start()
    time.sleep(0.3)
    with sockets.listen(layout.vms / "1" / rpc.SOCKET) as listener:
        listener.settimeout(60)
        connection, _ = listener.accept()
        assert rpc.receive(connection)["op"] == "stop"
        rpc.answer(connection, {"ok": True})
    entry.close()
    stopping.join(60)
    assert not stopping.is_alive()


@pytest.mark.parametrize(
    ("code", "console", "said"),
    [
        (-9, "Out of memory: Killed process 7 (stress)\n", "Firecracker was killed by signal 9"),  # that was long before
        (0, "Out of memory: Killed process 7 (stress)\n", r"ran out of memory \(1024 MiB\)"),
        (0, "[1.0] Kernel panic - not syncing: sysrq triggered crash\n", "panicked: not syncing: sysrq triggered crash"),
        (0, "Out of memory: Killed process 7 (stress)\n[9.0] Kernel panic - not syncing: Fatal exception\n", "panicked: not syncing: Fatal"),
        (0, "[9.0] Kernel panic - not syncing: System is deadlocked on memory\n", "ran out of memory"),
        (0, "[9.0] Kernel panic - not syncing: Out of memory: system-wide panic_on_oom is enabled\n", "ran out of memory"),
        (148, "", "Firecracker exited with code 148"),
    ],
)
def test_why_a_vm_died(code: int, console: str, said: str, tmp_path: Path) -> None:
    seen = Console(tmp_path / "console.log")
    seen.file.close()
    seen.tail = console.encode()
    spec = RunSpec(name="dead", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    error = post_mortem.why(SimpleNamespace(console=seen, process=SimpleNamespace(returncode=code)), spec)  # type: ignore[arg-type]
    assert re.search(said, error.message)
    assert all(line in error.message for line in console.splitlines())


def test_the_background_tells_what_has_failed() -> None:
    def refuse(_ready: object) -> int:
        raise ConflictError("It is taken.", hint="take another", exit_code=125)

    with pytest.raises(FcvmError) as caught:
        background.detached("The work", refuse, hint="look")
    assert (caught.value.message, caught.value.hint) == ("It is taken.", "take another")


def test_the_background_tells_of_a_bug() -> None:
    with pytest.raises(FcvmError, match="ZeroDivisionError"):
        background.detached("The work", lambda _ready: 1 // 0, hint="look")


def test_the_background_tells_of_a_full_disk() -> None:
    def fill(_ready: object) -> int:
        raise OSError(28, "No space left on device", "/data/state")

    with pytest.raises(FcvmError, match=r"^/data/state: No space left on device\.$") as caught:
        background.detached("The work", fill, hint="look")
    assert caught.value.hint == "df -h"


def test_the_background_tells_of_what_the_system_refuses() -> None:
    def refuse(_ready: object) -> int:
        raise OSError(1, "Operation not permitted")

    with pytest.raises(FcvmError, match=r"^Operation not permitted\.$") as caught:
        background.detached("The work", refuse, hint="look")
    assert caught.value.hint == "look"


def test_the_background_tells_of_its_death() -> None:
    with pytest.raises(FcvmError, match="The work died") as caught:
        background.detached("The work", lambda _ready: os._exit(3), hint="look")
    assert caught.value.hint == "look"


def test_a_caller_that_is_late_to_listen_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a reader that begins to wait raises O_ASYNC's signal at the writer: Linux 6.12 does, 6.18 does not."""
    passing_on = background._passing_on
    begun, listening = os.pipe(), os.pipe()

    @contextlib.contextmanager
    def late(child: int) -> Iterator[list[int]]:
        with passing_on(child) as signals:
            os.read(begun[0], 1)
            threading.Timer(0.5, os.write, (listening[1], b"x")).start()
            yield signals

    def work(ready: Callable[[], None]) -> int:
        os.write(begun[1], b"x")
        os.read(listening[0], 1)
        ready()
        return 7

    monkeypatch.setattr(background, "_passing_on", late)
    child = background.detached("The work", work, hint="look")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for fd in (*begun, *listening):
        os.close(fd)


def test_work_in_the_background_goes_on_once_it_is_ready() -> None:
    done, tell = os.pipe()
    go, let = os.pipe()

    def work(ready: object) -> int:
        ready()  # type: ignore[operator]
        os.read(go, 1)
        os.write(tell, b"x")
        return 7

    child = background.detached("The work", work, hint="look")
    os.write(let, b"x")
    assert os.read(done, 1) == b"x"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for fd in (done, tell, go, let):
        os.close(fd)


WAITING = """
import os, signal, sys
from pathlib import Path
from fcvm.vm import background

def work(ready):
    asked, ask = os.pipe()
    for number in background.STOPPING:
        signal.signal(number, lambda *_: os.write(ask, b"x"))
    os.write(TELL, b"x")
    os.read(asked, 1)
    Path(sys.argv[1]).touch()
    return 137

background.detached("The work", work, hint="look")
"""


@contextlib.contextmanager
def detaching(ended: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits for work in the background, which has begun; asked to end it makes the file ``ended``."""
    begun, tell = os.pipe()
    program = WAITING.replace("TELL", str(tell))
    with subprocess.Popen([sys.executable, "-c", program, str(ended)], pass_fds=(tell,)) as process:
        os.close(tell)
        assert os.read(begun, 1) == b"x"
        yield process
    os.close(begun)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_background_starts_ends_it(number: int, tmp_path: Path) -> None:
    with detaching(tmp_path / "ended") as process:
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert (tmp_path / "ended").exists()


def test_a_background_whose_caller_is_killed_while_it_starts_ends(tmp_path: Path) -> None:
    with detaching(tmp_path / "ended") as process:
        process.kill()
        deadline = time.monotonic() + 60
        while not (tmp_path / "ended").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def vm(tmp_path: Path) -> Supervisor:
    """A supervisor whose VM is only made believe to run."""
    spec = RunSpec(name="quiet", image=ImageUse("image", "sha256:1", "sha256:2", "/image"))
    made = Supervisor(spec, settings.load({"base_dir": str(tmp_path)}), Boot(None, warm="warm-1"))  # type: ignore[arg-type]
    record = state.Record(
        id=made.id, name=spec.name, pid=os.getpid(), status="running", health="starting", image="image",
        created_at=0, cpu=1, memory_mib=128,
    )  # fmt: skip
    made.entry = state.register(made.layout, record)
    made.phase = "running"
    return made


def test_a_warm_start_is_not_taken_in_the_middle_of_another_snapshot(
    vm: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a snapshot waits for the guest to stand still the agent is heard, and it may say that the container is healthy."""
    taken: list[str | None] = []
    monkeypatch.setattr(requests.warm, "capture", lambda _vm, name: taken.append(name))
    messages.deal(vm, {"type": "health", "status": "healthy"})
    assert taken == []
    vm._on_ask()
    messages.deal(vm, {"type": "health", "status": "healthy"})
    assert not vm._asks, "it is taken once"
    assert taken == ["warm-1"]


@pytest.mark.parametrize("status", ["\ud800", "\033[2J", "x" * 1000, None, ["healthy"], {}])
def test_a_health_that_is_none_is_not_shown(vm: Supervisor, status: object) -> None:
    """A guest could make `fcvm ls` fail for all VMs by text that no terminal can be given."""
    messages.deal(vm, {"type": "health", "status": status})
    assert vm.entry.record.health == "starting"


def test_a_guest_that_tells_of_stages_for_ever_is_not_listened_to_for_ever(vm: Supervisor) -> None:
    for number in range(1000):
        messages.deal(vm, {"type": "stage", "name": "x" * number, "uptime": 1.0})
    assert sum(len(name) for name, _ in vm.timings.guest_marks) < 10_000


def test_signals_that_end_nothing_are_passed_on_to_the_container(vm: Supervisor) -> None:
    sent: list[dict[str, object]] = []
    vm.control = SimpleNamespace(send=sent.append)  # type: ignore[assignment]
    for phase in ("planned", "running"):  # there is no container yet; there is
        vm.phase = phase
        run.Signals(vm).handle(signal.SIGUSR1, None)
        for request in vm._asks:
            requests.carry_out(vm, request)
        vm._asks.clear()
    assert sent == [{"type": "kill", "signal": signal.SIGUSR1}]


@pytest.mark.parametrize(
    "request_", [{"op": "snapshot"}, {"op": "snapshot", "tag": None}, {"op": "stop", "timeout": 1e400}]
)
def test_a_request_of_another_fcvm_does_not_end_a_vm(vm: Supervisor, request_: dict[str, object]) -> None:
    theirs, ours = socket.socketpair()
    vm.requests = SimpleNamespace(accept=lambda: (ours, None))  # type: ignore[assignment]
    vm.phase = "starting" if request_["op"] == "snapshot" else "running"
    with theirs:
        theirs.sendall(json.dumps(request_).encode() + b"\n")
        requests.serve(vm)
        assert "error" in json.loads(theirs.makefile().readline())


def test_a_vm_lives_on_when_a_request_cannot_be_accepted(vm: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> object:
        raise OSError(24, "Too many open files")

    vm.requests = SimpleNamespace(accept=refuse)  # type: ignore[assignment]
    requests.serve(vm)
    assert "Too many open files" in capsys.readouterr().err


def test_a_killed_vm_does_not_wait_for_ever_for_its_reader(vm: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STREAMS_MARGIN", 0.05)
    vm.killing = True
    with contextlib.ExitStack() as stack:
        ended, quiet = stack.enter_context(open(os.devnull)), [stack.enter_context(socket.socket()) for _ in range(2)]
        vm._selector = stack.enter_context(contextlib.closing(supervisor.selectors.SelectSelector()))  # takes files
        vm.firecracker = SimpleNamespace(pidfd=ended)  # type: ignore[assignment]
        vm.control, vm.requests, vm.network = quiet[0], quiet[1], SimpleNamespace(watch=[])  # type: ignore[assignment]
        for one in quiet:
            one.listen()
        vm._loop()
    assert vm.exit == {"code": 137}


def test_the_loop_asks_the_clock_when_that_is_due(vm: Supervisor) -> None:
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any]) -> None:
        sent.append(message)
        vm.exit, vm._streams_ended = {"code": 0}, True

    with contextlib.ExitStack() as stack:
        quiet = [stack.enter_context(sockets.listen(vm.layout.base / str(number))) for number in range(3)]
        vm.firecracker = SimpleNamespace(pidfd=quiet[0])  # type: ignore[assignment]
        vm.control, vm.requests, vm.network = quiet[1], quiet[2], SimpleNamespace(watch=[])  # type: ignore[assignment]
        vm.clock = supervisor.Clock(send, time.time_ns)
        vm.clock.due = time.monotonic() + 0.05
        vm._loop()
    assert [message["type"] for message in sent] == ["clock"]


@pytest.mark.parametrize(
    ("exit", "line"),
    [
        ({"code": 137}, "fcvm: The VM was killed before its container had ended.\n"),
        ({"type": "exit", "code": 137, "oom": False}, ""),  # by its own stop timeout
        ({"code": 1, "message": "The VM's disk is full."}, "fcvm: The VM's disk is full.\n"),
    ],
)
def test_the_console_of_a_kept_vm_ends_with_why_it_ended(vm: Supervisor, exit: dict[str, Any], line: str) -> None:
    vm.spec = replace(vm.spec, remove=False)
    vm.directory.mkdir()
    (vm.directory / "console.log").write_text("[1.0] Linux\n")
    vm.killing, vm.exit = True, exit
    vm._leave()
    assert (vm.directory / "console.log").read_text() == f"[1.0] Linux\n{line}"
    assert (vm.entry.record.status, vm.entry.record.exit_code) == ("exited", exit["code"])


class Carried:
    """As much of a supervisor as ``run.drive`` needs: its life ends when it is killed."""

    def __init__(self, carry: Callable[[], None], *, last: Callable[[], None] = lambda: None) -> None:
        self.asked: list[str] = []
        self.killed = threading.Event()
        self.carry = carry
        self.last = last

    def run(self) -> int:
        self.killed.wait(60)
        self.last()
        return 137

    def ask(self, request: dict[str, str]) -> None:
        self.asked.append(request["op"])
        if request["op"] == "kill":
            self.killed.set()

    def carry_streams(self, **_: object) -> None:
        self.carry()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_leaves_a_write_that_blocks() -> None:
    def carry() -> None:
        for _ in range(2):
            terminate()
        time.sleep(60)
        pytest.fail("it was not left")

    vm = Carried(carry)
    assert run.drive(vm) == 137  # type: ignore[arg-type]
    assert vm.asked == ["stop", "kill"]


def test_further_signals_do_not_disturb_the_end() -> None:
    def hammer() -> None:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            terminate()

    vm = Carried(lambda: [terminate() for _ in range(3)] and None, last=hammer)
    assert run.drive(vm) == 137  # type: ignore[arg-type]
    assert vm.asked[:2] == ["stop", "kill"]


def test_a_vm_does_not_live_on_when_its_streams_are_carried_wrongly() -> None:
    vm = Carried(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        run.drive(vm)  # type: ignore[arg-type]
    assert vm.asked == ["kill"]


def test_output_of_a_warm_start_that_is_gone_breaks_the_streams_and_no_more(vm: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotFoundError("There is no snapshot.")

    vm.output = SimpleNamespace(write=None, closed=False, end_lines=lambda: None)  # type: ignore[assignment]
    vm.attachable.set()
    monkeypatch.setattr(supervisor.sessions, "stream", refuse)
    vm.carry_streams()
    assert isinstance(vm._streams_broke, NotFoundError)


@contextlib.contextmanager
def starting(*, fails: bool) -> Iterator[object]:
    if fails:
        raise SnapshotError("It cannot be restored.")
    yield "Firecracker"


def unusable(vm: Supervisor, other: object, *, at: str) -> object:
    """A start that fails when its disks are made, or Firecracker is to load it."""

    def disks(_vm: Supervisor) -> None:
        for name in ("scratch.img", "memory.base", "vmlinux", "vsock.sock"):
            (vm.directory / name).touch()
        if at == "disks":
            raise NotFoundError("It was pruned meanwhile.")

    return SimpleNamespace(snapshot="warm-1", disks=disks, firecracker=lambda _vm: starting(fails=True), instead=lambda _layout: other)


@pytest.mark.parametrize("at", ["disks", "load"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_snapshot_of_ours_that_cannot_be_restored_costs_only_time(vm: Supervisor, ours: bool, at: str) -> None:
    furnished: list[list[str]] = []
    other = SimpleNamespace(
        snapshot=None,
        firecracker=lambda _vm: starting(fails=False),
        volumes=lambda _vm: None,
        disks=lambda vm: furnished.append(os.listdir(vm.directory)),
    )
    restarted: list[object] = []
    vm.volumes = SimpleNamespace(restart=restarted.append)  # type: ignore[assignment]
    vm.directory.mkdir()
    start = unusable(vm, other if ours else None, at=at)

    def start_it() -> object:
        vm._furnish(start)  # type: ignore[arg-type]
        return vm._firecracker()

    if ours:
        assert start_it() == "Firecracker"
        assert furnished == [[]], "nothing of the other start is left"
        assert vm.start is other
        assert vm.entry.record.snapshot is None
        assert restarted == ([] if at == "disks" else [None]), "at the disks there are none yet"
    else:
        with pytest.raises(FcvmError, match=r"cannot be restored|pruned"):
            start_it()


def test_a_silent_guests_volumes_are_those_of_what_is_started_instead(vm: Supervisor) -> None:
    """Also where that fails as well, and the snapshot that the volumes were of is gone."""
    restarted: list[object] = []
    vm.volumes = SimpleNamespace(restart=restarted.append)  # type: ignore[assignment]
    vm.directory.mkdir()
    with socket.socket() as firecracker:
        vm.firecracker = SimpleNamespace(pidfd=firecracker)  # type: ignore[assignment]
        vm._selector.register(firecracker, 1)
        last = SimpleNamespace(
            snapshot=None,
            disks=lambda _vm: None,
            volumes=lambda _vm: Path("volumes.json"),
            firecracker=lambda _vm: contextlib.nullcontext(SimpleNamespace(pidfd=firecracker)),
            go=lambda _vm: None,
            timeout=1.0,
        )
        vm._start_again(unusable(vm, last, at="disks"))  # type: ignore[arg-type]
    assert restarted == [Path("volumes.json")]


class Said:
    """As much of a control channel as it takes: what the host says."""

    def __init__(self, vm: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[dict[str, Any]] = []
        vm.control = SimpleNamespace(send=self.messages.append)  # type: ignore[assignment]
        vm.freezing = SimpleNamespace(hello=lambda state, running: None, thawed=lambda: None)  # type: ignore[assignment]
        vm.clock = SimpleNamespace(was_set=lambda sent: None)  # type: ignore[assignment]
        vm.network = SimpleNamespace(guest=SimpleNamespace(json=dict))  # type: ignore[assignment]
        monkeypatch.setattr(messages.plan, "network", lambda vm: None)
        vm.phase = "starting"

    def types(self) -> list[str]:
        return [message["type"] for message in self.messages]


@pytest.fixture
def said(vm: Supervisor, monkeypatch: pytest.MonkeyPatch) -> Said:
    return Said(vm, monkeypatch)


def hello(vm: Supervisor, phase: str, **state: object) -> None:
    messages.deal(vm, {"type": "hello", "protocol": 1, "state": {"phase": phase, **state}})


def hang(*_: object) -> tuple[object, bytes]:
    threading.Event().wait()
    return None, b""


def lose(*_: object) -> tuple[object, bytes]:
    raise AgentError("The connection to the agent was lost.")


@pytest.mark.parametrize("guest", [hang, lose, lambda *_: (None, b""), lambda *_: (None, b"many\n")])
def test_a_guest_that_does_not_tell_whether_vms_run_in_it_has_no_snapshot(
    vm: Supervisor, guest: Callable[..., tuple[object, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests.operations, "COUNT_LIMIT", 0.2)
    monkeypatch.setattr(requests.operations.sessions, "output", guest)
    vm.spec = replace(vm.spec, nested="/disk")
    with pytest.raises(AgentError, match="does not tell whether VMs run in it") as caught:
        requests.operations.perform(vm, {"op": "snapshot", "tag": "x"})
    assert caught.value.hint == "fcvm logs --console quiet"


def test_an_agent_that_fails_at_something_ends_no_container(vm: Supervisor, capsys: pytest.CaptureFixture[str]) -> None:
    vm.freezing = SimpleNamespace(waits=False)  # type: ignore[assignment]
    messages.deal(vm, {"type": "error", "message": "OSError: it has no clock"})
    assert "The guest agent failed: OSError: it has no clock" in capsys.readouterr().err


@pytest.mark.parametrize("state", [{"phase": "planned"}, {"stop_sent": True}, {"freezing": SimpleNamespace(waits=True)}])
def test_an_agent_that_fails_at_what_is_waited_for_ends_the_wait(vm: Supervisor, state: dict[str, Any]) -> None:
    vm.freezing = SimpleNamespace(waits=False)  # type: ignore[assignment]
    for name, value in state.items():
        setattr(vm, name, value)
    with pytest.raises(AgentError, match="failed: OSError"):
        messages.deal(vm, {"type": "error", "message": "OSError"})


def test_an_agent_that_talks_nonsense_ends_the_vm_also_within_a_request(vm: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said with that, its exit perhaps, is lost."""

    def receive() -> object:
        raise AgentError("The guest agent sent something that is not JSON.")

    theirs, ours = socket.socketpair()
    vm.control = SimpleNamespace(receive=receive)  # type: ignore[assignment]
    vm.requests = SimpleNamespace(accept=lambda: (ours, None))  # type: ignore[assignment]
    vm.firecracker, vm.network = SimpleNamespace(pidfd=-1), SimpleNamespace(watch=[])  # type: ignore[assignment]
    monkeypatch.setattr(requests.operations, "perform", lambda vm, request: vm._on_control())
    with theirs:
        theirs.sendall(b'{"op": "snapshot"}\n')
        requests.serve(vm)
        assert "not JSON" in json.loads(theirs.makefile().readline())["error"]
        vm._selector.close()
        vm._selector = SimpleNamespace(register=lambda *_: None, select=lambda *_: pytest.fail("it goes on"))  # type: ignore[assignment]
        with pytest.raises(AgentError, match="not JSON"):
            vm._loop()


def test_an_identity_that_was_lost_with_its_connection_is_sent_again(vm: Supervisor, said: Said) -> None:
    hello(vm, "running", machine_id="its source's")
    deadline = vm.deadline
    hello(vm, "running", machine_id="its source's")
    assert said.types() == ["restored", "restored"]
    assert len({message["identity"]["machine_id"] for message in said.messages}) == 1
    assert vm.deadline == deadline, "a guest cannot put it off"
    messages.deal(vm, {"type": "ready"})
    assert vm.running
    hello(vm, "running")
    assert len(said.messages) == 2


def test_a_ready_that_was_lost_with_its_connection_is_told_by_the_next(vm: Supervisor, said: Said) -> None:
    hello(vm, "running")
    hello(vm, "running", machine_id=said.messages[0]["identity"]["machine_id"])
    assert said.types() == ["restored"]
    assert vm.running
    assert vm.deadline is None


@pytest.mark.parametrize("state", [{"phase": "running"}, {"phase": "exited", "exit": {"code": 3}}])
def test_a_start_that_was_lost_with_its_connection_is_told_by_the_next(vm: Supervisor, said: Said, state: dict[str, Any]) -> None:
    """A container that has ended by now is one whose output is to be read."""
    hello(vm, "waiting")
    hello(vm, container_id="c1", **state)
    assert said.types() == ["plan"]
    assert vm.phase == "running"
    assert vm.exit == state.get("exit")


@pytest.mark.parametrize("then", [{"type": "started"}, {"type": "hello", "state": {"phase": "waiting"}}])
def test_a_stop_while_the_container_starts_keeps_its_deadline(vm: Supervisor, said: Said, then: dict[str, Any]) -> None:
    """A guest that hangs after that would never be killed, and `fcvm stop` wait for ever."""
    hello(vm, "waiting")
    requests.carry_out(vm, {"op": "stop"})
    deadline = vm.deadline
    messages.deal(vm, then)
    assert said.types()[:2] == ["plan", "stop"]
    assert deadline is not None
    assert vm.deadline == deadline
    assert vm.entry.record.status == "stopping"


def test_a_warming_that_was_lost_with_its_connection_is_asked_for_again(vm: Supervisor, said: Said) -> None:
    vm.start = SimpleNamespace(captures=True, capture=lambda vm: False, timeout=60.0)  # type: ignore[assignment]
    hello(vm, "waiting")
    hello(vm, "waiting")
    assert said.types() == ["warm", "warm"]
    messages.deal(vm, {"type": "warmed"})
    messages.deal(vm, {"type": "warmed"})
    assert said.types() == ["warm", "warm", "plan"]


@pytest.mark.parametrize(
    ("user", "known", "ids"),
    [(None, None, (1000, 100)), ("0", None, (0, 0)), ("7", None, (7, 0)), ("node", "8:9", (8, 9))],
)
def test_volumes_are_the_containers_users(
    user: str | None, known: str | None, ids: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "Volumes", lambda *_, owner, states: owner)
    spec = RunSpec(name="owned", image=ImageUse("image", "sha256:1", "sha256:2", "/image", user="1000:100"), user=user, owner=known)
    vm = SimpleNamespace(spec=spec, directory=Path("/vm"), start=SimpleNamespace(volumes=lambda _: None))
    assert Supervisor._serve_volumes(vm) == ids  # type: ignore[arg-type,comparison-overlap]
