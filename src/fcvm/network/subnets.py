"""A subnet of its own for every VM's uplink, out of 172.30.0.0/16, never one that the host routes somewhere.

The name of the host's interface, ``fcvm<number>``, says which /30 it is, and the kernel lets nobody make the same name twice:
that is the lock, shared by all users and data directories, and it is given back when the interface goes. Whether a subnet
is in use otherwise is asked of the kernel's routing for its two addresses, which costs the same with any number of routes.
"""

import zlib
from collections.abc import Iterator
from ipaddress import IPv4Interface, IPv4Network, IPv6Address, IPv6Interface

from fc_agent.structs import Struct
from fcvm.errors import NetworkError
from fcvm.linux import netlink, rtnetlink

PREFIX = "fcvm"
# the second and third, for hosts that use the first, are set aside for tests between networks (RFC 2544)
POOLS = (IPv4Network("172.30.0.0/16"), IPv4Network("198.18.0.0/16"), IPv4Network("198.19.0.0/16"))
SIZE = 1 << 14  # /30 subnets in a pool
POOL6 = int(IPv6Address("fd66:6376:6d01::"))
_DEFAULT = 8  # a route that is no longer than this is a default route, whole or in halves


class Subnet(Struct):
    """The link between the host and one namespace; ``number`` counts through all pools."""

    number: int

    @property
    def interface(self) -> str:
        """The name of the host's end."""
        return f"{PREFIX}{self.number}"

    @property
    def host(self) -> IPv4Interface:
        """The host's address."""
        return self._address(1)

    @property
    def inner(self) -> IPv4Interface:
        """The namespace's address."""
        return self._address(2)

    @property
    def host6(self) -> IPv6Interface:
        """The host's IPv6 address."""
        return IPv6Interface((POOL6 + (self.number << 64) + 1, 64))

    @property
    def inner6(self) -> IPv6Interface:
        """The namespace's IPv6 address."""
        return IPv6Interface((POOL6 + (self.number << 64) + 2, 64))

    def _address(self, which: int) -> IPv4Interface:
        pool, index = divmod(self.number, SIZE)
        return IPv4Interface((int(POOLS[pool].network_address) + 4 * index + which, 30))


def candidates(route: netlink.Socket, vm_id: str) -> Iterator[Subnet]:
    """Subnets that the host does not route, in an order of the VM's own; whoever makes the interface has it.

    Raises (when there are no more):
        NetworkError: the host routes all of them.
    """
    start = zlib.crc32(vm_id.encode())
    for number, pool in enumerate(POOLS):
        for step in range(SIZE):
            subnet = Subnet(number * SIZE + (start + step) % SIZE)
            taken = _routed(route, subnet)
            if taken is None:
                yield subnet
            elif taken.prefixlen <= pool.prefixlen:
                break  # the whole pool
    raise NetworkError(
        f"No subnet is left for the VM: this host routes {', '.join(map(str, POOLS))} itself.",
        hint="--network rootless needs none",
    )


def _routed(route: netlink.Socket, subnet: Subnet) -> IPv4Network | None:
    for interface in (subnet.host, subnet.inner):
        found = rtnetlink.match(route, interface.ip)
        if found is not None and found.destination.prefixlen >= _DEFAULT:
            assert isinstance(found.destination, IPv4Network)
            return found.destination
    return None
