"""Why a published port of a VM refuses: a service that listens on the guest's loopback only is not reached from outside."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from fcvm import log
from fcvm.agent import session
from fcvm.errors import AgentError
from fcvm.vm import sessions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST = 16 << 20  # bytes of these tables: 100,000 connections
LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


class Refusals:
    """The published ports at which a VM's guest refuses connections, for its supervisor."""

    def __init__(self, name: str, directory: Path, shown: list[dict[str, Any]]) -> None:
        """
        Arguments:
            shown: the ports as `fcvm ls` shows them; ``loopback_only`` is noted there.
        """
        self._name = name
        self._directory = directory
        self._shown = shown
        self._looking = threading.Lock()
        self._told: set[int] = set()  # of which the user was told

    def look(self, ports: Collection[int], ask: Callable[[dict[str, Any]], None]) -> None:
        """Ask the guest why it refuses, in another thread, as that takes a while; ``ask`` is told which are unreachable."""

        def find_out() -> None:
            try:
                with contextlib.suppress(AgentError, OSError, ValueError):  # it is not there yet, or no more; or tells nonsense
                    ask({"op": "unreachable", "ports": on_loopback_only(self._directory, ports)})
            finally:
                self._looking.release()

        if not self._looking.acquire(blocking=False):
            return  # a guest may take as long as it likes to answer
        threading.Thread(target=find_out, name="listeners", daemon=True).start()

    def note(self, ports: Collection[int], *, loopback_only: bool) -> None:
        """Show it of these ports, and tell the user, once of each."""
        for port in sorted(set(ports) - self._told) if loopback_only else ():
            log.warning(
                f"Port {port} is published, but what listens on it in {self._name} does so on the loopback only; "
                "have it listen on 0.0.0.0."
            )
            self._told.add(port)
        for shown in self._shown:
            if shown["protocol"] == "tcp" and shown["guest_port"] in ports:
                shown["loopback_only"] = loopback_only


def on_loopback_only(directory: Path, ports: Collection[int]) -> list[int]:
    """Those of ``ports`` on which the VM in ``directory`` listens on its loopback and nowhere else.

    Raises:
        AgentError, OSError: the guest does not tell.
    """
    request = session.Request(["cat", "/proc/net/tcp", "/proc/net/tcp6"], target="vm")
    _, output = sessions.output(directory, request, most=MOST)
    listening = parse(output.decode(errors="replace"))
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
