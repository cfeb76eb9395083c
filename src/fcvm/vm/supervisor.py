"""One VM from its spec to its exit.

``Supervisor.run`` holds everything that a VM is made of (registration, directory, network, Firecracker, control channel, the
container's output) as nested resources and waits in one loop on descriptors: the agent's messages, the end of
Firecracker, requests of other commands, what ``ask`` was told by other threads. Whatever happens, the resources are
released in reverse order; if the process is killed, the kernel ends Firecracker and the network, and the next command
sweeps the files.

What is to be done about a message or a request is in ``messages.py`` and ``requests.py``, which know the supervisor's state.

It neither touches signals nor the terminal, so that a clone server can run many of them as threads;
``fcvm.vm.run`` ties one to a terminal and its signals.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fcvm import log
from fcvm.agent import session
from fcvm.agent.control import Control, new_machine_id
from fcvm.config import Config
from fcvm.errors import AgentError, ContainerError, FcvmError, GuestError, NetworkError, NotFoundError, SnapshotError
from fcvm.firecracker.boot import KERNEL
from fcvm.firecracker.process import CONSOLE, QUOTE, Firecracker
from fcvm.linux import sockets
from fcvm.storage.layout import Layout, remove
from fcvm.vm import listeners, messages, network, output, paths, post_mortem, requests, rpc, sessions, state
from fcvm.vm.clock import Clock
from fcvm.vm.freezing import Freezing
from fcvm.vm.spec import RunSpec
from fcvm.vm.start import Start
from fcvm.vm.timings import Timings
from fcvm.volumes.service import Volumes
from fcvm.volumes.spec import owner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STREAMS_MARGIN = 10.0  # seconds between the end of Firecracker and that of the container's streams, whichever is first
KILLED = 137  # exit code of a container that was killed: 128 + SIGKILL


class Supervisor:
    """The life of one VM.

    Attributes:
        id: the VM's id; its directory is ``vms/<id>``.
        timings: how long each stage of the start took.
        phase: how far its start is: ``starting``, ``restored`` or ``warming``, ``captured``, ``planned``; then ``running``.
        exit: the agent's ``exit`` message, once the container has ended.
        deadline: when ``_on_deadline`` is to do something about what has not happened; None: nothing is waited for.
    """

    def __init__(
        self,
        spec: RunSpec,
        config: Config,
        start: Start,
        *,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Arguments:
            start: how the VM comes to life (booted, restored).
            on_started: called once, when the container runs.
        """
        self.spec = spec
        self.config = config
        self.layout = Layout(config.base_dir)
        self.id = state.new_id()
        self.machine_id = new_machine_id()  # the guest's; it tells whether a restored one has taken its identity
        self.directory: Path = self.layout.vms / self.id
        self.timings = Timings()
        self.identified_at = 0  # when it was sent its identity, nanoseconds of the epoch
        self.clock = Clock(lambda message: self.control.send(message), time.time_ns)
        self.start = start
        self.on_started = on_started
        self.attachable = threading.Event()  # the container runs, or never will
        self._streams_ended = False
        self._streams_broke: Exception | None = None
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._asks: list[dict[str, Any]] = []
        self._waking = threading.RLock()  # a signal handler may ask while its own thread does
        self._selector = selectors.DefaultSelector()
        self.phase = "starting"
        self.exit: dict[str, Any] | None = None
        self.deadline: float | None = None
        self._vmm = contextlib.ExitStack()  # Firecracker; it may be replaced by another one
        self._misunderstood: AgentError | None = None
        self._failure: FcvmError | None = None  # what ends the VM
        self.killing = False
        self.stop_sent = False
        self.warmed = False  # the container was healthy, and a warm start taken if one was wanted
        self.waiting: list[socket.socket] = []  # callers of `fcvm stop`, answered when the VM has ended

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        return self.phase == "running" and self.exit is None

    # What other threads may call

    def carry_streams(self, *, stdin: int | None = None, terminal: int | None = None) -> None:
        """Carry the container's streams from its start to the end of its output; some thread must, once, beside ``run``.

        Arguments:
            stdin: the descriptor that its stdin is read from.
            terminal: our terminal, if the container has one; needs the main thread.

        Raises:
            BrokenPipeError: the reader of our stdout has gone; the container was hung up.
        """
        self.attachable.wait()
        try:
            if self.phase == "running":
                self._stream(stdin, terminal)
                self.output.end_lines()
        finally:
            self._streams_ended = True
            self._wake()

    def _stream(self, stdin: int | None, terminal: int | None) -> None:
        main = session.Resume("main", on_resumed=lambda seen: self.start.resumed(self, seen))
        try:
            sessions.stream(
                self.directory,
                main,
                stdin=stdin,
                on_output=self.output.write,
                terminal=terminal,
                give_up=lambda error, since: isinstance(error, FileNotFoundError | ConnectionRefusedError),
            )
        except (FcvmError, OSError) as error:
            if isinstance(error, BrokenPipeError) and self.output.closed:
                raise
            self._streams_broke = error
            log.debug(f"{self.spec.name}: the container's streams broke: {error}")  # the loop knows why the VM ended

    def ask(self, request: dict[str, Any]) -> None:
        """Hand a request (``stop``, ``kill``) to the loop, from any thread or signal handler."""
        self._asks.append(request)
        self._wake()

    def _wake(self) -> None:
        with self._waking:
            if self._asked >= 0:  # else the loop has ended
                os.eventfd_write(self._asked, 1)

    @property
    def marked(self) -> bool | None:
        """Whether lines are marked where they are shown (``output.Marks``); those of a terminal never are."""
        return False if self.spec.tty else self.spec.log_prefix

    # The life

    def run(self) -> int:
        """Run the VM to its end and return the container's exit code.

        Raises:
            FcvmError: it could not be started, or the guest, Firecracker or the network died.
        """
        try:
            with contextlib.ExitStack() as stack:
                try:
                    self._acquire(stack)
                    self._loop()
                    self.timings.mark("end")
                except FcvmError as error:
                    self._failure = error
                    requests.answer_waiting(self, rpc.failure(error))
                    raise
                finally:
                    self.attachable.set()
            assert self.exit is not None
            return self._result(self.exit)
        finally:
            requests.answer_waiting(self, {"ok": True})
            self.close()

    def close(self) -> None:
        """End what may not even have run, and ``carry_streams`` with it; ``run`` does so at its end. Safe to call again."""
        self.attachable.set()
        self._selector.close()
        with self._waking:
            asked, self._asked = self._asked, -1  # first: a signal handler may come in between
            if asked >= 0:
                os.close(asked)

    def _acquire(self, stack: contextlib.ExitStack) -> None:
        spec = self.spec
        record = state.Record(
            id=self.id,
            name=spec.name,
            pid=os.getpid(),
            status="starting",
            health="starting",
            image=spec.image.reference,
            created_at=time.time(),
            cpu=spec.cpu,
            memory_mib=spec.memory,
            labels=spec.labels,
            volumes=[volume.public() for volume in spec.volumes],
            keep=False,
            snapshot=self.start.snapshot,
        )
        self.entry = stack.enter_context(contextlib.closing(state.register(self.layout, record)))
        self.directory.mkdir(mode=0o700)
        stack.callback(self._leave)
        self.network = stack.enter_context(self.start.network(self))
        self.shown = stack.enter_context(network.shown(self))
        self.entry.update(network=self.shown)
        self.refusals = listeners.Refusals(self.spec.name, self.directory, self.shown["ports"])
        self.network.on_refused = lambda ports: self.refusals.look(ports, self.ask)
        self.network.on_answered = lambda ports: self.ask({"op": "reachable", "ports": list(ports)})
        self.timings.mark("network")
        self._furnish(self.start)
        self.timings.mark("disks")
        log_file, limit = self.directory / output.LOG, self.config.log_size << 20
        first = partial(self.timings.mark, "first output")
        self.output = output.Output(log_file, limit, show=not spec.detach, prefix=self.marked, on_first=first)
        stack.callback(self.output.close)
        self.control = stack.enter_context(contextlib.closing(Control(self.directory / paths.VSOCK)))
        self.freezing = Freezing(self.control, self._on_control)
        self.volumes = stack.enter_context(contextlib.closing(self._serve_volumes()))
        stack.enter_context(self._vmm)
        self.firecracker = self._firecracker()
        self.requests = stack.enter_context(sockets.listen(self.directory / rpc.SOCKET))
        self.start.go(self)
        self.deadline = time.monotonic() + self.start.timeout

    def _furnish(self, start: Start) -> None:
        """Put the disks of ``start`` into the directory, or those of what is to be started instead."""
        self.start, self.phase = start, "starting"
        if start.snapshot != self.entry.record.snapshot:
            self.entry.update(snapshot=start.snapshot)
        try:
            start.disks(self)
        except (SnapshotError, NotFoundError) as error:
            self._furnish(self._instead(error))

    def _firecracker(self) -> Firecracker:
        """Firecracker with the start's VM in it, or with what is to be started instead."""
        try:
            return self._vmm.enter_context(self.start.firecracker(self))
        except (SnapshotError, NotFoundError) as error:
            other = self._instead(error)
        self._furnish(other)
        self.volumes.restart(self.start.volumes(self))
        return self._firecracker()

    def _instead(self, error: FcvmError) -> Start:
        """What to start where a snapshot of ours is of no use any more; raises ``error`` if it is not one of ours."""
        other = self.start.instead(self.layout)
        if other is None:
            raise error
        log.info(f"starting in another way: {error.message}")
        self._unfurnish()
        return other

    def _serve_volumes(self) -> Volumes:
        spec = self.spec
        vsock_path, states = self.directory / paths.VSOCK, self.start.volumes(self)
        return Volumes(spec.volumes, vsock_path, owner=owner(spec.owner or spec.user or spec.image.user), states=states)

    def _leave(self) -> None:
        """The end of the VM's directory; of a kept VM only the logs stay, with why it ended at the end of the console's."""
        ended: dict[str, Any] = self.exit or {}
        if self._failure is not None and self.phase == "running":
            ended = {"code": self._failure.exit_code, "message": self._failure.message} | ended
        elif self.killing and ended == {"code": KILLED}:  # of its end the agent had not told
            ended = {"message": "The VM was killed before its container had ended."} | ended
        if self.spec.remove or not ended:
            remove(self.directory)
            return
        if ended.get("message"):
            with contextlib.suppress(OSError), open(self.directory / CONSOLE, "a") as console:
                console.write(f"fcvm: {str(ended['message']).partition(QUOTE)[0]}\n")
        logs = (output.LOG, f"{output.LOG}.1", output.CLOSED, CONSOLE, f"{CONSOLE}.1")
        for path in self.directory.iterdir():
            if path.name not in logs:
                remove(path)
        (self.directory / output.CLOSED).touch()  # now there is space for it even on a full disk
        self.entry.update(status="exited", health="stopped", exit_code=ended["code"], keep=True)

    # The loop

    def _loop(self) -> None:
        watch = self._selector.register
        watch(self.firecracker.pidfd, selectors.EVENT_READ, self._on_firecracker_end)
        watch(self.control, selectors.EVENT_READ, self._on_control)
        watch(self.requests, selectors.EVENT_READ, partial(requests.serve, self))
        watch(self._asked, selectors.EVENT_READ, self._on_ask)
        for fd, message in self.network.watch:
            watch(fd, selectors.EVENT_READ, partial(self._on_network_end, message))
        while not self._over():
            if self._misunderstood is not None:
                raise self._misunderstood
            times = [when for when in (self.deadline, self.clock.due) if when is not None]
            ready = self._selector.select(max(0.0, min(times) - time.monotonic()) if times else None)
            if not ready and self.deadline is not None and time.monotonic() >= self.deadline:
                self._on_deadline()
            if self.clock.due is not None and time.monotonic() >= self.clock.due:
                self.clock.ask()
            for key, _ in ready:
                key.data()

    def _over(self) -> bool:
        """The container has ended and all of its output has been passed on."""
        return self.exit is not None and (self.phase != "running" or self._streams_ended)

    def _on_deadline(self) -> None:
        self.deadline = None
        if self.exit is not None:  # stopped, but somebody does not read our output
            self._streams_ended = True
            return
        if self._streams_broke is not None and not self.stop_sent:
            reason = str(self._streams_broke).removesuffix(".")
            raise AgentError(f"The container's output cannot be read any more: {reason}.{self.firecracker.console.quote()}")
        if self.stop_sent:  # and not obeyed
            self.kill()
            return
        another = self.start.another() if self.phase in ("starting", "restored") else None
        if another is None:
            raise GuestError(
                f"The guest did not start within {self.start.timeout:g} seconds.{self.firecracker.console.quote()}",
                hint="fcvm doctor",
            )
        log.info(f"the guest does not answer after {self.start.timeout:g} seconds; starting it once more")
        self._start_again(another)

    def _start_again(self, start: Start) -> None:
        """Replace a guest that never said hello: nothing of it was seen by anybody."""
        self._selector.unregister(self.firecracker.pidfd)
        self._unfurnish()
        self._furnish(start)
        self.volumes.restart(self.start.volumes(self))
        self.firecracker = self._firecracker()
        self._selector.register(self.firecracker.pidfd, selectors.EVENT_READ, self._on_firecracker_end)
        self.start.go(self)
        self.deadline = time.monotonic() + self.start.timeout

    def _unfurnish(self) -> None:
        """Have nothing of the guest that was, or was to be, started."""
        self._vmm.close()
        for path in (*self.directory.glob("*.img"), *self.directory.glob("memory.*")):
            path.unlink()
        for path in (self.directory / KERNEL, self.directory / paths.VSOCK):
            path.unlink(missing_ok=True)

    def _on_firecracker_end(self) -> None:
        self._selector.unregister(self.firecracker.pidfd)
        if self.exit is not None or self.killing:
            self.exit = self.exit or {"code": KILLED}
            self.deadline = time.monotonic() + STREAMS_MARGIN  # for whoever reads our output, who may have stopped to
            return
        self.firecracker.process.wait()
        self.firecracker.console.join()
        raise post_mortem.why(self.firecracker, self.spec)

    def _on_network_end(self, message: str) -> None:
        raise NetworkError(message)

    def _on_control(self) -> None:
        try:
            received = self.control.receive()
        except AgentError as error:  # a request that waits for the agent ends by this, and then the VM: who knows what it said
            self._misunderstood = error
            raise
        for message in received:
            messages.deal(self, message)

    def _on_ask(self) -> None:
        os.eventfd_read(self._asked)
        while self._asks:
            requests.carry_out(self, self._asks.pop(0))
        if self._streams_broke is not None and self.exit is None and self.deadline is None:
            self.deadline = time.monotonic() + STREAMS_MARGIN

    def kill(self) -> None:
        """End the VM without asking the guest."""
        self.killing = True
        self.firecracker.process.kill()

    def _result(self, exit: dict[str, Any]) -> int:
        code = int(exit["code"])
        if self._streams_broke is not None and not self.killing:
            raise AgentError(
                f"The container ended with exit code {code}, but not all of its output could be read: {self._streams_broke}"
            )
        if exit.get("message"):
            if code in (125, 126, 127) and self.phase == "planned":
                raise ContainerError(str(exit["message"]), exit_code=code, hint=exit.get("hint"))
            log.warning(f"{exit['message']}{self.firecracker.console.quote(5)}")
        return code
