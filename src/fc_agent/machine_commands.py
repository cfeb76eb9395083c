"""Starts the machine's sessions: programs of this system, and fcvm's own commands, forked from a warm interpreter.

A forwarded ``fcvm`` command (target ``fcvm``) would spend most of its time starting Python on an emulated CPU. So a
process that has fcvm imported already (``fcvm/machine/zygote.py``) waits for each version of the code, and a command is
a fork of it. ``argv`` of such a request is the directory of the code, then the words for ``fcvm.cli.remote.main``.

The zygote's protocol, on a stream socket: a request is its length (u32, big endian) and JSON, with four descriptors
(stdin, stdout, stderr, and a pipe for the exit code) passed along with the length; the answer is the child's pid (u32).
The exit code comes as one byte on its pipe.
"""

import contextlib
import json
import os
import pwd
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable

from fc_agent.channel import STDERR, STDOUT
from fc_agent.process import DEFAULT_PATH, TO_GROUP, find_user, kill_session, launch, reader, set_size
from fc_agent.session import LaunchError, Process, Request

PYTHON = "/usr/bin/python3"
START = "import sys; sys.path.insert(0, sys.argv[1]); from fcvm.machine.zygote import main; main(int(sys.argv[2]))"

STREAMS = ("stdin", "stdout", "stderr")
_LENGTH = struct.Struct(">I")


class Zygote:
    """A warm interpreter with the fcvm of directory ``code``."""

    def __init__(self, code: str) -> None:
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [PYTHON, "-ISE", "-c", START, code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"PATH": DEFAULT_PATH, "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        self._socket = ours

    def fork(self, message: dict[str, object], descriptors: list[int]) -> int:
        """Start a command; returns its pid. Raises OSError: the zygote is gone."""
        data = json.dumps(message).encode()
        with self._lock:
            socket.send_fds(self._socket, [_LENGTH.pack(len(data))], descriptors)
            self._socket.sendall(data)
            answer = self._socket.recv(_LENGTH.size, socket.MSG_WAITALL)
        if len(answer) < _LENGTH.size:
            raise ConnectionResetError("the warm interpreter has ended")
        return int(_LENGTH.unpack(answer)[0])

    def close(self) -> None:
        """Let it go: it ends when its last command has."""
        self._socket.close()
        threading.Thread(target=self._process.wait, daemon=True, name="reaper").start()


class Commands:
    """The machine's launcher: see the module."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._code = ""
        self._zygote: Zygote | None = None

    def __call__(self, request: Request) -> Process:
        """Start what ``request`` asks for. Raises LaunchError."""
        if request.target != "fcvm":
            return launch(request)
        if not request.argv or not os.path.isdir(request.argv[0]):
            raise LaunchError(f"The machine has no fcvm in {request.argv[:1]}.")
        try:
            return Command(request, self._of(request.argv[0]))
        except OSError:  # it has been killed, perhaps for want of memory: once more with a new one
            self._drop()
        try:
            return Command(request, self._of(request.argv[0]))
        except OSError as error:
            self._drop()
            raise LaunchError(f"The machine cannot start the command: {error}.") from error

    def _of(self, code: str) -> Zygote:
        with self._lock:
            if self._zygote is None or self._code != code:
                if self._zygote is not None:
                    self._zygote.close()
                self._code, self._zygote = code, Zygote(code)
            return self._zygote

    def _drop(self) -> None:
        with self._lock:
            if self._zygote is not None:
                self._zygote.close()
                self._zygote = None


class Command:
    """A forked command behind pipes or a terminal; see ``fc_agent.session.Process``."""

    def __init__(self, request: Request, zygote: Zygote) -> None:
        uid, gid, groups, home = find_user(request.user) if request.user else (0, 0, [0], pwd.getpwuid(0).pw_dir)
        self.terminal: int | None = None
        self.stdin: int | None = None
        self.outputs: dict[int, Callable[[], list[tuple[int, bytes]] | None]] = {}
        self._open: set[int] = set()
        theirs: list[int] = []
        standard: dict[str, int] = {}
        try:
            self.ended, status = self._own(os.pipe(), theirs)
            if request.tty:
                self.terminal, line = self._own(os.openpty(), theirs)
                set_size(self.terminal, request.rows, request.columns)
                os.fchown(line, uid, -1)
                standard = dict.fromkeys((name for name in STREAMS if name not in request.pipes), line)
                if "stdout" in standard or "stderr" in standard:  # else it shows nothing but an echo, which is the user's own
                    self.outputs[self.terminal] = reader(self.terminal, STDOUT if "stdout" in standard else STDERR)
                if not request.stdin or "stdin" not in standard:  # the user's terminal is not raw: line ends are its affair
                    modes = termios.tcgetattr(line)
                    modes[1] &= ~termios.OPOST
                    termios.tcsetattr(line, termios.TCSANOW, modes)
            if "stdin" in standard:
                self.stdin = self.terminal if request.stdin else None
            elif request.stdin:
                self.stdin, standard["stdin"] = self._own(os.pipe()[::-1], theirs)
            else:
                standard["stdin"] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                theirs.append(standard["stdin"])
            for name, kind in (("stdout", STDOUT), ("stderr", STDERR)):
                if name not in standard:
                    fd, standard[name] = self._own(os.pipe(), theirs)
                    self.outputs[fd] = reader(fd, kind)
            for fd in self._open:
                os.set_blocking(fd, False)
            environment = {"PATH": DEFAULT_PATH, "HOME": home, "LANG": "C.UTF-8", **request.env}
            message = {"argv": request.argv[1:], "env": environment, "cwd": request.cwd or home, "tty": request.tty}
            message |= {"uid": uid, "gid": gid, "groups": groups}
            self.pid = zygote.fork(message, [*(standard[name] for name in STREAMS), status])
        except BaseException:
            self.close()
            raise
        finally:
            for fd in set(theirs):
                os.close(fd)

    def _own(self, pair: tuple[int, ...], theirs: list[int]) -> tuple[int, int]:
        """Keep the first of two descriptors, note the second as the child's."""
        self._open.add(pair[0])
        theirs.append(pair[1])
        return pair[0], pair[1]

    def write(self, data: memoryview) -> int:
        assert self.stdin is not None
        return os.write(self.stdin, data)

    def close_stdin(self) -> None:
        if self.stdin is None:
            return
        if self.stdin == self.terminal:
            with contextlib.suppress(OSError):
                os.write(self.stdin, b"\x04")
        else:
            self._open.discard(self.stdin)
            os.close(self.stdin)
        self.stdin = None

    def resize(self, rows: int, columns: int) -> None:
        if self.terminal is not None:
            set_size(self.terminal, rows, columns)

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            (os.killpg if number in TO_GROUP else os.kill)(self.pid, number)

    def kill(self) -> None:
        kill_session(self.pid)

    def exit(self) -> tuple[int, str | None]:
        try:
            code = os.read(self.ended, 1)
        except BlockingIOError:
            code = b""
        return (code[0], None) if code else (128 + signal.SIGKILL, "The machine's fcvm has ended.")

    def close(self) -> None:
        for fd in self._open:
            os.close(fd)
        self._open.clear()
