"""The one container of a VM: made by Podman from the plan, started, watched to its end."""

import contextlib
import os
import select
import signal
import socket
import threading
from typing import Any

from fc_agent import linux, network, podman
from fc_agent.attach import Attached
from fc_agent.failures import explain
from fc_agent.podman import PodmanError, Service, escape
from fc_agent.process import set_size
from fc_agent.protocol import ContainerPlan, VolumePlan

EXITS = "/run/libpod/persist"  # conmon leaves ``<id>/exit`` and ``<id>/oom`` here (its --persist-dir)
VOLUMES = "/run/fcvm/volumes"
KILLED = 137  # exit code of a container that was killed: 128 + SIGKILL


class StartError(Exception):
    """The container cannot run; ``code`` is Podman's: 125, 126 (cannot be executed) or 127 (not found)."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Container:
    """A container from its creation to its exit code. Its directory holds conmon's sockets and the runtime's bundle."""

    def __init__(self, service: Service, plan: ContainerPlan, volumes: list[VolumePlan]) -> None:
        """Create it; nothing of it runs yet.

        Raises:
            StartError: Podman refuses it.
        """
        self._service = service
        self.plan = plan
        self.hostname = socket.gethostname()  # the name that the VM has now; in a clone that of its source
        try:
            answer = service.request("POST", "/containers/create", specification(plan, volumes))
            self.id = str(answer["Id"])
        except PodmanError as error:
            raise StartError(error.message, 125) from error
        try:
            service.request("POST", f"/containers/{self.id}/init")
        except PodmanError as error:
            raise StartError(explain(error.message), start_code(error.message)) from error
        self.directory = f"{podman.RUN}/overlay-containers/{self.id}/userdata"
        self.pid = _read_number(f"{self.directory}/pidfile")
        self._conmon = os.pidfd_open(_read_number(f"{self.directory}/conmon.pid"))
        self._pidfd = os.pidfd_open(self.pid)
        self._events = linux.inotify(f"{EXITS}/{self.id}", linux.IN_CREATE | linux.IN_MOVED_TO)
        self.attached = Attached(self.directory, self.pid, tty=plan.tty, stdin=plan.stdin)
        if plan.tty:
            self._set_first_size(plan.rows, plan.columns)
        self._kill_timer: threading.Timer | None = None
        self._oom_kills = oom_kills()

    def _set_first_size(self, rows: int, columns: int) -> None:
        """Give its terminal a size before it runs: conmon, which sets later ones, may get round to that only when it does."""
        with contextlib.suppress(OSError):  # it has ended
            terminal = os.open(f"/proc/{self.pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            set_size(terminal, rows, columns)
            os.close(terminal)

    def start(self) -> None:
        """Let it run.

        Raises:
            StartError: the runtime cannot execute its command.
        """
        try:
            self._service.request("POST", f"/containers/{self.id}/start")
        except PodmanError as error:
            raise StartError(explain(error.message), start_code(error.message)) from error

    def wait(self) -> tuple[int, bool, str | None]:
        """Wait for its end: ``(exit code, whether it ran out of memory, message)``."""
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        poll.register(self._conmon, select.POLLIN)
        result = f"{EXITS}/{self.id}/exit"
        message = None
        while not os.path.exists(result):
            if self._conmon in {descriptor for descriptor, _ in poll.poll()} and not os.path.exists(result):
                message = "The container's monitor died."
                break
            with contextlib.suppress(BlockingIOError):
                os.read(self._events, 4096)
        code = KILLED if message else _read_number(result)
        oom = any(os.path.exists(f"{place}/oom") for place in (f"{EXITS}/{self.id}", self.directory))
        if code == KILLED and oom_kills() > self._oom_kills:
            oom = True
        if message is None:
            message = why(code, oom)
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self.attached.finish(code, message)
        return code, oom, message

    def image(self) -> dict[str, Any]:
        """What the image says of itself: stop signal, health check."""
        image = self._service.request("GET", f"/images/{escape(self.plan.image)}/json")
        return image if isinstance(image, dict) else {}

    def signal(self, number: int) -> None:
        """Send a signal to the container's first process; one that has ended is no error."""
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, number)

    def stop(self, timeout: float) -> None:
        """Send the stop signal, and SIGKILL after ``timeout`` seconds."""
        if self._kill_timer is not None:  # a second, shorter wish counts
            self._kill_timer.cancel()
        self._kill_timer = threading.Timer(timeout, self.signal, (signal.SIGKILL,))
        self._kill_timer.daemon = True
        self._kill_timer.start()
        self.signal(self._stop_signal())

    def _stop_signal(self) -> int:
        name = self.plan.stop_signal
        if name is None:
            with contextlib.suppress(PodmanError):
                name = (self.image().get("Config") or {}).get("StopSignal")
        return signal_number(name or "SIGTERM")


def specification(plan: ContainerPlan, volumes: list[VolumePlan]) -> dict[str, Any]:
    """The container as libpod's API takes it (its SpecGenerator); what is None is the image's own.

    It has the guest's own network and host name: the VM is its sandbox, and a clone's new identity reaches it.
    """
    taken = {volume.path for volume in volumes}
    mounts: list[dict[str, Any]] = []
    for source in (network.HOSTS, network.RESOLV_CONF, network.HOSTNAME):
        if (target := f"/etc/{os.path.basename(source)}") not in taken:
            mounts.append({"Type": "bind", "Source": source, "Destination": target, "Options": ["rbind"]})
    for index, volume in enumerate(volumes):
        options = ["rbind", "rslave", "ro" if volume.read_only else "rw"]
        mounts.append({"Type": "bind", "Source": f"{VOLUMES}/{index}", "Destination": volume.path, "Options": options})
    value: dict[str, Any] = {
        "image": plan.image,
        "name": plan.name,
        "entrypoint": plan.entrypoint,
        "command": plan.command,
        "env": plan.env,
        "user": plan.user,
        "work_dir": plan.workdir,
        "privileged": plan.privileged,
        "labels": plan.labels,
        "terminal": plan.tty,
        "stdin": plan.stdin,
        "netns": {"nsmode": "host"},
        "utsns": {"nsmode": "host"},
        "mounts": mounts,
        "healthconfig": {"Test": ["NONE"]},
        "httpproxy": False,
    }
    if plan.entrypoint is not None and plan.command is None:
        value["command"] = []  # as Podman: another entrypoint does not get the image's arguments
    return {name: content for name, content in value.items() if content is not None}


def start_code(message: str) -> int:
    """Podman's exit code for a container that was made but does not start (libpod/define/exec_codes.go)."""
    text = message.lower()
    if "not found" in text or "no such file" in text:
        return 127
    return 126


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, in the whole VM (/proc/vmstat)."""
    with open("/proc/vmstat") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)


def why(code: int, oom: bool) -> str | None:
    """What the user should know about a container that ended badly; None if its exit code says it all."""
    if oom:
        what = "The container" if code == KILLED else "A process of the container"
        return f"{what} was killed because the VM had no memory left."
    with contextlib.suppress(OSError):
        disk = os.statvfs(podman.STORAGE)
        if code != 0 and (disk.f_bavail * 1000 < disk.f_blocks or not disk.f_favail):
            return "The VM's disk is full."
    return None


def signal_number(name: str) -> int:
    """``SIGTERM``, ``TERM``, ``15``, ``RTMIN+3`` and ``RTMAX-3`` are signals; anything else is SIGTERM: some signal has to stop it."""
    word = str(name).upper().removeprefix("SIG")
    base, sign, offset = word.partition("-" if "-" in word else "+")
    with contextlib.suppress(KeyError, ValueError):
        further = int(sign + offset) if base.startswith("RT") and offset else 0
        number = int(word) if word.isdigit() else signal.Signals[f"SIG{base}"] + further
        if number in signal.valid_signals():
            return number
    return signal.SIGTERM


def _read_number(path: str) -> int:
    with open(path) as file:
        return int(file.read().strip())
