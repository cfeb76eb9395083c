"""Why a published port of a VM refuses: a service that listens on the guest's loopback only is not reached from outside."""

from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from fcvm.agent import session
from fcvm.vm import sessions

LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


def on_loopback_only(directory: Path, ports: Collection[int]) -> list[int]:
    """Those of ``ports`` on which the VM in ``directory`` listens on its loopback and nowhere else.

    Raises:
        AgentError, OSError: the guest does not tell.
    """
    output: list[bytes] = []
    sessions.stream(
        directory,
        session.Request(["cat", "/proc/net/tcp", "/proc/net/tcp6"], target="vm"),
        stdin=None,
        on_output=lambda _, data: output.append(data),
    )
    listening = parse(b"".join(output).decode(errors="replace"))
    return [port for port in sorted(ports) if listening.get(port) == {True}]


def parse(text: str) -> dict[int, set[bool]]:
    """For each port that is listened on in /proc/net/tcp or tcp6, whether at addresses of the loopback (True), others."""
    found: dict[int, set[bool]] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) > 3 and words[3] == LISTEN:
            address, _, port = words[1].rpartition(":")
            found.setdefault(int(port, 16), set()).add(_is_loopback(address))
    return found


def _is_loopback(text: str) -> bool:
    """An address as the kernel prints it: 32-bit words of the host's byte order."""
    packed = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    return IPv4Address(packed).is_loopback if len(packed) == 4 else _loopback6(IPv6Address(packed))


def _loopback6(address: IPv6Address) -> bool:
    return address.ipv4_mapped.is_loopback if address.ipv4_mapped else address.is_loopback
