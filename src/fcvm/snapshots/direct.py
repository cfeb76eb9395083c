"""A clone without a clone server: `fcvm snapshot run --snapshot TAG`. Its memory is mapped from the snapshot's file."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fcvm import setup
from fcvm.agent import session
from fcvm.config import Config
from fcvm.errors import ConflictError, ContainerError
from fcvm.snapshots import store
from fcvm.snapshots.client import Wanted
from fcvm.storage.layout import Layout
from fcvm.vm import clone as clones
from fcvm.vm import run as vm
from fcvm.vm import sessions, state
from fcvm.vm.supervisor import Supervisor


def run(tag: str, wanted: Wanted, config: Config, *, command: Sequence[str] | None = None) -> int:
    """Run a clone until its container ends, or only for ``command``; returns the exit code.

    Raises:
        FcvmError: it cannot be made, or died.
    """
    vm.sweep(config)
    if command is None:
        return vm.drive(_supervisor(tag, wanted, config, shown=True))
    with running(tag, wanted, config) as supervisor:
        end = execute(supervisor, command, on_output=session.to_descriptors(1, 2), signals=session.FORWARDED)
    if end.message:
        raise ContainerError(end.message, exit_code=end.code)
    return end.code


@contextmanager
def running(tag: str, wanted: Wanted, config: Config) -> Iterator[Supervisor]:
    """A clone that runs in the background of this process, and is killed at the end of the block.

    Raises:
        FcvmError: it cannot be made; or, at the end, what it died of.
    """
    started = threading.Event()
    errors: list[BaseException] = []
    supervisor = _supervisor(tag, wanted, config, shown=False, on_started=started.set)

    def live() -> None:
        try:
            supervisor.run()
        except BaseException as error:
            errors.append(error)
        finally:
            started.set()

    threads = [threading.Thread(target=live), threading.Thread(target=supervisor.carry_streams)]
    for thread in threads:
        thread.start()
    try:
        started.wait()
        if errors:
            raise errors[0]
        yield supervisor
    finally:
        supervisor.ask({"op": "kill"})
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def execute(
    supervisor: Supervisor,
    command: Sequence[str],
    *,
    on_output: session.Output,
    target: str = "container",
    stdin: int | None = None,
    signals: Sequence[int] = (),
) -> session.Exit:
    """Run a command in a clone's container (or, with ``target`` "vm", in its guest OS).

    Raises:
        ConflictError: the clone has ended.
    """
    try:
        request = session.Request(command, target=target, stdin=stdin is not None)
        return sessions.stream(supervisor.directory, request, stdin=stdin, on_output=on_output, signals=signals)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ConflictError(
            f"The clone {supervisor.spec.name!r} has ended.", hint="fcvm snapshot run --snapshot TAG shows its output"
        ) from error


def _supervisor(
    tag: str, wanted: Wanted, config: Config, *, shown: bool, on_started: Callable[[], None] = lambda: None
) -> Supervisor:
    layout = Layout(config.base_dir)
    snapshot = store.find(layout, tag)
    changes = {"network": wanted.network} if wanted.network else {}
    spec = clones.spec_of(
        snapshot,
        name=wanted.name or f"clone-{state.new_id()[:8]}",
        publish=wanted.publish,
        log_prefix=wanted.log_prefix,
        detach=not shown,
        **changes,
    )
    start = clones.start(tag, config, setup.find(config, layout))
    return Supervisor(spec, config, start, on_started=on_started)
