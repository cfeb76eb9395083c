"""A Firecracker process: started in a VM's directory, bound to us, its console read into a file.

Firecracker's working directory is the VM's directory and every path it is given is relative to it, so that a snapshot
holds no absolute path. Its stdout carries its own log and the guest's serial console; a pipe nobody reads would fill
and hang its API, so a thread reads it from the first byte on.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from fcvm import host
from fcvm.errors import FirecrackerError
from fcvm.firecracker.api import Api
from fcvm.linux.leash import Leash
from fcvm.linux.namespaces import Namespace, in_thread
from fcvm.process import spawn
from fcvm.storage.rotating import RotatingFile

API_SOCKET = "firecracker.sock"
VSOCK = "vsock.sock"
CONSOLE = "console.log"
QUOTE = " The last console lines:"  # begins a quotation of it
CONSOLE_LIMIT = 4 << 20  # bytes kept, twice: the current file and the one before
API_TIMEOUT = 60.0  # seconds for one call
START_TIMEOUT = 60.0  # seconds until the API answers; natively it takes under one millisecond
LOOK = 0.0001  # seconds between two looks whether it does


class Firecracker:
    """A running VMM; use it as a context manager: leaving kills and reaps it.

    Attributes:
        api: the connection to its API.
        pid: its process id.
        pidfd: readable when it has ended, however it ended.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        vm_id: str,
        *,
        namespace: Namespace | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        """Start ``binary`` in ``directory`` and wait until its API answers.

        Arguments:
            namespace: the network namespace that it is to be in; None: ours.
            arguments: more words for its command line (``--firecracker-args``).

        Raises:
            FirecrackerError: it ended instead, with what it printed.
        """
        self.directory = directory
        self.pidfd = -1
        (directory / API_SOCKET).unlink(missing_ok=True)
        command: list[str | Path] = [binary, "--api-sock", API_SOCKET, "--id", vm_id, "--level", "Warn", *arguments]
        with contextlib.ExitStack() as undo:
            self._leash = Leash()
            undo.callback(self._leash.close)
            self.console = Console(directory / CONSOLE)
            undo.callback(self.console.join)
            with self.console.follow() as output:
                self.process = _spawn(command, directory, output, self._leash, namespace)
            undo.callback(self.kill)
            self.pid = self.process.pid
            self.pidfd = os.pidfd_open(self.pid)
            self.api = self._connect()
            undo.pop_all()

    def _connect(self) -> Api:
        """Try until the API answers, ever more slowly.

        Nothing can be waited for but inotify, and to close its descriptor the kernel waits until every CPU has been
        idle or in user space: 13 ms on a busy host, more than all the rest of a clone.
        """
        begin = time.monotonic()
        while True:
            try:
                return Api(self.directory / API_SOCKET, timeout=host.patience(API_TIMEOUT))
            except (FileNotFoundError, ConnectionRefusedError):
                passed = time.monotonic() - begin
            if self.ended() or passed > host.patience(START_TIMEOUT):
                raise self._not_started()
            time.sleep(max(LOOK, passed / 10))

    def _not_started(self) -> FirecrackerError:
        self.process.kill()
        self.console.join()
        return FirecrackerError(f"Firecracker did not start.{self.console.quote()}", hint="fcvm doctor")

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """End it at once and reap it; safe to call again."""
        if getattr(self, "api", None) is not None:
            self.api.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self._leash.close()
        self.console.join()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> "Firecracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _spawn(
    command: Sequence[str | Path], directory: Path, output: int, leash: Leash, namespace: Namespace | None
) -> subprocess.Popen[bytes]:
    """Start Firecracker on a leash. Only a user namespace has to be entered by the child itself, which costs a fork."""

    def start(setup: Callable[[], None] | None = None) -> subprocess.Popen[bytes]:
        child = spawn(
            command,
            cwd=directory,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(leash.end,),
            bound=False,
            setup=setup,
        )
        leash.tie(child.pid)
        return child

    def start_inside(namespace: Namespace) -> subprocess.Popen[bytes]:
        namespace.enter()
        return start()

    if namespace is None:
        return start()
    if namespace.user is None:
        return in_thread(partial(start_inside, namespace))
    return start(namespace.enter)


class Console:
    """The guest's serial console and Firecracker's own log, kept in a size-limited file."""

    def __init__(self, path: Path) -> None:
        self.file = RotatingFile(path, CONSOLE_LIMIT)
        self.tail = b""  # the last 16 KiB
        self.thread: threading.Thread | None = None

    @contextlib.contextmanager
    def follow(self) -> Iterator[int]:
        """A descriptor, ours inside the block, whose other end is read to its end in a thread."""
        read, write = os.pipe()
        try:
            thread = threading.Thread(target=self._read, args=(read,), name="console", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there are too many
                os.close(read)
                raise
            self.thread = thread
            yield write
        finally:
            os.close(write)

    def _read(self, fd: int) -> None:
        try:
            while data := os.read(fd, 65536):
                self.tail = (self.tail + data)[-16384:]
                self.file.write(data)
        finally:
            os.close(fd)
            self.file.close()

    def join(self) -> None:
        """Wait for the end of the console; the writer is dead by now."""
        if self.thread is None:  # nobody has written yet
            self.file.close()
        else:
            self.thread.join(timeout=10)

    def lines(self, count: int = 10) -> list[str]:
        """The last ``count`` lines, without control characters."""
        text = self.tail.decode(errors="replace").replace("\r", "")
        clean = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        return [line for line in clean.split("\n") if line.strip()][-count:]

    def quote(self, count: int = 10) -> str:
        """The last lines as an indented block for an error message; empty when there are none."""
        lines = self.lines(count)
        return f"{QUOTE}\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
