"""QEMU's machine protocol over a connected socket: one JSON object a line, each way.

Commands and answers: QEMU's ``docs/interop/qemu-qmp-ref``. Events and late answers that arrive between are
dropped.
"""

import json
import re
import socket
from typing import Any

from fcvm.errors import ConflictError, MachineError


class Monitor:
    """The host's end of QEMU's monitor; ``timeout`` (seconds) holds for every answer."""

    def __init__(self, sock: socket.socket, *, timeout: float = 30.0) -> None:
        self._sock = sock
        self._sock.settimeout(timeout)
        self._buffer = b""
        self._ready = False
        self._id = 0  # of the last command: an answer to one before it comes too late

    def close(self) -> None:
        self._sock.close()

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command and return what it returns. Raises MachineError: QEMU refused, is gone or does not answer."""
        if not self._ready:
            while "QMP" not in self._message():  # the greeting
                pass
            self._ready = True
            self.execute("qmp_capabilities")
        self._id += 1
        request = {"execute": command, "arguments": arguments, "id": self._id}
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise MachineError(f"QEMU does not answer: {error}.") from error
        while (answer := self._message()).get("id") != self._id:
            pass
        if "error" in answer:
            raise MachineError(f"QEMU refused {command}: {answer['error'].get('desc')}.")
        return answer.get("return")

    def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            try:
                data = self._sock.recv(65536)
            except OSError as error:
                raise MachineError(f"QEMU does not answer: {error}.") from error
            if not data:
                raise MachineError("QEMU has ended.")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return dict(json.loads(line))

    def _human(self, line: str) -> str:
        return str(self.execute("human-monitor-command", **{"command-line": line})).strip()

    def forward(self, protocol: str, host_ip: str, host_port: int, guest_ip: str, guest_port: int) -> int:
        """Let QEMU's user network listen on the host and connect to the guest; returns the host's port.

        Arguments:
            host_port: 0 takes a free one.

        Raises:
            ConflictError: QEMU cannot have it; ``ports.py`` has seen why before.
        """
        where = f"{host_ip or '0.0.0.0'}:{host_port}/{protocol}"
        port = host_port or free_port(protocol, host_ip)
        answer = self._human(f"hostfwd_add net {protocol}:{host_ip}:{port}-{guest_ip}:{guest_port}")
        if answer:
            raise ConflictError(f"Port {where} cannot be published: {answer}.", hint="publish another port")
        return port

    def cancel(self, protocol: str, host_ip: str, host_port: int) -> None:
        """Take a ``forward`` back; connections that are open stay."""
        self._human(f"hostfwd_remove net {protocol}:{host_ip}:{host_port}")

    def forwards(self) -> list[tuple[str, str, int, int]]:
        """What is forwarded now: protocol, host address, host port, guest port."""
        found = []
        for line in self._human("info usernet").splitlines():
            if match := re.match(r"\s*(TCP|UDP)\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)", line):
                found.append((match[1].lower(), match[2], int(match[3]), int(match[4])))
        return found


def _socket(protocol: str) -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM)


def free_port(protocol: str, host_ip: str) -> int:
    """A port that is free on the host now. Raises ConflictError: the host has no such address."""
    with _socket(protocol) as probe:
        try:
            probe.bind((host_ip, 0))
        except OSError as error:
            raise ConflictError(f"No port can be published on {host_ip}: {error.strerror}.") from error
        return int(probe.getsockname()[1])
