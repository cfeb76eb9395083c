"""What every guest's network looks like, in every mode and on every host: it never changes.

The guest is 10.0.2.100 behind the gateway 10.0.2.2 with a resolver at 10.0.2.3; the namespace around it translates. So a
snapshot made in one mode restores in another, and a clone needs no new address inside. The MACs are fixed as well: a clone's
neighbour cache, which is its template's, is right.
"""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv6Interface

from fc_agent.structs import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

TAP = "tap0"
MAC = "aa:fc:00:00:00:64"
GATEWAY_MAC = "aa:fc:00:00:00:02"
ADDRESS = IPv4Interface("10.0.2.100/24")
GATEWAY = IPv4Interface("10.0.2.2/24")
RESOLVER = IPv4Interface("10.0.2.3/24")
# unique local addresses (RFC 4193): "fcvm" in ASCII
ADDRESS6 = IPv6Interface("fd66:6376:6d00::100/64")
GATEWAY6 = IPv6Interface("fd66:6376:6d00::2/64")
HOST_NAMES = ("host.containers.internal", "host.docker.internal")


class Guest(Struct):
    """What the agent is to configure on ``eth0``: addresses with their prefix lengths, names, and the MTU in bytes.

    ``gateway6`` is None where the host has no IPv6 route; the addresses are always given, so that nothing in the guest
    changes when it moves.
    """

    address: str
    gateway: str
    address6: str
    gateway6: str | None
    mac: str
    mtu: int
    dns: tuple[str, ...]
    search: tuple[str, ...]
    options: tuple[str, ...]
    hosts: dict[str, str]

    def json(self) -> dict[str, Any]:
        """As the agent is sent it."""
        return {
            "address": self.address,
            "gateway": self.gateway,
            "address6": self.address6,
            "gateway6": self.gateway6,
            "mac": self.mac,
            "mtu": self.mtu,
            "dns": list(self.dns),
            "search": list(self.search),
            "options": list(self.options),
            "hosts": dict(self.hosts),
        }


def guest(*, mtu: int, search: tuple[str, ...] = (), options: tuple[str, ...] = (), ipv6: bool = False) -> Guest:
    """The guest's network; only what is asked for here differs from host to host."""
    return Guest(
        address=str(ADDRESS),
        gateway=str(GATEWAY.ip),
        address6=str(ADDRESS6),
        gateway6=str(GATEWAY6.ip) if ipv6 else None,
        mac=MAC,
        mtu=mtu,
        dns=(str(RESOLVER.ip),),
        search=search,
        options=options,
        hosts=dict.fromkeys(HOST_NAMES, str(GATEWAY.ip)),
    )
