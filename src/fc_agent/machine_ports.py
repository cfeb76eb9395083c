"""Publishes ports of VMs in the machine on the host's own addresses.

A process in the machine connects to the Unix socket ``ports.sock`` and sends one JSON line, ``{"ports": [{"protocol":
"tcp"|"udp", "host_ip": "" (all), "host_port": 8080, "port": 8080}, ...]}``: what arrives at the host's ``host_port`` (0:
any free one) goes to ``port`` of the machine's eth0. The answer is one JSON line, ``{"ports": [8080, ...]}`` with the
host's ports or ``{"error": ..., "hint": ...}``. The ports stay published while the connection is open, so they go with the VM's
supervisor however it ends.
"""

import contextlib
import json
import os
import select
import socket
from collections.abc import Callable
from typing import Any

MAX_REQUEST = 1 << 20


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""
        self.asked: list[int] = []  # ids of the ports it wants
        self.host_ports: dict[int, int] = {}  # id -> the host's port, once published

    def reply(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # it is gone; its end of the connection says so too
            self.connection.send(json.dumps(message).encode() + b"\n")


class Ports:
    """The server at ``path``; ``send`` passes a message to the host's keeper."""

    def __init__(self, path: str, send: Callable[[dict[str, Any]], None]) -> None:
        self._send = send
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        os.chmod(path, 0o666)  # everyone in the machine belongs to its one user
        self._listener.listen(128)
        self._clients: dict[int, _Client] = {}
        self._owners: dict[int, _Client] = {}  # id -> who asked
        self._next = 1
        self._poll = select.poll()

    def register(self, poll: select.poll) -> None:  # type: ignore[valid-type, unused-ignore]
        """Take part in the caller's loop: it calls ``ready`` for our descriptors."""
        self._poll = poll
        poll.register(self._listener.fileno(), select.POLLIN)

    def ready(self, fd: int) -> None:
        """Descriptor ``fd`` is readable."""
        if fd == self._listener.fileno():
            connection, _ = self._listener.accept()
            self._clients[connection.fileno()] = _Client(connection)
            self._poll.register(connection.fileno(), select.POLLIN)
            return
        client = self._clients[fd]
        try:
            data = client.connection.recv(65536)
        except OSError:
            data = b""
        client.buffer += data
        if not data or len(client.buffer) > MAX_REQUEST:
            self._forget(client)
        elif client.buffer.endswith(b"\n") and not client.asked:
            self._ask(client)

    def _ask(self, client: _Client) -> None:
        try:
            wanted = [
                {"protocol": str(p["protocol"]), "host_ip": str(p["host_ip"]), "host_port": int(p["host_port"]), "port": int(p["port"])}
                for p in json.loads(client.buffer)["ports"]
            ]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            client.reply({"error": f"malformed request: {error!r}"})
            return
        if not wanted:
            client.reply({"ports": []})
        for port in wanted:
            client.asked.append(self._next)
            self._owners[self._next] = client
            self._send({"type": "publish", "id": self._next, **port})
            self._next += 1

    def answer(self, message: dict[str, Any]) -> None:
        """The keeper has published a port, or could not."""
        client = self._owners.get(message["id"])
        if client is None:
            return  # it went away meanwhile, and its ports with it
        if "error" in message:
            client.reply({"error": message["error"], "hint": message.get("hint")})
            self._withdraw(client)
            return
        client.host_ports[message["id"]] = message["host_port"]
        if len(client.host_ports) == len(client.asked):
            client.reply({"ports": [client.host_ports[i] for i in client.asked]})

    def _withdraw(self, client: _Client) -> None:
        for number in client.asked:
            if self._owners.pop(number, None):
                self._send({"type": "unpublish", "id": number})

    def _forget(self, client: _Client) -> None:
        self._withdraw(client)
        fd = client.connection.fileno()
        self._poll.unregister(fd)
        del self._clients[fd]
        client.connection.close()

    def close(self) -> None:
        """Withdraw everything and stop listening."""
        for client in list(self._clients.values()):
            self._forget(client)
        self._poll.unregister(self._listener.fileno())
        self._listener.close()
