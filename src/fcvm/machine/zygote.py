"""The warm interpreter in the machine: imports fcvm once, then every forwarded command is a fork of it.

``fc_agent/machine_commands.py`` starts it and describes the protocol. It stays single-threaded. What a command had to
import beyond what was there, the zygote imports after it: the next one finds it done.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

PR_SET_DUMPABLE = 4  # <linux/prctl.h>
_libc = ctypes.CDLL(None)
_LENGTH = struct.Struct(">I")
FORKS, FORK_PAUSE = 50, 0.1  # attempts, and seconds between two
LEARN_MOST = 65536  # bytes of module names: what a pipe holds; a name cut in two is none

# What nearly every command needs; the rest comes by experience.
PRELOAD = ("argparse", "fcvm.config", "fcvm.log", "fcvm.cli.main", "fcvm.cli.remote", "fcvm.cli.context", "fcvm.hostpath")


def main(fd: int) -> None:
    """Serve requests from the socket ``fd`` until it closes and every command has ended."""
    sock = socket.socket(fileno=fd)
    for name in PRELOAD:
        importlib.import_module(name)
    _freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the commands
    known = set(sys.modules)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    children: dict[int, tuple[int, int, int]] = {}  # pidfd -> pid, status pipe, pipe of module names
    open_ = True
    while open_ or children:
        for ready, _ in poll.poll():
            if ready == sock.fileno():
                child = _request(sock, known)
                if child is None:
                    open_ = False
                    poll.unregister(sock)
                else:
                    pidfd = os.pidfd_open(child[0])
                    children[pidfd] = child
                    poll.register(pidfd, select.POLLIN)
            else:
                poll.unregister(ready)
                known |= _reap(ready, *children.pop(ready))


def _request(sock: socket.socket, known: set[str]) -> tuple[int, int, int] | None:
    """Take one request and fork. Returns None when there are no more."""
    header, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 4)
    if len(header) < _LENGTH.size:
        return None
    message = json.loads(sock.recv(_LENGTH.unpack(header)[0], socket.MSG_WAITALL))
    learn_read, learn_write = os.pipe()
    pid = fork()
    if pid == 0:
        sock.close()
        os.close(learn_read)
        os.close(fds[3])
        _command(message, fds[:3], known, learn_write)
    os.close(learn_write)
    for fd in set(fds[:3]):
        os.close(fd)
    sock.sendall(_LENGTH.pack(pid))
    return pid, fds[3], learn_read


def fork() -> int:
    """fork(2), again for a while where there is no room for a process: to fail would be the end of every command.

    Raises:
        OSError: there still is none.
    """
    for _ in range(FORKS - 1):
        try:
            return os.fork()
        except OSError:
            time.sleep(FORK_PAUSE)
    return os.fork()


def _reap(pidfd: int, pid: int, status: int, learn: int) -> set[str]:
    """Pass on how a command ended; import what it had to."""
    os.close(pidfd)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError):
        os.write(status, bytes(((128 - code) & 255 if code < 0 else code,)))
    os.close(status)
    os.set_blocking(learn, False)  # a descendant may hold it open
    try:
        names = set(os.read(learn, 65536).decode().split())
    except BlockingIOError:
        names = set()
    os.close(learn)
    for name in sorted(names):
        with suppress(Exception):
            importlib.import_module(name)
    if names:
        _freeze()
    return names


def _freeze() -> None:
    """Keep the garbage collector of the children off the pages that they share with us."""
    gc.collect()
    gc.freeze()


def _command(message: dict[str, Any], standard: list[int], known: set[str], learn: int) -> NoReturn:
    """Be the command: take its streams, terminal, user, directory and environment, and run it."""
    code = 125
    try:
        os.setsid()
        for number, fd in enumerate(standard):
            os.dup2(fd, number)
        for fd in set(standard):
            if fd > 2:
                os.close(fd)
        if message["tty"]:
            fcntl.ioctl(next(filter(os.isatty, (0, 1, 2))), termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # its own programs get the default, as after any exec
        if message["uid"] != 0:
            os.setgroups(message["groups"])
            os.setgid(message["gid"])
            os.setuid(message["uid"])
            # Without an exec after it, this leaves /proc/self to root, and a user namespace could not be mapped.
            _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        os.environ.clear()
        os.environ.update(message["env"])
        os.chdir(message["cwd"])
        _streams()
        code = _run(message["argv"])
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        os.set_blocking(learn, False)
        names = "".join(f"{name}\n" for name in sys.modules if name not in known)
        os.write(learn, names.encode()[:LEARN_MOST])
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 255)


def _streams() -> None:
    """sys.stdin, stdout and stderr as a starting interpreter makes them for descriptors 0, 1 and 2."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _run(argv: list[str]) -> int:
    """Run the command; no words at all only warm the interpreter up."""
    if not argv:
        return 0
    from fcvm.cli.remote import main

    try:
        return main(argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return int(stop.code or 0)
