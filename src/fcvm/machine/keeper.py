"""The process behind a running machine: it starts QEMU and serves it the host's files and the way to its sessions.

One keeper per machine, detached from the command that started it. QEMU is bound to it (SIGKILL when it ends, however
that happens) and it ends with QEMU, so nothing is left over and nothing runs twice. The two devices that it serves
have a thread each; the main thread waits for the control channel to the machine's PID 1 and for QEMU's end. SIGTERM
stops the machine properly.
"""

import contextlib
import faulthandler
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fc_agent.structs import Struct, fields, replace
from fcvm import host, process
from fcvm.errors import FcvmError, HostError, MachineError
from fcvm.linux import sockets
from fcvm.machine import addresses, hostfs, qemu, state
from fcvm.machine.ports import Ports
from fcvm.machine.qmp import Monitor
from fcvm.machine.state import Places, State
from fcvm.machine.vsock import Vsock
from fcvm.network.publish import Publish
from fcvm.signals import handled

START_TIME = 300.0  # seconds that a start may take on a very busy host
STOP_TIME = 40.0  # seconds that the machine gets to end its processes and power off; it needs fewer
LOCK_TIME = 10.0  # seconds
CLOCK_EVERY = 300.0  # seconds between two settings of the machine's clock
CONSOLE_LINES = 12

SESSION_PORT = 1024  # of virtio-vsock; fc_agent/machine.py


class Job(Struct):
    """What to run: sizes in MiB, ``boot`` from ``machine.boot_key``; descriptors inherited from the starter."""

    base: Path
    cpus: int
    memory: int
    disk: int
    kernel: Path
    initrd: Path
    root: Path
    kernel_arguments: str
    boot: str
    progress_fd: int
    starting_fd: int

    def to_json(self) -> str:
        return json.dumps({name: _plain(getattr(self, name)) for name in fields(self)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        paths = ("base", "kernel", "initrd", "root")
        values: dict[str, Any] = json.loads(text)
        parsed: dict[str, Any] = {name: Path(value) if name in paths else value for name, value in values.items()}
        return cls(**parsed)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class Stop(BaseException):
    """SIGTERM: stop the machine."""


def main() -> int:
    """Run the machine that the job in the first argument describes, until it ends."""
    job = Job.from_json(sys.argv[1])
    if os.fork():  # the starter waits for this process, and is nobody's parent afterwards
        os._exit(0)
    places = Places.of(job.base)
    own(places)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)  # shows in the log what every thread is at
    with handled((signal.SIGTERM, signal.SIGINT), _stop):
        return Keeper(job, places).run()


def own(places: Places) -> int:
    """Take the lock that says that a keeper lives. The starter has looked, and holds the other lock; those who look now have
    this one for a moment.

    Raises:
        BlockingIOError: there is another keeper all the same.
    """
    lock = os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + LOCK_TIME
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(lock)
                raise
            time.sleep(0.001)


def _stop(_number: int, _frame: object) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # once is enough
    raise Stop


class Keeper:
    """One machine, from its start to its end."""

    def __init__(self, job: Job, places: Places) -> None:
        self._job = job
        self._places = places
        self._state = State(
            "starting", pid=os.getpid(), since=time.time(), cpus=job.cpus, memory=job.memory, disk=job.disk, boot=job.boot
        )
        self._buffer = b""

    def run(self) -> int:
        """Start the machine, keep it, end it. Returns the exit code."""
        final = State("stopped", pid=os.getpid())
        with contextlib.ExitStack() as stack:
            try:
                self._start(stack)
                self._tell("running")
                self._finish_start()
                self._keep()
            except Stop:
                with contextlib.suppress(OSError):  # the disk is full
                    self._tell("stopping", "ending processes")
                self._shut_down()
            except Exception as error:
                self._say(f"error: {error}" if isinstance(error, FcvmError) else f"error: {traceback.format_exc()}")
                hint = getattr(error, "hint", None) or "fcvm machine logs"
                final = State("broken", pid=os.getpid(), since=time.time(), error=_sentence(error), hint=hint)
        self._end(final)  # QEMU is gone now, so what is said is true
        return 1 if final.error else 0

    def _end(self, final: State) -> None:
        """Leave nothing in the runtime directory, and the last word in the state."""
        with contextlib.suppress(OSError):
            for leftover in self._places.runtime.iterdir():
                leftover.unlink()
            self._places.runtime.rmdir()
        with contextlib.suppress(OSError):  # the disk is full; who looks sees that no keeper lives
            state.write(self._places, final)
        if final.error:
            self._progress({"error": final.error, "hint": final.hint})
        self._finish_start()

    # Telling

    def _tell(self, phase: "state.Phase", detail: str = "") -> None:
        self._state = replace(self._state, phase=phase, detail=detail)
        state.write(self._places, self._state)
        self._say(f"{phase} {detail}".strip())
        self._progress({"phase": phase, "detail": detail})

    def _progress(self, message: dict[str, str]) -> None:
        if self._job.progress_fd >= 0:
            with contextlib.suppress(OSError):  # the starter may be gone: the machine starts for whoever comes next
                os.write(self._job.progress_fd, json.dumps(message).encode() + b"\n")

    def _finish_start(self) -> None:
        """Let the starter and those who wait behind it go on."""
        progress, starting = self._job.progress_fd, self._job.starting_fd
        self._job = replace(self._job, progress_fd=-1, starting_fd=-1)  # before a Stop can come in between
        if progress >= 0:
            os.close(progress)
            fcntl.flock(starting, fcntl.LOCK_UN)
            os.close(starting)

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)

    # Starting

    def _start(self, stack: contextlib.ExitStack) -> None:
        self._tell("starting", "preparing")
        deadline = time.monotonic() + START_TIME
        make_disk(self._places.disk, self._job.disk)
        self._start_qemu(stack)
        self._tell("starting", "booting")
        self._wait_for_boot(deadline)
        self._set_clock()

    def _start_qemu(self, stack: contextlib.ExitStack) -> None:
        pairs = [socket.socketpair() for _ in range(4)]
        self._control, monitor, files, connections = (ours for ours, _ in pairs)
        fds = control_fd, qmp_fd, hostfs_fd, vsock_fd = tuple(theirs.fileno() for _, theirs in pairs)
        self._places.oem.write_text(self._oem())
        spec = qemu.Spec(
            cpus=self._job.cpus,
            memory=self._job.memory,
            kernel=self._job.kernel,
            initrd=self._job.initrd,
            root=self._job.root,
            disk=self._places.disk,
            oem=self._places.oem,
            console=self._places.console,
            control_fd=control_fd,
            qmp_fd=qmp_fd,
            hostfs_fd=hostfs_fd,
            vsock_fd=vsock_fd,
            kernel_arguments=self._job.kernel_arguments,
        )
        self._qemu = process.spawn(
            qemu.command(spec, qemu.find()[0]),
            stdout=sys.stderr,
            stderr=sys.stderr,
            cwd="/",
            pass_fds=fds,
        )
        stack.callback(_end_process, self._qemu)
        for _, theirs in pairs:
            theirs.close()
        self._qemu_fd = os.pidfd_open(self._qemu.pid)
        self._state = replace(self._state, qemu_pid=self._qemu.pid)
        self._ports = Ports(Monitor(monitor))
        stack.callback(self._ports.close)
        vsock = Vsock(connections, sockets.listen(self._places.session), SESSION_PORT)
        for name, serve in (("hostfs", lambda: hostfs.serve_host(files)), ("vsock", vsock.serve)):
            threading.Thread(target=self._serve_device, args=(name, serve), daemon=True, name=name).start()

    def _serve_device(self, name: str, serve: Callable[[], None]) -> None:
        """Serve a device; without it the machine is useless, so a failure ends it."""
        try:
            serve()
        except Exception:
            self._say(f"error: the device {name} failed\n{traceback.format_exc()}")
            self._qemu.kill()

    def _oem(self) -> str:
        """What the machine is told at its start; see fc_agent/machine.py."""
        user = None
        if os.geteuid() != 0:
            user = {"name": host.user_name(), "uid": os.geteuid(), "gid": os.getegid()}
        configuration = {
            "hostname": "fcvm-machine",
            "address": addresses.ADDRESS,
            "prefix": addresses.PREFIX,
            "gateway": addresses.GATEWAY,
            "dns": addresses.DNS,
            "user": user,
        }
        return f"fcvm:{json.dumps(configuration)}"

    def _wait_for_boot(self, deadline: float) -> None:
        while True:
            for message in self._receive(deadline):
                if message["type"] == "broken":
                    self._send({"type": "shutdown"})
                    raise MachineError(
                        f"The machine cannot start: {message['message']}.",
                        hint="fcvm machine logs; fcvm machine rm makes a new one (its VMs and snapshots are lost)",
                    )
                if message["type"] == "phase":
                    self._say(f"machine: {message['name']} at {message['uptime']:.2f} s")
                    if message["name"] == "ready":
                        return

    def _receive(self, deadline: float) -> list[dict[str, Any]]:
        """The control messages that have come, waited for until ``deadline``. Raises MachineError: QEMU ended, or late."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._qemu_fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        if self._control.fileno() in ready:
            data = self._control.recv(65536)
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            if data:
                return [json.loads(line) for line in lines]
        if self._qemu_fd in ready or self._control.fileno() in ready:
            raise self._died()
        raise MachineError(f"The machine did not start within {START_TIME:.0f} seconds.{self._last_words()}")

    def _died(self) -> MachineError:
        code = self._qemu.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return MachineError(f"QEMU {how}.{self._last_words()}", hint="fcvm machine logs")

    def _last_words(self) -> str:
        try:
            lines = self._places.console.read_text(errors="replace").splitlines()[-CONSOLE_LINES:]
        except OSError:
            lines = []
        return "".join(f"\n  {line}" for line in ["The end of its console:", *lines]) if lines else ""

    # Running

    def _keep(self) -> None:
        """Serve the machine until QEMU ends. Raises MachineError: it ended by itself."""
        poll = select.poll()
        for fd in (self._control.fileno(), self._qemu_fd):
            poll.register(fd, select.POLLIN)
        clock = time.monotonic() + CLOCK_EVERY
        while True:
            ready = {fd for fd, _ in poll.poll(max(0.0, clock - time.monotonic()) * 1000)}
            if time.monotonic() >= clock:
                clock = time.monotonic() + CLOCK_EVERY
                self._set_clock()
            if self._control.fileno() in ready:
                for message in self._receive(time.monotonic()):
                    self._on_message(message)
            elif self._qemu_fd in ready:
                raise self._died()

    def _on_message(self, message: dict[str, Any]) -> None:
        number = int(message.get("id", 0))
        if message["type"] == "publish":
            self._send({"type": "published", "id": number, **self._publish(number, message)})
        elif message["type"] == "unpublish":
            try:
                self._ports.withdraw(number)
            except FcvmError as error:
                self._say(f"error: a port stays published: {error}")

    def _publish(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        """Publish a port; the answer. Any process in the machine may ask."""
        try:
            wanted = Publish(message["host_ip"], message["host_port"], message["port"], message["protocol"])
            return {"host_port": self._ports.publish(number, wanted)}
        except FcvmError as error:
            return {"error": error.message, "hint": error.hint}
        except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
            return {"error": f"The port cannot be published: {error!r}.", "hint": None}

    def _set_clock(self) -> None:
        self._send({"type": "time", "seconds": time.time()})

    def _send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # QEMU is ending; its pidfd says so
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def _shut_down(self) -> None:
        """Ask the machine to power off; the exit stack kills QEMU if it does not."""
        if hasattr(self, "_qemu_fd"):
            self._send({"type": "shutdown"})
            select.select([self._qemu_fd], [], [], STOP_TIME)


def _end_process(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


def _sentence(error: BaseException) -> str:
    return error.message if isinstance(error, FcvmError) else f"The machine's keeper failed: {error!r}."


def make_disk(path: Path, size: int) -> None:
    """Make the sparse data disk of ``size`` MiB, or grow it; it never shrinks. Raises HostError: no space, no right."""
    try:
        if not path.exists():
            temporary = path.with_suffix(".creating")
            with open(temporary, "wb") as disk:
                disk.truncate(size << 20)
            os.replace(temporary, path)
        elif path.stat().st_size < size << 20:
            os.truncate(path, size << 20)
    except OSError as error:
        raise HostError(f"The machine's disk {path} cannot be made: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
