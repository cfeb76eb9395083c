"""One VM from its spec to its exit.

``Supervisor.run`` holds everything that a VM is made of (registration, directory, network, Firecracker, control channel, the
container's output) as nested resources and waits in one loop on descriptors: the agent's messages, the end of
Firecracker, requests of other commands, what ``ask`` was told by other threads. Whatever happens, the resources are
released in reverse order; if the process is killed, the kernel ends Firecracker and the network, and the next command
sweeps the files.

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
from fcvm.agent.control import Control
from fcvm.config import Config
from fcvm.errors import AgentError, ContainerError, FcvmError, GuestError, NetworkError, NotFoundError, SnapshotError
from fcvm.firecracker.boot import KERNEL
from fcvm.firecracker.process import Firecracker
from fcvm.linux import sockets
from fcvm.storage.layout import Layout, remove
from fcvm.vm import listeners, network, operations, output, paths, plan, post_mortem, rpc, sessions, state, warm
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

STOP_MARGIN = 60.0  # seconds beyond the stop timeout in which the agent must report the end, before the VM is killed
STREAMS_MARGIN = 10.0  # seconds between the end of Firecracker and that of the container's streams, whichever is first
UNPLANNED = ("starting", "warming", "captured")  # phases in which there is no container to stop, and a boot snapshot may be taken
KILLED = 137  # exit code of a container that was killed: 128 + SIGKILL


class Supervisor:
    """The life of one VM.

    Attributes:
        id: the VM's id; its directory is ``vms/<id>``.
        timings: how long each stage of the start took.
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
        self.directory: Path = self.layout.vms / self.id
        self.timings = Timings()
        self._restored_at = 0  # nanoseconds of the epoch
        self._start = start
        self._on_started = on_started
        self._attachable = threading.Event()  # the container runs, or never will
        self._streams_ended = False
        self._streams_broke: Exception | None = None
        self._asked = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._asks: list[dict[str, Any]] = []
        self._waking = threading.RLock()  # a signal handler may ask while its own thread does
        self._selector = selectors.DefaultSelector()
        self._phase = "starting"
        self._exit: dict[str, Any] | None = None
        self._deadline: float | None = None
        self._vmm = contextlib.ExitStack()  # Firecracker; it may be replaced by another one
        self._killing = False
        self._stop_sent = False
        self._warmed = False  # the container was healthy, and a warm start taken if one was wanted
        self._waiting: list[socket.socket] = []  # callers of `fcvm stop`, answered when the VM has ended

    @property
    def running(self) -> bool:
        """Whether the container runs."""
        return self._phase == "running" and self._exit is None

    # What other threads may call

    def carry_streams(self, *, stdin: int | None = None, terminal: int | None = None) -> None:
        """Carry the container's streams from its start to the end of its output; some thread must, once, beside ``run``.

        Arguments:
            stdin: the descriptor that its stdin is read from.
            terminal: our terminal, if the container has one; needs the main thread.

        Raises:
            BrokenPipeError: the reader of our stdout has gone; the container was hung up.
        """
        self._attachable.wait()
        try:
            if self._phase == "running":
                main = session.Resume("main", on_resumed=lambda seen: self._start.resumed(self, seen))
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
        finally:
            self._streams_ended = True
            self._wake()

    def ask(self, request: dict[str, Any]) -> None:
        """Hand a request (``stop``, ``kill``) to the loop, from any thread or signal handler."""
        self._asks.append(request)
        self._wake()

    def _wake(self) -> None:
        with self._waking:
            if self._asked >= 0:  # else the loop has ended
                os.eventfd_write(self._asked, 1)

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
                    self._answer_waiting(rpc.failure(error))
                    raise
                finally:
                    self._attachable.set()
            assert self._exit is not None
            return self._result(self._exit)
        finally:
            self._answer_waiting({"ok": True})
            self._selector.close()
            with self._waking:
                asked, self._asked = self._asked, -1  # first: a signal handler may come in between
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
            snapshot=self._start.snapshot,
        )
        self.entry = stack.enter_context(contextlib.closing(state.register(self.layout, record)))
        self.directory.mkdir(mode=0o700)
        stack.callback(self._leave)
        self.network = stack.enter_context(self._start.network(self))
        self._shown = stack.enter_context(network.shown(self))
        self.entry.update(network=self._shown)
        self._refusals = listeners.Refusals(self.spec.name, self.directory, self._shown["ports"])
        self.network.on_refused = lambda ports: self._refusals.look(ports, self.ask)
        self.network.on_answered = lambda ports: self.ask({"op": "reachable", "ports": list(ports)})
        self.timings.mark("network")
        self._furnish(self._start)
        self.timings.mark("disks")
        log_file, limit = self.directory / output.LOG, self.config.log_size << 20
        prefix = bool(spec.log_prefix) and not spec.tty
        first = partial(self.timings.mark, "first output")
        self.output = output.Output(log_file, limit, show=not spec.detach, prefix=prefix, on_first=first)
        stack.callback(self.output.close)
        self.control = stack.enter_context(contextlib.closing(Control(self.directory / paths.VSOCK)))
        self._clock = Clock(self.control.send, time.time_ns)
        self.freezing = Freezing(self.control, self._on_control)
        self.volumes = stack.enter_context(contextlib.closing(self._serve_volumes()))
        stack.enter_context(self._vmm)
        self.firecracker = self._firecracker()
        self._requests = stack.enter_context(sockets.listen(self.directory / rpc.SOCKET))
        self._start.go(self)
        self._deadline = time.monotonic() + self._start.timeout

    def _furnish(self, start: Start) -> None:
        """Put the disks of ``start`` into the directory, or those of what is to be started instead."""
        self._start, self._phase = start, "starting"
        if start.snapshot != self.entry.record.snapshot:
            self.entry.update(snapshot=start.snapshot)
        try:
            start.disks(self)
        except (SnapshotError, NotFoundError) as error:
            self._furnish(self._instead(error))

    def _firecracker(self) -> Firecracker:
        """Firecracker with the start's VM in it, or with what is to be started instead."""
        try:
            return self._vmm.enter_context(self._start.firecracker(self))
        except (SnapshotError, NotFoundError) as error:
            other = self._instead(error)
        self.volumes.restart()
        self._furnish(other)
        return self._firecracker()

    def _instead(self, error: FcvmError) -> Start:
        """What to start where a snapshot of ours is of no use any more; raises ``error`` if it is not one of ours."""
        other = self._start.instead(self.layout)
        if other is None:
            raise error
        log.info(f"starting in another way: {error.message}")
        self._unfurnish()
        return other

    def _serve_volumes(self) -> Volumes:
        spec = self.spec
        vsock_path, states = self.directory / paths.VSOCK, self._start.volumes(self)
        return Volumes(spec.volumes, vsock_path, owner=owner(spec.user), states=states)

    def _leave(self) -> None:
        """The end of the VM's directory; of a kept VM only the logs stay."""
        if self.spec.remove or self._exit is None:
            remove(self.directory)
            return
        logs = (output.LOG, f"{output.LOG}.1", output.CLOSED, "console.log", "console.log.1")
        for path in self.directory.iterdir():
            if path.name not in logs:
                remove(path)
        (self.directory / output.CLOSED).touch()  # now there is space for it even on a full disk
        self.entry.update(status="exited", health="stopped", exit_code=self._exit["code"], keep=True)

    # The loop

    def _loop(self) -> None:
        watch = self._selector.register
        watch(self.firecracker.pidfd, selectors.EVENT_READ, self._on_firecracker_end)
        watch(self.control, selectors.EVENT_READ, self._on_control)
        watch(self._requests, selectors.EVENT_READ, self._on_request)
        watch(self._asked, selectors.EVENT_READ, self._on_ask)
        for fd, message in self.network.watch:
            watch(fd, selectors.EVENT_READ, partial(self._on_network_end, message))
        while not self._over():
            timeout = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            ready = self._selector.select(timeout)
            if not ready and self._deadline is not None and time.monotonic() >= self._deadline:
                self._on_deadline()
            for key, _ in ready:
                key.data()

    def _over(self) -> bool:
        """The container has ended and all of its output has been passed on."""
        return self._exit is not None and (self._phase != "running" or self._streams_ended)

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._exit is not None:  # stopped, but somebody does not read our output
            self._streams_ended = True
            return
        if self._streams_broke is not None and not self._stop_sent:
            reason = str(self._streams_broke).removesuffix(".")
            raise AgentError(f"The container's output cannot be read any more: {reason}.{self.firecracker.console.quote()}")
        if self._stop_sent:  # and not obeyed
            self._kill()
            return
        another = self._start.another() if self._phase in ("starting", "restored") else None
        if another is None:
            raise GuestError(
                f"The guest did not start within {self._start.timeout:g} seconds.{self.firecracker.console.quote()}",
                hint="fcvm doctor",
            )
        log.info(f"the guest does not answer after {self._start.timeout:g} seconds; starting it once more")
        self._start_again(another)

    def _start_again(self, start: Start) -> None:
        """Replace a guest that never said hello: nothing of it was seen by anybody."""
        self._selector.unregister(self.firecracker.pidfd)
        self._unfurnish()
        self.volumes.restart()
        self._furnish(start)
        self.firecracker = self._firecracker()
        self._selector.register(self.firecracker.pidfd, selectors.EVENT_READ, self._on_firecracker_end)
        self._start.go(self)
        self._deadline = time.monotonic() + self._start.timeout

    def _unfurnish(self) -> None:
        """Have nothing of the guest that was, or was to be, started."""
        self._vmm.close()
        for path in (*self.directory.glob("*.img"), *self.directory.glob("memory.*")):
            path.unlink()
        for path in (self.directory / KERNEL, self.directory / paths.VSOCK):
            path.unlink(missing_ok=True)

    def _on_firecracker_end(self) -> None:
        self._selector.unregister(self.firecracker.pidfd)
        if self._exit is not None or self._killing:
            self._exit = self._exit or {"code": KILLED}
            self._deadline = time.monotonic() + STREAMS_MARGIN  # for whoever reads our output, who may have stopped to
            return
        self.firecracker.process.wait()
        self.firecracker.console.join()
        raise post_mortem.why(self.firecracker, self.spec)

    def _on_network_end(self, message: str) -> None:
        raise NetworkError(message)

    def _on_control(self) -> None:
        for message in self.control.receive():
            handler = getattr(self, f"_on_{message.get('type')}_message", None)
            if handler is None:
                log.debug(f"{self.spec.name}: the agent sent {message.get('type')!r}, which is not known")
            else:
                handler(message)

    def _on_hello_message(self, message: dict[str, Any]) -> None:
        known = message.get("state", {})
        self.freezing.hello(known, running=self._phase == "running")
        if known.get("phase") == "waiting":
            self.timings.mark("agent")
            if self._phase == "starting" and self._start.captures:
                self._phase = "warming"
                self._deadline = time.monotonic() + self._start.timeout
                self.control.send({"type": "warm"})
            elif self._phase != "warming":
                self._send_plan()
        elif self._phase == "starting" and known.get("phase") == "running":
            self._phase = "restored"
            self._deadline = time.monotonic() + self._start.timeout
            self._restored_at = time.time_ns()
            self.control.send(plan.restored(self))
        if known.get("health"):
            self._on_health_message({"status": known["health"]})
        if known.get("exit") and self._exit is None:
            self._on_exit_message(known["exit"])

    def _on_warmed_message(self, message: dict[str, Any]) -> None:
        """The agent has run a container of its own once: now a snapshot has in memory all that the next ones need."""
        if self._phase == "warming" and not self._killing:
            self.timings.mark("warm")
            self._phase = "captured"
            if not self._start.capture(self):
                self._send_plan()

    def _send_plan(self) -> None:
        """Tell the agent what to do; again, if its connection broke before it had read that."""
        self._phase = "planned"
        self._deadline = None
        self.control.send(plan.message(self))

    def _on_stage_message(self, message: dict[str, Any]) -> None:
        self.timings.guest(str(message.get("name"))[:80], float(message["uptime"]))

    def _on_started_message(self, message: dict[str, Any]) -> None:
        if self._phase == "planned":
            self.timings.mark("podman")
            self._run()

    def _on_ready_message(self, message: dict[str, Any]) -> None:
        if self._phase == "restored":
            self.timings.mark("identity")
            self._clock.was_set(self._restored_at)
            self.freezing.thawed()
            self._run()

    def _on_frozen_message(self, message: dict[str, Any]) -> None:
        self.freezing.answered(message)

    _on_thawed_message = _on_frozen_message

    def _on_clock_message(self, message: dict[str, Any]) -> None:
        self._clock.answered(message)

    def _run(self) -> None:
        """The container runs: it can be attached to."""
        self._deadline = None
        self._phase = "running"
        self.entry.update(status="running")
        self._attachable.set()
        self._on_started()

    def _on_health_message(self, message: dict[str, Any]) -> None:
        status = message.get("status")
        if status not in state.HEALTH:
            return
        self.entry.update(health=status)
        if status == "healthy" and self.running and not self._warmed:
            self._warmed = True
            self.ask({"op": "warm"})  # another snapshot may be under way at this moment

    def _on_exit_message(self, message: dict[str, Any]) -> None:
        self._exit = message
        self.entry.update(status="stopping", health="stopped")

    def _on_error_message(self, message: dict[str, Any]) -> None:
        raise AgentError(f"The guest agent failed: {message.get('message')}")

    # Requests

    def _on_ask(self) -> None:
        os.eventfd_read(self._asked)
        while self._asks:
            self._carry_out(self._asks.pop(0))
        if self._streams_broke is not None and self._exit is None and self._deadline is None:
            self._deadline = time.monotonic() + STREAMS_MARGIN

    def _on_request(self) -> None:
        try:
            connection, _ = self._requests.accept()
        except OSError as error:  # no descriptors left, perhaps not for long
            log.warning(f"{self.spec.name}: a request cannot be read: {error.strerror}")
            time.sleep(0.1)
            return
        connection.settimeout(5.0)
        try:
            request = rpc.receive(connection)
            if request.get("op") in ("stop", "kill"):
                self._waiting.append(connection)
                self._carry_out(request)
            else:
                rpc.answer(connection, operations.perform(self, request))
        except FcvmError as error:
            rpc.answer(connection, rpc.failure(error))
        except (OSError, ValueError) as error:
            rpc.answer(connection, {"error": f"The request cannot be carried out: {error}."})

    def _answer_waiting(self, reply: dict[str, Any]) -> None:
        for connection in self._waiting:
            rpc.answer(connection, reply)
        self._waiting.clear()

    def _carry_out(self, request: dict[str, Any]) -> None:
        if request["op"] in ("unreachable", "reachable"):
            self._refusals.note(request["ports"], loopback_only=request["op"] == "unreachable")
            self.entry.update(network=self._shown)
            return
        if request["op"] == "warm":
            if self.running and not self._stop_sent:
                warm.capture(self, self._start.warm)
            return
        if request["op"] == "kill" or self._phase in UNPLANNED:
            self._kill()
            return
        timeout = request.get("timeout")
        timeout = self.spec.stop_timeout if timeout is None else timeout
        self.entry.update(status="stopping")
        self.control.send({"type": "stop", "timeout": timeout})
        self._stop_sent = True
        self._deadline = time.monotonic() + timeout + STOP_MARGIN

    def _kill(self) -> None:
        """End the VM without asking the guest."""
        self._killing = True
        self.firecracker.process.kill()

    def _result(self, exit: dict[str, Any]) -> int:
        code = int(exit["code"])
        if self._streams_broke is not None and not self._killing:
            raise AgentError(
                f"The container ended with exit code {code}, but not all of its output could be read: {self._streams_broke}"
            )
        if exit.get("message"):
            if code in (125, 126, 127) and self._phase == "planned":
                raise ContainerError(str(exit["message"]), exit_code=code, hint=exit.get("hint"))
            log.warning(f"{exit['message']}{self.firecracker.console.quote(5)}")
        return code
