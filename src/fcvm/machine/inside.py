"""For code that runs in the machine: how it reaches the host, and what it has to ask the host for.

The loopback of the user's host is behind QEMU's gateway, for sockets of ``HOST_LOOPBACK``'s priority only: the machine's
firewall (``fc_agent/machine_system.py``) keeps VMs from it. The host's other addresses are reached like any others.

A port that a VM publishes in the machine is reachable in the machine only. ``publish`` asks the host's keeper, by way of
the machine's agent (``fc_agent/machine_ports.py``), to listen on the host and pass connections on. What is published
lives as long as the returned object's connection, so as long as the process that holds it.
"""

import json
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType

from fc_agent.protocol import LOOPBACK_PRIORITY
from fc_agent.structs import Struct, asdict
from fcvm import hostpath
from fcvm.errors import ConflictError, MachineError
from fcvm.machine.addresses import GATEWAY
from fcvm.network.spec import Loopback

HOST_LOOPBACK = Loopback((GATEWAY,), priority=LOOPBACK_PRIORITY)
PORTS_SOCKET = Path("/run/fcvm/ports.sock")
ANSWER_TIME = 60.0  # seconds; the host may be busy


class Port(Struct):
    """What arrives at ``host_ip:host_port`` of the user's host goes to ``port`` of the machine.

    ``host_ip`` is empty for every address of the host, ``host_port`` 0 for any free one.

    The machine's listener must accept what comes to the machine's own address: 0.0.0.0, whatever ``host_ip`` says.
    """

    protocol: str
    host_ip: str
    host_port: int
    port: int


def here() -> bool:
    """Whether this process runs in a machine."""
    return PORTS_SOCKET.exists()


def host_address() -> IPv4Address | None:
    """The user's host's own address; None if it has none but those of its loopback."""
    text = os.environ.get(hostpath.HOST_ADDRESS)
    return IPv4Address(text) if text else None


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
        ConflictError: one is taken there, needs rights that the user does not have, or the host has no such address.
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
            raise ConflictError(answer["error"], hint=answer.get("hint"))
        connection.settimeout(None)
        return Published(connection, answer["ports"])
    except BaseException:
        connection.close()
        raise
