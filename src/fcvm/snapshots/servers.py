"""The clone servers that run, and how to talk to one.

Each has a directory, ``servers/<pid>/``, with ``server.json`` (what it serves) and ``server.sock``, and holds an flock on
it for its life. Over the socket go JSON lines; the first line of a connection is a request, with the descriptors that it
speaks of.

    {"op": "status"}              -> {"clones": [...], "ready": N, ...}
    {"op": "run", "name": ..., }  -> {"started": {"id": ..., "name": ...}}, later {"exit": CODE}
                                     or at any time {"error": ..., "hint": ..., "exit_code": ...}
        with stdout and stderr; the clone lives as long as the connection.
        then, from the client:      {"op": "stop", "timeout": SECONDS or null}, {"op": "kill"}
                                    {"op": "detach"}: it lives as long as the server (asked for with "detach": true)
    {"op": "stop"}                -> {"stopping": true}; it ends with its clones, and lets go of its directory then

This module is on the path of `fcvm snapshot run`, which counts milliseconds: it imports little.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence

from fcvm import log
from fcvm.errors import ConflictError, FcvmError, NotFoundError
from fcvm.linux import sockets
from fcvm.storage import records
from fcvm.storage.layout import Layout, is_held, locked, remove, wait_until_free

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

SOCKET = "server.sock"
INFO = "server.json"
MEMORY_SOCKET = "memory.sock"
MAX_LINE = 1 << 20
MAX_FDS = 2
ANSWER = 10.0  # seconds for a server to answer, which takes it milliseconds


@contextlib.contextmanager
def registered(layout: Layout, info: dict[str, Any]) -> Iterator[Path]:
    """Be a clone server: yields our directory, which is held and, at the end, removed."""
    directory = layout.directory("servers") / str(os.getpid())
    with locked(directory.with_name(".lock")):
        _sweep(layout)
        directory.mkdir(mode=0o700)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        (directory / INFO).write_text(json.dumps(info))
        yield directory
    finally:
        remove(directory)
        os.close(lock)


def _sweep(layout: Layout) -> None:
    """Remove the directories of servers that were killed."""
    for directory in _directories(layout):
        if not is_held(directory):
            remove(directory)


def running(layout: Layout) -> list[dict[str, Any]]:
    """The servers that run, each with what it says of itself, by pid."""
    found = []
    for pid in pids(layout):
        try:
            info = records.load(layout.base / "servers" / str(pid) / INFO)
            found.append({**info, **call(layout, pid, {"op": "status"})})
        except TimeoutError:
            log.warning(_silent(pid))
        except (OSError, ValueError, FcvmError):  # it starts, or ends
            pass
    return found


def pids(layout: Layout) -> list[int]:
    """Of the servers that run."""
    return [int(directory.name) for directory in _directories(layout) if is_held(directory)]


def _silent(pid: int) -> str:
    return f"The clone server {pid} does not answer: kill -KILL {pid}, where it runs, ends it and its clones."


def _directories(layout: Layout) -> list[Path]:
    names = [path.name for path in layout.directory("servers").iterdir()]
    return [layout.base / "servers" / name for name in sorted(filter(str.isdecimal, names), key=int)]


def find(layout: Layout, word: str) -> list[int]:
    """The pids of the servers that ``word`` names: by its pid, or all of a snapshot.

    Raises:
        NotFoundError: there is none.
    """
    alive = [directory for directory in _directories(layout) if is_held(directory)]
    found = [int(directory.name) for directory in alive if word == directory.name or word == _tag(directory)]
    if not found:
        raise NotFoundError(f"There is no clone server {word}.", hint="fcvm snapshot ls")
    return found


def _tag(directory: Path) -> str | None:
    """The tag of what the server of ``directory`` serves; None while it starts or ends."""
    try:
        return str(records.load(directory / INFO)["tag"])
    except (OSError, ValueError, KeyError):
        return None


def stop(layout: Layout, pid: int) -> None:
    """End the server ``pid`` and its clones, and wait for that; one that is not there has ended.

    Raises:
        ConflictError: it does not answer. FcvmError: it refused.
    """
    directory = layout.base / "servers" / str(pid)
    while True:
        try:
            call(layout, pid, {"op": "stop"})
            break
        except (ConflictError, NotFoundError):  # it is ending already, or does not listen yet
            if not is_held(directory):
                return
            time.sleep(0.05)
        except TimeoutError:
            raise ConflictError(_silent(pid), hint="fcvm snapshot ls") from None
    wait_until_free(directory)  # which it lets go of as the last thing


def connect(layout: Layout, pid: int, request: dict[str, Any], fds: Sequence[int] = ()) -> socket.socket:
    """A connection to the server ``pid`` on which ``request`` was sent.

    Raises:
        NotFoundError: there is no such server.
    """
    try:
        connection = sockets.connect(os.path.join(layout.root, "servers", str(pid), SOCKET))
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise NotFoundError(f"There is no clone server with pid {pid}.", hint="fcvm snapshot ls") from error
    try:
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], fds)
    except OSError as error:
        connection.close()
        raise ConflictError(f"The clone server {pid} is ending.", hint="fcvm snapshot ls") from error
    return connection


def call(layout: Layout, pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """One request and its answer.

    Raises:
        NotFoundError: there is no such server. FcvmError: it refused. TimeoutError: it does not answer.
    """
    with connect(layout, pid, request) as connection:
        connection.settimeout(ANSWER)
        answer = next(lines(connection), None)
    if answer is None:
        raise ConflictError(f"The clone server {pid} is ending.", hint="fcvm snapshot ls")
    return checked(answer)


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """``answer``, if it is not an error; raises that."""
    if "error" in answer:
        raise FcvmError(answer["error"], hint=answer.get("hint"), exit_code=answer.get("exit_code", 125))
    return answer


def lines(connection: socket.socket, data: bytes = b"") -> Iterator[dict[str, Any]]:
    """The JSON lines that come, after those of ``data``, until the connection ends; what is no object ends it as well.

    Raises:
        TimeoutError: nothing came in the connection's time.
    """
    while True:
        line, newline, rest = data.partition(b"\n")
        if newline:
            data = rest
            try:
                value = records.parse(line)
            except ValueError:
                return
            yield value
            continue
        if len(data) > MAX_LINE:
            return
        try:
            more = connection.recv(65536)
        except TimeoutError:
            raise
        except OSError:
            return
        if not more:
            return
        data += more


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int], bytes]:
    """The request that opens a connection, with its descriptors and what came after it; raises ValueError for anything else."""
    data, fds = b"", []
    try:
        while b"\n" not in data:
            more, new, _, _ = socket.recv_fds(connection, 65536, MAX_FDS)
            fds += new
            if not more or len(data) > MAX_LINE:
                raise ValueError("no request came")
            data += more
        line, _, rest = data.partition(b"\n")
        request = records.parse(line)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return request, fds, rest


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send one line; a peer that has gone does not matter."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
