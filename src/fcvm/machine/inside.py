"""For code that runs in the machine: what it has to ask the host for.

A port that a VM publishes in the machine is reachable in the machine only. ``publish`` asks the host's keeper, by way of
the machine's agent (``fc_agent/machine_ports.py``), to listen on the host and pass connections on. What is published
lives as long as the returned object's connection, so as long as the process that holds it.
"""

import json
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from fcvm.errors import ConflictError, MachineError

PORTS_SOCKET = Path("/run/fcvm/ports.sock")
ANSWER_TIME = 60.0  # seconds; the host may be busy


@dataclass(frozen=True, slots=True)
class Port:
    """What arrives at ``host_ip:host_port`` of the user's host (port 0: any free one) goes to ``port`` of the machine.

    The machine's listener must accept what comes to the machine's own address: 0.0.0.0, whatever ``host_ip`` says.
    """

    protocol: str
    host_ip: str
    host_port: int
    port: int


def here() -> bool:
    """Whether this process runs in a machine."""
    return PORTS_SOCKET.exists()


class Published:
    """Ports that are published on the host until ``close``; ``host_ports`` are their numbers there, in order."""

    def __init__(self, connection: socket.socket, host_ports: list[int]) -> None:
        self._connection = connection
        self.host_ports = host_ports

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> "Published":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def publish(ports: Iterable[Port], path: Path = PORTS_SOCKET) -> Published:
    """Publish ``ports`` on the user's host, all or none.

    Raises:
        ConflictError: one is taken there, or the host has no such address.
        MachineError: the machine's agent does not answer.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_TIME)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps({"ports": [asdict(port) for port in ports]}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline())
        except (OSError, ValueError) as error:
            raise MachineError(f"The machine's agent does not publish ports: {error}.") from error
        if "error" in answer:
            raise ConflictError(answer["error"], hint="publish another port, or none for any free one: -p 80")
        connection.settimeout(None)
        return Published(connection, answer["ports"])
    except BaseException:
        connection.close()
        raise
