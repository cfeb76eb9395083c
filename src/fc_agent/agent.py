"""The guest agent of a microVM: takes the host's plan, runs its container, serves sessions, takes new identities."""

import contextlib
import importlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from fc_agent import exec as runtime
from fc_agent import freezer, identity, linux, nested, process, sockets, volumes, vsock
from fc_agent.container import Container, StartError
from fc_agent.control import Connect, Control, connect_vsock
from fc_agent.health import Monitor
from fc_agent.podman import IMAGES, PodmanError, Service
from fc_agent.protocol import SESSION_PORT, Identity, NetworkPlan, Plan, ProtocolError
from fc_agent.session import LaunchError, Process, Request, Server

MAIN = "main"  # the session of the container's own streams
GRACE = 30.0  # seconds that an exec session waits for its client to come back
IMAGE_DISK = "/dev/vdc"
LATER = ("http.client", "fuse_pipe.relay")  # modules that are imported when they are needed


def listen_vsock() -> socket.socket:
    """Where the host's clients of sessions connect."""
    return vsock.listen(SESSION_PORT)


class Agent:
    """Everything of one VM. ``run`` never returns."""

    def __init__(
        self, service: Service, *, connect: Connect = connect_vsock, listen: Callable[[], socket.socket] = listen_vsock
    ) -> None:
        """
        Arguments:
            connect, listen: how the host is reached and reaches us; vsock but in tests.
        """
        self._service = service
        self._control = Control(connect)
        self._server = Server(self._launch, GRACE)
        self._listener = listen()
        self._container: Container | None = None
        self._network: NetworkPlan | None = None
        self._planned = False
        self._machine_id: str | None = None  # of the last restore
        self._stopping: float | None = None  # asked to stop before the container ran: the timeout
        self._lock = threading.Lock()

    def run(self, begun: float | None = None) -> None:
        """Serve the host until it ends this system; ``begun`` is the uptime at which the kernel and the initrd were done."""
        if begun is not None:
            self._control.stage("kernel", begun)
        self._control.stage("agent")
        threading.Thread(target=self._server.serve, args=(self._listener,), daemon=True, name="sessions").start()
        sockets.destroy_connections()  # there are none, but now a snapshot has the kernel's module for it
        for message in self._control.messages():
            try:
                self._on_message(message)
            except Exception as error:
                sys.excepthook(*sys.exc_info())  # as traceback.print_exc, which is slow to import
                self._control.tell({"type": "error", "message": f"{type(error).__name__}: {error}"})

    def _on_message(self, message: dict[str, Any]) -> None:
        kind = message.get("type")
        if kind == "plan":
            self._on_plan(Plan.from_json(message))
        elif kind == "restored":
            self._on_restored(Identity.from_json(message.get("identity")))
        elif kind == "freeze":
            complete = freezer.freeze()
            self._control.tell({"type": "frozen", "complete": complete}, frozen=True)
        elif kind == "thaw":
            freezer.thaw()
            self._control.tell({"type": "thawed"}, frozen=False)
        elif kind == "clock":
            now = identity.adjust_clock(int(message.get("adjust_ns", 0)))
            self._control.tell({"type": "clock", "sent_ns": message.get("sent_ns"), "now_ns": now})
        elif kind == "warm":
            self._on_warm()
        elif kind == "stop":
            self._on_stop(float(message.get("timeout", 10)))
        elif kind == "kill":
            if self._container is not None:
                self._container.signal(int(message.get("signal", signal.SIGKILL)))
        elif kind == "shutdown":
            linux.reboot()
        else:
            raise ProtocolError(f"the host sent {kind!r}")

    def _on_plan(self, plan: Plan) -> None:
        if self._planned:
            return  # the host was not sure whether we had it
        self._planned = True
        identity.take(plan.identity, plan.network, restored=False)
        self._network = plan.network
        if plan.container is None:
            self._control.tell({"type": "ready"}, machine_id=plan.identity.machine_id)
            return
        self._control.tell(None, phase="starting")
        threading.Thread(target=self._run_container, args=(plan,), daemon=True, name="container").start()

    def _on_warm(self) -> None:
        """The host is about to take a boot snapshot: whatever we load now, nobody will wait for again."""
        try:
            self._service.warm()
        except (PodmanError, OSError) as error:
            linux.log(f"cannot warm up: {error}")  # the snapshot is only slower then
        for name in LATER:
            importlib.import_module(name)
        self._control.tell({"type": "warmed"})

    def _on_restored(self, new: Identity) -> None:
        if new.machine_id == self._machine_id:
            return  # the host was not sure whether we had it
        self._machine_id = new.machine_id
        network = new.network or self._network
        identity.take(new, network, restored=True)
        self._network = network
        if new.drop_sessions:
            self._server.abandon(keep=(MAIN,))
        freezer.thaw()
        self._control.tell({"type": "ready"}, machine_id=new.machine_id, frozen=False)

    def _on_stop(self, timeout: float) -> None:
        with self._lock:
            if self._container is None:
                self._stopping = timeout
                return
        self._container.stop(timeout)

    def _run_container(self, plan: Plan) -> None:
        try:
            code, oom, message = self._life(plan)
        except StartError as error:
            code, oom, message = error.code, False, error.message
        except (OSError, PodmanError, ProtocolError) as error:
            code, oom, message = 125, False, f"The guest agent failed: {error}"
        except Exception as error:
            sys.excepthook(*sys.exc_info())
            code, oom, message = 125, False, f"The guest agent failed: {error!r}"
        ended = {"code": code, "oom": oom, **({"message": message} if message else {})}
        self._control.tell({"type": "exit", **ended}, phase="exited", health="stopped", exit=ended)

    def _life(self, plan: Plan) -> tuple[int, bool, str | None]:
        assert plan.container is not None
        mount_images()
        volumes.mount_all(plan.volumes)
        if plan.nested:
            nested.prepare()
            self._control.stage("nested")
        self._control.stage("plan")
        container = Container(self._service, plan.container, plan.volumes)
        self._control.stage("create")
        self._server.adopt(MAIN, container.attached)
        try:
            container.start()
        except StartError as error:
            container.attached.finish(error.code, error.message)
            raise
        self._control.stage("start")
        self._service.rest()
        with self._lock:
            self._container = container
        started = {"type": "started", "container_id": container.id, "pid": container.pid}
        self._control.tell(started, phase="running", container_id=container.id, pid=container.pid)
        if self._stopping is not None:
            container.stop(self._stopping)
        monitor = Monitor(container, self._on_health)
        monitor.start()
        try:
            return container.wait()
        finally:
            monitor.stop()

    def _on_health(self, status: str, detail: str) -> None:
        self._control.tell(
            {"type": "health", "status": status, **({"detail": detail} if detail else {})}, health=status
        )

    def _launch(self, request: Request) -> Process:
        if request.target == "vm":
            with freezer.starting():
                started = process.launch(request)
                freezer.adopt(started.pid)
            runtime.unprotect(started.pid)
            return started
        if request.target != "container":
            raise LaunchError(f"There is no target {request.target!r}.")
        container = self._container
        if container is None:
            raise LaunchError("The container is not running.")
        return runtime.launch(container, request)


def mount_images() -> None:
    """Mount the image disk, where Podman looks for images."""
    if os.path.ismount(IMAGES):
        return
    failures = []
    for kind in ("erofs", "ext4"):
        try:
            linux.mount(IMAGE_DISK, IMAGES, kind, linux.MS_RDONLY | linux.MS_NODEV, "noload" if kind == "ext4" else "")
            return
        except OSError as error:
            failures.append(f"{kind}: {error.strerror}")
    with contextlib.suppress(OSError):
        size = os.stat(IMAGE_DISK).st_size
        failures.append(f"{size} bytes")
    raise OSError(f"the image disk cannot be mounted ({'; '.join(failures)})")
