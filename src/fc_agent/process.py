"""Starts programs of this system for sessions: with pipes, or as the leader of a session on a pseudo terminal."""

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import signal
import struct
import subprocess
import termios
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fc_agent.channel import CHUNK, STDERR, STDOUT
from fc_agent.session import LaunchError, Request

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
END_OF_FILE = b"\x04"  # what Ctrl-D types

# Signals that a terminal sends to the whole foreground process group go to the whole group here, too.
TO_GROUP = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTSTP, signal.SIGCONT)


class LocalProcess:
    """A child of ours (``popen``) behind pipes or a terminal; see ``fc_agent.session.Process``."""

    def __init__(self, popen: subprocess.Popen[bytes], terminal: int | None) -> None:
        self.popen = popen
        self.pid = popen.pid
        self.ended = os.pidfd_open(popen.pid)
        self.terminal = terminal
        self.stdin: int | None
        self.outputs: dict[int, Callable[[], list[tuple[int, bytes]] | None]]
        self._last = END_OF_FILE
        self._close = [self.ended]
        if terminal is not None:
            self._close.append(terminal)
            self.stdin = terminal
            self.outputs = {terminal: reader(terminal, STDOUT)}
        else:
            self.stdin = None if popen.stdin is None else popen.stdin.fileno()
            pipes = [(pipe.fileno(), kind) for pipe, kind in ((popen.stdout, STDOUT), (popen.stderr, STDERR)) if pipe]
            self.outputs = {descriptor: reader(descriptor, kind) for descriptor, kind in pipes}
        for descriptor in (self.stdin, *self.outputs):
            if descriptor is not None:
                os.set_blocking(descriptor, False)

    def write(self, data: memoryview) -> int:
        assert self.stdin is not None
        written = os.write(self.stdin, data)
        self._last = bytes(data[written - 1 : written]) or self._last
        return written

    def close_stdin(self) -> None:
        if self.terminal is None:
            if self.popen.stdin is not None:
                self.popen.stdin.close()
        elif self.stdin is not None:
            # A terminal has no end of its own: type Ctrl-D, twice where the first only ends an unfinished line.
            with contextlib.suppress(OSError):
                os.write(self.terminal, END_OF_FILE if self._last in b"\r\n\x04" else 2 * END_OF_FILE)
        self.stdin = None

    def resize(self, rows: int, columns: int) -> None:
        if self.terminal is not None:
            set_size(self.terminal, rows, columns)

    def signal(self, number: int) -> None:
        with contextlib.suppress(OSError, ValueError):
            if number in TO_GROUP:
                os.killpg(self.pid, number)
            else:
                signal.pidfd_send_signal(self.ended, number)

    def kill(self) -> None:
        kill_session(self.pid)

    def exit(self) -> tuple[int, str | None]:
        return exit_code(self.popen.wait()), None

    def close(self) -> None:
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        for descriptor in self._close:
            os.close(descriptor)
        self._close.clear()
        self.popen.wait()  # it is over, or was killed a moment ago


def exit_code(returncode: int) -> int:
    """A shell's exit code from Python's: 128+N for signal N."""
    return 128 - returncode if returncode < 0 else returncode


def reader(descriptor: int, kind: int) -> Callable[[], list[tuple[int, bytes]] | None]:
    """Reads once from a pipe or a terminal; a terminal that nobody has open any more says EIO, which is its end."""

    def read() -> list[tuple[int, bytes]] | None:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None
        return [(kind, data)] if data else None

    return read


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Give a terminal its size; the kernel tells its processes (SIGWINCH)."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def kill_session(leader: int) -> None:
    """SIGKILL every process of the session that ``leader`` leads, background jobs included."""
    victims = [leader]
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                # pid (comm) state ppid pgrp session ...: comm may hold anything, so count from its closing bracket
                if int(file.read().rpartition(b")")[2].split()[3]) == leader:
                    victims.append(int(name))
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def launch(request: Request, *, env: Mapping[str, str] | None = None) -> LocalProcess:
    """Start ``request.argv`` on this system, in a session of its own.

    Arguments:
        env: the environment that the request's is added to; ours by default.

    Raises:
        LaunchError: 126 if it cannot be executed, 127 if it is not there, 125 for an unknown user.
    """
    environment = {"PATH": DEFAULT_PATH, "HOME": "/root", "LANG": "C.UTF-8", **(os.environ if env is None else env)}
    if request.tty:
        environment.setdefault("TERM", "xterm")
    who: dict[str, Any] = {}
    if request.user:
        uid, gid, groups, home = find_user(request.user)
        environment["HOME"] = home
        if uid != os.geteuid() or gid != os.getegid() or os.geteuid() == 0:
            who = {"user": uid, "group": gid, "extra_groups": groups}
    environment.update(request.env)
    argv = request.argv or [environment.get("SHELL", "/bin/sh")]
    cwd = request.cwd or (environment["HOME"] if os.path.isdir(environment["HOME"]) else "/")
    terminal, line = os.openpty() if request.tty else (None, None)
    try:
        if terminal is not None and line is not None:
            set_size(terminal, request.rows, request.columns)
            if who:
                os.fchown(line, who["user"], -1)
        popen = _spawn(argv, environment, cwd, who, line, request.stdin)
    except (OSError, ValueError) as error:
        if terminal is not None:
            os.close(terminal)
        raise launch_error(argv[0], cwd, error) from error
    finally:
        if line is not None:
            os.close(line)
    return LocalProcess(popen, terminal)


def _spawn(
    argv: list[str], env: dict[str, str], cwd: str, who: Mapping[str, Any], line: int | None, stdin: bool
) -> subprocess.Popen[bytes]:
    if line is None:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=env,
            cwd=cwd,
            start_new_session=True,
            **who,
        )

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with warnings.catch_warnings():  # it does nothing but this one system call, so other threads do not matter
        warnings.simplefilter("ignore", DeprecationWarning)
        return subprocess.Popen(
            argv,
            stdin=line,
            stdout=line,
            stderr=line,
            env=env,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=take_terminal,
            **who,
        )


def launch_error(program: str, cwd: str, error: Exception) -> LaunchError:
    """What a shell would say about a program that could not be started."""
    if isinstance(error, OSError) and error.filename == cwd and program != cwd:
        return LaunchError(f"The working directory {cwd} cannot be entered: {error.strerror}.", 126)
    if isinstance(error, FileNotFoundError):
        return LaunchError(f"{program}: not found.", 127)
    return LaunchError(f"{program}: {getattr(error, 'strerror', None) or error}.", 126)


def find_user(text: str) -> tuple[int, int, list[int], str]:
    """``(uid, gid, supplementary groups, home)`` from ``name``, ``uid``, and either with ``:group``.

    Raises:
        LaunchError: no such user or group here.
    """
    name, _, group = text.partition(":")
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        uid, gid, home, known = entry.pw_uid, entry.pw_gid, entry.pw_dir, entry.pw_name
    except KeyError:
        if not name.isdigit():
            raise LaunchError(f"There is no user {name}.") from None
        uid, gid, home, known = int(name), int(name) if not group else 0, "/", ""
    try:
        if group:
            gid = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise LaunchError(f"There is no group {group}.") from None
    groups = os.getgrouplist(known, gid) if known and not group else [gid]
    return uid, gid, groups, home
