"""Rootless networking, for everyone: a user namespace, a network namespace in it, and slirp4netns as its uplink.

    guest -- tap0 [ namespace ] up0 -- slirp4netns -- sockets of an ordinary process on the host

No rights are needed, neither newuidmap nor /etc/subuid: the user namespace knows one user. The tap that slirp4netns attaches to
is made, and everything configured, before it starts, so all it does is to open it.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface
from pathlib import Path

from fc_agent.structs import Struct, field
from fcvm import process
from fcvm.errors import NetworkError
from fcvm.linux import namespaces, netlink, rtnetlink, tap
from fcvm.linux.namespaces import Namespace
from fcvm.linux.netlink import NetlinkError
from fcvm.network import address, guest, host, inner, neighbours, ports, relay
from fcvm.network import slirp as slirps
from fcvm.network.inner import Uplink
from fcvm.network.loop import Loop
from fcvm.network.ports import Reservation
from fcvm.network.publish import Publish
from fcvm.network.slirp import Slirp
from fcvm.network.spec import NetworkSpec
from fcvm.network.subnets import POOLS

_SPARE = 32  # sockets made at a time
_ANY = {"": "0.0.0.0"}


class Rootless(Struct):
    """A rootless network that is up: what ``attach.Network`` needs of it."""

    namespace: Namespace
    sockets: tuple[socket.socket, ...]
    ipv6: bool
    slirp: Slirp
    uplink: Uplink
    mtu: int = slirps.MTU
    changed: tuple[str, ...] = ()
    host_ip: str | None = None
    interface: str | None = None
    spare: list[socket.socket] = field(default_factory=list)

    @property
    def watch(self) -> tuple[tuple[int, str], ...]:
        """slirp4netns: without it the VM is cut off."""
        return ((self.slirp.pidfd, slirps.DIED),)

    def open(self, published: Sequence[Publish]) -> None:
        """The namespace lets in what slirp4netns brings; ``serve`` does the rest."""

    def attend(self, loop: Loop) -> None:
        """Keep the guest away from bridged VMs, those that are there and those that come."""
        neighbours.keep_away(loop, self.namespace)

    def serve(self, reservations: Sequence[Reservation], loop: Loop) -> None:
        """Let ports of the host lead to the guest.

        TCP by slirp4netns, which shows the guest who connects, and IPv6 by a relay to slirp4netns; UDP by a relay.
        """
        behind: list[tuple[socket.socket, relay.Target]] = []
        with ExitStack() as undo:  # all of what may be refused comes first
            for reservation in reservations:
                if reservation.publish.protocol == "tcp":
                    target = self._forward(reservation, undo)
                    behind += [(held, target) for held in reservation.sockets if held.family == socket.AF_INET6]
            undo.pop_all()
        for held, target in behind:
            relay.start(loop, held, [target])
        for reservation in reservations:
            if reservation.publish.protocol == "udp":
                to_guest = relay.target(str(guest.ADDRESS.ip), reservation.publish.guest_port)
                for held in reservation.sockets:
                    relay.udp(loop, held, to_guest, self._datagram)

    def _forward(self, reservation: Reservation, undo: ExitStack) -> relay.Target:
        """Have slirp4netns listen for a port, and say where."""
        publish = reservation.publish
        ip, port = _ANY.get(publish.host_ip, publish.host_ip), publish.host_port
        if ":" in ip:  # it knows IPv4 only: any free port of the loopback, for a relay to connect to
            (behind,) = ports.reserve([Publish("127.0.0.1", 0, publish.guest_port)])
            behind.close()
            ip, port = "127.0.0.1", behind.publish.host_port
        for held in reservation.sockets:
            if held.family == socket.AF_INET:
                held.close()  # it binds the port itself
        number = self.slirp.forward(ip, port, str(self.uplink.address.ip), publish.guest_port)
        undo.callback(self.slirp.forget, number)
        return relay.target("127.0.0.1" if ip == "0.0.0.0" else ip, port)

    def _datagram(self) -> socket.socket:
        """A UDP socket of the namespace; making one takes a fork, so they are made in numbers."""
        if not self.spare:
            fds = namespaces.inside(self.namespace, lambda: inner.datagrams(_SPARE))
            self.spare.extend(relay.adopt(fd) for fd in fds)
        return self.spare.pop()

    def close_spare(self) -> None:
        """Close the sockets that no client has needed."""
        for sock in self.spare:
            sock.close()


@contextmanager
def rootless(spec: NetworkSpec, directory: Path) -> Iterator[Rootless]:
    """A rootless network, until the block is left.

    Raises:
        HostError: slirp4netns or /dev/net/tun is missing, or this host refuses user namespaces.
        NetworkError: slirp4netns or the kernel refuses; nothing is left behind.
    """
    process.find("slirp4netns")
    with ExitStack() as undo:
        try:
            yield _set_up(spec, directory, undo)
        except NetlinkError as error:
            raise NetworkError(
                f"The VM's network could not be set up: {error.strerror}.", hint="fcvm doctor"
            ) from error


def _set_up(spec: NetworkSpec, directory: Path, undo: ExitStack) -> Rootless:
    with rtnetlink.open_socket() as route:
        network = _network(route)
        ipv6 = host.uplink(route, 6) is not None
    uplink = Uplink(
        address=IPv4Interface((network[slirps.ADDRESS], 24)),
        gateway=network[slirps.GATEWAY],
        host=spec.host or address.own(),
        trusted=None,
        mtu=slirps.MTU,
        address6=IPv6Interface(slirps.ADDRESS6) if ipv6 else None,
        gateway6=IPv6Interface(slirps.GATEWAY6) if ipv6 else None,
    )

    def furnish() -> list[int]:
        tap.create(guest.TAP)
        tap.create(inner.UPLINK, vnet_header=False)
        inner.configure(uplink)
        inner.translate(uplink, spec.forward_localhost)
        return inner.listen(spec.forward_localhost)

    namespace, fds = namespaces.create(furnish, user=True)
    undo.enter_context(namespace)
    sockets = tuple(undo.enter_context(relay.adopt(fd)) for fd in fds)
    helper = undo.enter_context(slirps.slirp(namespace, inner.UPLINK, network, directory, ipv6=ipv6))
    up = Rootless(namespace, sockets, ipv6, helper, uplink)
    undo.callback(up.close_spare)
    return up


def _network(route: netlink.Socket) -> IPv4Network:
    """A /24 for slirp4netns that hides no network of the host's from the guest."""
    for pool in POOLS:
        for third in (255, 127, 63):
            network = IPv4Network((int(pool.network_address) + (third << 8), 24))
            found = [rtnetlink.match(route, ip) for ip in (network[slirps.GATEWAY], network[slirps.ADDRESS])]
            if not any(route and route.destination.prefixlen >= 8 for route in found):
                return network
    return IPv4Network((int(POOLS[-1].network_address), 24))
