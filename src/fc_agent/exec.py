"""Runs a further process in the container: straight through the OCI runtime, ``crun exec``.

The process description is the container's own (``config.json``, OCI runtime specification) with the request's changes. With a
terminal, crun sends its master over a Unix socket (``--console-socket``).
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Any

from fc_agent import freezer, linux
from fc_agent.container import Container
from fc_agent.failures import explain
from fc_agent.jsontext import dumps
from fc_agent.process import TO_GROUP, LocalProcess, exit_code, kill_session, set_size
from fc_agent.session import LaunchError, Request

DIRECTORY = "/run/fcvm/exec"
CRUN = "/usr/bin/crun"
CRUN_FAILED = 255  # its exit code if the process never ran; a process may say the same, but then it had a pid

CAPABILITIES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
)


Read = Callable[[], list[tuple[int, bytes]] | None]


class ContainerProcess(LocalProcess):
    """``crun exec`` in the foreground; its child in the container is what signals are for."""

    def __init__(self, popen: subprocess.Popen[bytes], terminal: int | None, base: str) -> None:
        super().__init__(popen, terminal)
        self._base = base
        self._runs = False
        self._ended = select.poll()
        self._ended.register(self.ended, select.POLLIN)
        self.outputs = {descriptor: self._unless_failed(read) for descriptor, read in self.outputs.items()}

    def _unless_failed(self, read: Read) -> Read:
        """``read``, without what crun itself prints when it cannot start the process: that is the exit's message.

        Who has printed the first bytes shows a moment later: crun writes a pid file, or it ends.
        """
        held: list[tuple[int, bytes]] = []

        def read_unless_failed() -> list[tuple[int, bytes]] | None:
            pieces = read()
            if self._runs:
                return pieces
            if pieces is not None and not pieces:
                return pieces
            held.extend(pieces or [])
            while not (begun := self._inner() is not None) and not self._ended.poll(1):
                pass
            self._runs = begun or self._inner() is not None or self.popen.wait() != CRUN_FAILED
            if not self._runs or not held:
                return None if pieces is None else []
            shown, held[:] = list(held), []
            return shown

        return read_unless_failed

    def begun(self) -> bool:
        """Whether crun has done its part: what it was to start runs, or has ended."""
        return self._inner() is not None or bool(self._ended.poll(0))

    def _inner(self) -> int | None:
        """The process's id, once crun has started it."""
        try:
            with open(f"{self._base}.pid") as file:
                return int(file.read())
        except (OSError, ValueError):
            return None

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            inner = self._inner()
            if inner is not None and number in TO_GROUP and os.getpgid(inner) == inner:
                os.killpg(inner, number)
            else:
                os.kill(inner or self.pid, number)

    def kill(self) -> None:
        inner = self._inner()
        if inner is not None:
            kill_session(inner)
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def exit(self) -> tuple[int, str | None]:
        code = exit_code(self.popen.wait())
        if self._inner() is None and code == CRUN_FAILED:
            message = failure(f"{self._base}.log")
            return runtime_code(message), explain(message)
        return code, None

    def close(self) -> None:
        freezer.forget(self.begun)
        super().close()
        _remove(self._base)


def launch(container: Container, request: Request) -> ContainerProcess:
    """Start ``request.argv`` in a running container.

    Raises:
        LaunchError: unknown user, or the runtime failed before it could start anything.
    """
    if not request.argv:
        raise LaunchError("No command is given.")
    with freezer.starting():
        started = _start(container, request)
        freezer.expect(started.begun)
    return started


def _start(container: Container, request: Request) -> ContainerProcess:
    os.makedirs(DIRECTORY, exist_ok=True)
    base = f"{DIRECTORY}/{os.urandom(8).hex()}"
    try:
        with open(f"{base}.json", "w") as file:
            file.write(dumps(process(container, request)))
        return _execute(container, base, request)
    except BaseException:
        _remove(base)
        raise


def _remove(base: str) -> None:
    """Remove what was written for one process: the files lie in memory."""
    for suffix in ("json", "pid", "log", "sock"):
        with contextlib.suppress(OSError):
            os.unlink(f"{base}.{suffix}")


def _execute(container: Container, base: str, request: Request) -> ContainerProcess:
    command = [
        CRUN,
        f"--log={base}.log",
        "--log-format=json",
        "exec",
        f"--process={base}.json",
        f"--pid-file={base}.pid",
    ]
    try:
        if request.tty:
            return _with_terminal(command, container.id, base, request)
        popen = subprocess.Popen(
            [*command, container.id],
            stdin=subprocess.PIPE if request.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except OSError as error:
        raise LaunchError(f"The container runtime cannot be started: {error}.") from error
    unprotect(popen.pid)
    return ContainerProcess(popen, None, base)


def _with_terminal(command: list[str], container: str, base: str, request: Request) -> ContainerProcess:
    path = f"{base}.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        popen = subprocess.Popen(
            [*command, f"--console-socket={path}", container],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        unprotect(popen.pid)
        pidfd = os.pidfd_open(popen.pid)
        try:
            poll = select.poll()
            poll.register(listener, select.POLLIN)
            poll.register(pidfd, select.POLLIN)
            if listener.fileno() not in {descriptor for descriptor, _ in poll.poll()}:
                popen.wait()
                message = failure(f"{base}.log")
                raise LaunchError(explain(message), runtime_code(message))
            connection, _ = listener.accept()
            with connection:
                _, descriptors, _, _ = socket.recv_fds(connection, 4096, 1)
        finally:
            os.close(pidfd)
            os.unlink(path)
    if not descriptors:
        popen.kill()
        popen.wait()
        raise LaunchError("The container runtime gave no terminal.")
    set_size(descriptors[0], request.rows, request.columns)
    return ContainerProcess(popen, descriptors[0], base)


def unprotect(pid: int) -> None:
    """A child does not keep the agent's own protection from the out-of-memory killer."""
    with contextlib.suppress(OSError):
        linux.write(f"/proc/{pid}/oom_score_adj", "0")


def process(container: Container, request: Request) -> dict[str, Any]:
    """The ``process`` object of the OCI runtime specification for a request.

    Raises:
        LaunchError: the container is gone, or has no such user.
    """
    try:
        with open(f"{container.directory}/config.json") as file:
            value: dict[str, Any] = json.load(file)["process"]
    except (OSError, ValueError, KeyError) as error:
        raise LaunchError("The container is not running.") from error
    env = dict(entry.partition("=")[::2] for entry in value.get("env", []))
    if env.get("HOSTNAME") == container.hostname and "HOSTNAME" not in (container.plan.env or {}):  # Podman's, not the image's
        env["HOSTNAME"] = socket.gethostname()
    if request.user is not None:
        user, home = find_user(f"/proc/{container.pid}/root", request.user)
        value["user"] = {"umask": value.get("user", {}).get("umask", 0o22), **user}
        env["HOME"] = home
    if request.tty:
        env.setdefault("TERM", "xterm")
        value["consoleSize"] = {"height": request.rows, "width": request.columns}
    env.update(request.env)
    capabilities = list(value.get("capabilities", {}).get("bounding", []))
    if request.privileged:
        capabilities = all_capabilities()
    sets = ("bounding", "effective", "permitted") if value["user"]["uid"] == 0 or request.privileged else ("bounding",)
    value["capabilities"] = dict.fromkeys(sets, capabilities)
    value["args"] = request.argv
    value["env"] = [f"{name}={text}" for name, text in env.items()]
    value["cwd"] = request.cwd or value.get("cwd") or "/"
    value["terminal"] = request.tty
    return value


def all_capabilities() -> list[str]:
    """The names of all capabilities that this system has to give (our bounding set, proc(5))."""
    with open("/proc/self/status") as file:
        bounding = next(int(line.split()[1], 16) for line in file if line.startswith("CapBnd:"))
    return [f"CAP_{name}" for bit, name in enumerate(CAPABILITIES.split()) if bounding >> bit & 1]


def find_user(root: str, text: str) -> tuple[dict[str, Any], str]:
    """A user as the container knows it: ``({"uid", "gid", "additionalGids"}, home)`` for ``USER[:GROUP]``.

    Raises:
        LaunchError: a name that is not in the container's /etc/passwd or /etc/group.
    """
    name, _, group = text.partition(":")
    users = _table(root, "/etc/passwd", 7)
    groups = _table(root, "/etc/group", 4)
    found = next((u for u in users if u[0] == name or (name.isdigit() and u[2] == name)), None)
    if found is None and not name.isdigit():
        raise LaunchError(f"There is no user {name} in the container.")
    uid = int(found[2]) if found else int(name)
    gid = int(found[3]) if found else 0
    further = [int(g[2]) for g in groups if found and found[0] in g[3].split(",")]
    if group:
        match = next((g for g in groups if g[0] == group), None)
        if match is None and not group.isdigit():
            raise LaunchError(f"There is no group {group} in the container.")
        gid = int(match[2]) if match else int(group)
        further = []
    additional = sorted({gid, *further})
    return {"uid": uid, "gid": gid, "additionalGids": additional}, found[5] if found and found[5] else "/"


def _table(root: str, path: str, columns: int) -> list[list[str]]:
    try:
        with open(linux.open_in_root(root, path), errors="replace") as file:
            rows = [line.rstrip("\n").split(":") for line in file.read(4 << 20).splitlines()]
    except OSError:
        return []
    return [row for row in rows if len(row) >= columns and row[2].isdigit() and (columns < 7 or row[3].isdigit())]


def failure(log: str) -> str:
    """What crun said of its failure."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError), open(log) as file:
        return str(json.loads(file.read().strip().splitlines()[-1])["msg"])
    return "The container runtime failed."


def runtime_code(message: str) -> int:
    """The exit code that Podman gives such a failure of its runtime: 127 not found, 126 cannot be executed."""
    text = message.lower()
    return 127 if "not found" in text or "no such file" in text else 126
