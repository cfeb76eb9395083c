"""The guest's end of the control channel: docs/architecture.md, "Control".

The connection breaks whenever a snapshot is taken or restored; it is made again for ever, and each begins with the whole
state, so nothing that happened meanwhile is lost.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fc_agent import linux, vsock
from fc_agent.protocol import CONTROL_PORT, MAX_LINE, PROTOCOL

VERSION = "0.1.0"
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 0.25  # seconds between attempts to connect

Connect = Callable[[], socket.socket]


def connect_vsock() -> socket.socket:
    """A connection to the host's supervisor of this VM."""
    return vsock.connect(CONTROL_PORT)


class Control:
    """Tells the host what happens here (any thread) and yields what the host wants (one thread)."""

    def __init__(self, connect: Connect = connect_vsock) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._state: dict[str, Any] = {"phase": "waiting", "health": None, "exit": None, "frozen": False}
        self._stages: list[dict[str, Any]] = []

    def stage(self, name: str, uptime: float | None = None) -> None:
        """A step of the start is done: now, or when the system had been up for ``uptime`` seconds."""
        message = {"type": "stage", "name": name, "uptime": linux.uptime() if uptime is None else uptime}
        with self._lock:
            if not self._write(message):
                self._stages.append(message)

    def tell(self, message: dict[str, Any] | None, **state: Any) -> None:
        """Change the state that a new connection begins with, and send the message that says so."""
        with self._lock:
            self._state.update(state)
            if message is not None:
                self._write(message)

    def messages(self) -> Iterator[dict[str, Any]]:
        """The host's messages, for ever, over as many connections as it takes."""
        while True:
            connection = self._open()
            try:
                yield from self._read(connection)
            finally:
                with self._lock:
                    self._connection = None
                connection.close()

    @staticmethod
    def _read(connection: socket.socket) -> Iterator[dict[str, Any]]:
        """The messages of one connection, until it ends."""
        buffer = bytearray()
        while True:
            try:
                data = connection.recv(1 << 16)
            except OSError:
                return
            if not data or len(buffer) > MAX_LINE:
                return
            buffer += data
            if b"\n" in data:
                *lines, buffer = buffer.split(b"\n")
                yield from _decode(lines)

    def _open(self) -> socket.socket:
        pause = FIRST_PAUSE
        while True:
            try:
                connection = self._connect()
            except OSError:
                time.sleep(pause)  # nothing tells when the host listens again
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            with self._lock:
                self._connection = connection
                stages, self._stages = self._stages, []
                hello = {
                    "type": "hello",
                    "protocol": PROTOCOL,
                    "agent": VERSION,
                    "pid": os.getpid(),
                    "state": self._state,
                }
                for message in (hello, *stages):
                    self._write(message)
            return connection

    def _write(self, message: dict[str, Any]) -> bool:
        if self._connection is None:
            return False
        try:
            self._connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except OSError:
            return False  # the reader notices as well, and connects again
        return True


def _decode(lines: list[bytearray]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            linux.log(f"the host sent something that is not JSON: {bytes(line[:80])!r}")
            continue
        if isinstance(message, dict):
            yield message
