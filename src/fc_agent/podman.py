"""Podman as a service: `podman system service`, its configuration, and its REST API (libpod).

The service is started before anybody knows what shall run, so that a boot snapshot has it warm. It reads the image store
at ``IMAGES`` whenever it is asked, so the image disk may be mounted later. Once the container runs, it stands still between
requests.
"""

import os
import signal
import socket
import threading
from contextlib import suppress

from fc_agent import linux

TYPE_CHECKING = False
if TYPE_CHECKING:  # starting the service comes first; what takes time to import comes later
    from typing import Any

DIRECTORY = "/run/fcvm"
IMAGES = "/images"
STORAGE = "/var/lib/containers/storage"  # the scratch disk's ext4: overlay cannot be stacked on the overlay root
RUN = "/run/containers/storage"
API = "/v5.0.0/libpod"

# transient_store: what Podman knows of containers is kept on /run, and nothing is synced: it ends with the VM. Its database on
# the disk took 1.3 of 2.9 emulated seconds until the service answered.
STORAGE_CONF = f"""\
[storage]
driver = "overlay"
graphroot = "{STORAGE}"
runroot = "{RUN}"
transient_store = true
[storage.options]
additionalimagestores = ["{IMAGES}"]
"""

# Output is taken from conmon's socket as it comes, so no log of it is kept here.
CONTAINERS_CONF = """\
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "crun"
[containers]
log_driver = "none"
[network]
network_backend = "netavark"
"""

POLICY = '{"default": [{"type": "insecureAcceptAnything"}]}\n'

# DISABLE_HC_SYSTEMD: health checks are ours; Podman would ask systemd for timers. GOGC and GOMEMLIMIT (Go's runtime package,
# "Environment Variables"): no garbage collection before it is worth it, which is a third of the time of a start; and a
# collection in a clone would write to pages that it shares. GOMAXPROCS: what we ask of it comes one by one, and one thread that
# runs at a time need not wake others: a fourth less CPU time for a container under emulation, no more or less natively.
ENVIRONMENT = {"DISABLE_HC_SYSTEMD": "true", "GOGC": "off", "GOMEMLIMIT": "64MiB", "GOMAXPROCS": "1"}

# LISTEN_PID must be the service's own: sd_listen_fds(3). The shell's becomes that by exec.
START = "LISTEN_PID=$$ LISTEN_FDS=1 exec podman system service --time=0"


class PodmanError(Exception):
    """Podman refused; ``message`` is its own, ``status`` the one of HTTP."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Service:
    """A running `podman system service`. It is started again if it dies."""

    def __init__(self) -> None:
        os.makedirs(DIRECTORY, exist_ok=True)
        os.makedirs(IMAGES, exist_ok=True)
        os.makedirs("/etc/containers", exist_ok=True)
        linux.write("/etc/containers/storage.conf", STORAGE_CONF)
        linux.write("/etc/containers/containers.conf", CONTAINERS_CONF)
        if not os.path.exists("/etc/containers/policy.json"):
            linux.write("/etc/containers/policy.json", POLICY)
        self.path = f"{DIRECTORY}/podman.sock"
        self._requests = 0  # under way
        self._resting = False
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._spawn()
        threading.Thread(target=self._keep, daemon=True, name="podman").start()

    def _spawn(self) -> None:
        actions: list[tuple[object, ...]] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, self._listener.fileno(), 3),
        ]
        self._pid = os.posix_spawn("/bin/sh", ["sh", "-c", START], {**os.environ, **ENVIRONMENT}, file_actions=actions, setpgroup=0)
        linux.write(f"/proc/{self._pid}/oom_score_adj", "0")
        self._pidfd = os.pidfd_open(self._pid)

    def _keep(self) -> None:
        while True:
            _, status = os.waitpid(self._pid, 0)
            linux.log(f"podman's service ended ({os.waitstatus_to_exitcode(status)}); it is started again")
            with self._lock:
                os.close(self._pidfd)
                self._spawn()

    def rest(self) -> None:
        """From now on let it run for requests only, and stop it in between.

        It looks for events of images ten times a second (``libimageEvents``, libpod/events.go), and Go's scheduler wakes up
        with it: a guest that does nothing woke 70 times a second, and 10 without; emulated, it took 9.5 and 0.9 % of a CPU.
        """
        with self._lock:
            self._resting = True
            if not self._requests:
                self._signal(signal.SIGSTOP)

    def _begin(self) -> None:
        with self._lock:
            self._requests += 1
            if self._resting:
                self._signal(signal.SIGCONT)

    def _end(self) -> None:
        with self._lock:
            self._requests -= 1
            if self._resting and not self._requests:
                self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has died: the next one starts
            signal.pidfd_send_signal(self._pidfd, number)

    def request(self, method: str, path: str, body: object = None, *, timeout: float = 300) -> "Any":
        """One request of the libpod API; returns the decoded answer. The first waits until the service has started.

        Raises:
            PodmanError: Podman refused, or did not answer within ``timeout`` seconds.
        """
        import json

        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {API}{path} HTTP/1.0\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        answer = bytearray()
        self._begin()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(timeout)
                connection.connect(self.path)
                connection.sendall(head.encode() + content)
                while data := connection.recv(1 << 16):
                    answer += data
        except OSError as error:
            raise PodmanError(f"Podman's service does not answer: {error}.") from error
        finally:
            self._end()
        top, _, text = bytes(answer).partition(b"\r\n\r\n")
        try:
            status = int(top.split(b" ", 2)[1])
            value = json.loads(text) if text.strip() else None
        except (IndexError, ValueError) as error:
            raise PodmanError(f"Podman's service answered {bytes(answer[:80])!r}.") from error
        if status >= 400:
            message = value.get("message") if isinstance(value, dict) else None
            raise PodmanError(str(message or f"Podman answered {status}."), status)
        return value

    def warm(self) -> None:
        """Run a container to its end and remove it, so that a snapshot has everything loaded that the next will need.

        Raises:
            PodmanError, OSError: it does not run; nothing of it is left.
        """
        import shutil

        root, name = f"{DIRECTORY}/warm", "fcvm-warm"
        os.makedirs(f"{root}/bin", exist_ok=True)
        try:
            shutil.copy("/bin/busybox", f"{root}/bin/true")
            specification = {"rootfs": root, "name": name, "command": ["/bin/true"], "netns": {"nsmode": "host"}}
            identifier = self.request("POST", "/containers/create", specification)["Id"]
            self.request("POST", f"/containers/{identifier}/init")
            self.request("POST", f"/containers/{identifier}/start")
            self.request("POST", f"/containers/{identifier}/wait?condition=exited")
        finally:
            with suppress(PodmanError):
                self.request("DELETE", f"/containers/{name}?force=true&timeout=0")
            shutil.rmtree(root, ignore_errors=True)


def escape(name: str) -> str:
    """A name for a URL's path."""
    from urllib.parse import quote

    return quote(name, safe="")
