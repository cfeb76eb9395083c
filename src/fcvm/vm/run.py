"""A VM tied to this process: its terminal, its signals, its exit code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from fcvm import host, setup
from fcvm.agent import terminal
from fcvm.config import Config
from fcvm.network import attach
from fcvm.signals import PASSED_ON, STOPPING, handled
from fcvm.snapshots import store
from fcvm.storage.layout import Layout
from fcvm.vm import background, state, warm
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Start
from fcvm.vm.supervisor import Supervisor

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Killed(BaseException):
    """Raised in the main thread by a second signal, so that even a write that blocks is left."""


def how_to_start(spec: RunSpec, config: Config) -> Start:
    """The quickest start there is for ``spec``."""
    layout = Layout(config.base_dir)
    host.need_kvm()
    return warm.choose(spec, setup.find(config, layout), layout)


def sweep(config: Config) -> None:
    """Remove what VMs, networks and snapshots that were killed in the making have left."""
    layout = Layout(config.base_dir)
    state.sweep(layout)
    attach.sweep()
    store.sweep(layout)


def foreground(spec: RunSpec, config: Config) -> int:
    """Run a VM until its container ends; returns the container's exit code.

    The first SIGINT, SIGTERM or SIGHUP stops the container with its stop signal, the second one kills the VM.

    Raises:
        FcvmError: as ``Supervisor.run``.
    """
    sweep(config)
    supervisor = Supervisor(spec, config, how_to_start(spec, config))
    stdin = 0 if spec.interactive else None
    code = drive(supervisor, stdin=stdin, terminal=terminal.ours() if spec.tty else None)
    if spec.timings:
        supervisor.timings.print()
    return code


def drive(supervisor: Supervisor, *, stdin: int | None = None, terminal: int | None = None) -> int:
    """Run ``supervisor`` in a thread, carry its container's streams in this one, the main thread, and handle signals."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["code"] = supervisor.run()
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=run, name="supervisor")
    broken_pipe = False
    with stopping(supervisor) as signals:
        thread.start()
        try:
            try:
                signals.interrupt = True
                supervisor.carry_streams(stdin=stdin, terminal=terminal)
            except BrokenPipeError:
                broken_pipe = True
                supervisor.ask({"op": "kill"})
            finally:
                signals.interrupt = False
        except Killed:
            pass
        except BaseException:
            supervisor.ask({"op": "kill"})
            raise
        finally:
            thread.join()
    if "error" in result:
        raise result["error"]
    return 141 if broken_pipe else int(result["code"])


class Signals:
    """Turns the first of STOPPING into a stop of a VM, the next into a kill, and passes others on.

    Attributes:
        interrupt: whether the main thread is where a kill may raise ``Killed``, which it does once.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self.interrupt = False
        self._supervisor = supervisor
        self._seen = 0

    def handle(self, number: int, frame: object) -> None:
        if number in PASSED_ON:
            self._supervisor.ask({"op": "signal", "signal": int(number)})
            return
        self._seen += 1
        self._supervisor.ask({"op": "stop" if self._seen == 1 else "kill"})
        if self._seen > 1 and self.interrupt:
            self.interrupt = False
            raise Killed


@contextlib.contextmanager
def stopping(supervisor: Supervisor) -> Iterator[Signals]:
    """Have signals stop and kill the VM inside the block, or passed on to its container."""
    signals = Signals(supervisor)
    with handled((*STOPPING, *PASSED_ON), signals.handle):
        yield signals


def detached(spec: RunSpec, config: Config) -> int:
    """Start a VM whose supervisor lives on in the background; print its name once the container runs.

    Raises:
        FcvmError: it could not be started; nothing is left then.
    """
    sweep(config)
    start = how_to_start(spec, config)

    def live(ready: Callable[[], None]) -> int:
        return drive(Supervisor(spec, config, start, on_started=ready))

    background.detached("The VM's supervisor", live, hint="FCVM_LOG=debug fcvm podman run ...")
    print(spec.name)
    return 0
