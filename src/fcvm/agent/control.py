"""The host's end of the control channel: docs/architecture.md, "Control".

The guest connects to ``<vsock device>_4999`` and comes back whenever the connection breaks; one ``Control`` listens there for a
VM's whole life and is a single pollable descriptor for its supervisor's loop.

The guest is not trusted: whatever it sends costs a bounded amount of memory and raises at most ``AgentError``.
"""

from __future__ import annotations

import json
import os
import select
import socket
from pathlib import Path

from fc_agent.protocol import CONTROL_PORT, MAX_LINE, PROTOCOL
from fcvm.errors import AgentError
from fcvm.linux import sockets

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_INPUT = 1 << 20  # bytes of one message of the guest
MAX_OUTPUT = 2 * MAX_LINE  # bytes that wait for a guest that does not read
READ = 1 << 16


class Control:
    """Listens for the agent of the VM whose vsock device is ``uds``. Close it with ``close``."""

    def __init__(self, uds: Path) -> None:
        self._path = uds.with_name(f"{uds.name}_{CONTROL_PORT}")
        self._listener = sockets.listen(self._path)
        self._listener.setblocking(False)
        self._connection: socket.socket | None = None
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._input = bytearray()
        self._output = bytearray()
        self._current = 0  # bytes of the message that is partly written

    @property
    def connected(self) -> bool:
        """Whether the guest's agent is connected."""
        return self._connection is not None

    def fileno(self) -> int:
        """Readable when ``receive`` has something to do."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._drop()
        self._epoll.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def send(self, message: dict[str, Any]) -> None:
        """Queue a message and write what can be written; it waits for the guest's next connection if there is none.

        Raises:
            AgentError: far too much waits already.
        """
        self._output += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(self._output) > MAX_OUTPUT:
            raise AgentError(
                "The guest agent does not read what it is sent.", hint="fcvm logs shows the guest's console"
            )
        self._flush()

    def receive(self) -> list[dict[str, Any]]:
        """Do what can be done without waiting and return the messages that have come; each has a ``type``.

        Raises:
            AgentError: the guest does not speak this protocol, or another version of it.
        """
        messages: list[dict[str, Any]] = []
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif self._connection is not None and descriptor == self._connection.fileno():
                self._flush()
                messages += self._read()
        return messages

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self._drop()  # the guest knows better than we that the old one is dead
        connection.setblocking(False)
        self._connection = connection
        self._epoll.register(connection, select.EPOLLIN)
        self._flush()

    def _drop(self) -> None:
        if self._connection is None:
            return
        self._epoll.unregister(self._connection)
        self._connection.close()
        self._connection = None
        self._input.clear()
        # What the guest has half of, it gets again as a whole.
        self._current = 0

    def _flush(self) -> None:
        while self._connection is not None and self._current < len(self._output):
            try:
                sent = self._connection.send(memoryview(self._output)[self._current : self._current + READ])
            except BlockingIOError:
                break
            except OSError:
                self._drop()
                return
            self._current += sent
            whole = self._output.rfind(b"\n", 0, self._current) + 1
            del self._output[:whole]
            self._current -= whole
        if self._connection is not None:
            waiting = select.EPOLLOUT if self._current < len(self._output) else 0
            self._epoll.modify(self._connection, select.EPOLLIN | waiting)

    def _read(self) -> list[dict[str, Any]]:
        if self._connection is None:
            return []
        try:
            data = self._connection.recv(READ)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self._drop()
            return []
        self._input += data
        *lines, rest = self._input.split(b"\n") if b"\n" in data else (self._input,)
        if len(rest) > MAX_INPUT:
            raise AgentError("The guest agent sent a message without an end.")
        self._input = bytearray(rest)
        return [parse(line) for line in lines if line.strip()]


def parse(line: bytes | bytearray) -> dict[str, Any]:
    """One message of the guest.

    Raises:
        AgentError: it is none, is malformed, or a hello of another protocol version.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AgentError(f"The guest agent sent something that is not JSON: {bytes(line[:80])!r}.") from error
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise AgentError(f"The guest agent sent a message without a type: {bytes(line[:80])!r}.")
    if message["type"] == "hello" and message.get("protocol") != PROTOCOL:
        raise AgentError(
            f"The guest agent speaks version {message.get('protocol')!r} of the protocol, this fcvm version {PROTOCOL}.",
            hint="fcvm setup, and make the snapshot again if it is one",
        )
    state = message.get("state", {}) if message["type"] == "hello" else {}
    if not isinstance(state, dict):
        raise AgentError("The guest agent's state is malformed.")
    ended = message if message["type"] == "exit" else state.get("exit")
    if ended is not None and not (isinstance(ended, dict) and ended.get("code") in range(256)):
        raise AgentError(f"The guest agent reports an end that cannot be: {str(ended)[:80]}.")
    if message["type"] == "stage" and not (
        isinstance(message.get("uptime"), int | float) and 0 <= message["uptime"] < 1 << 40
    ):
        raise AgentError("The guest agent reports a stage at no time.")
    return message


def new_machine_id() -> str:
    """A fresh /etc/machine-id (machine-id(5)): 32 hexadecimal digits."""
    return os.urandom(16).hex()
