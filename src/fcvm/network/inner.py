"""Inside a VM's namespace: the tap towards the guest, the translation, and the sockets that serve the guest.

Both modes have the same inside. What differs is the uplink: the end of a veth pair (bridged) or the tap of slirp4netns
(rootless), always called ``up0``.

    guest 10.0.2.100 -- tap0 10.0.2.2 [ namespace: NAT ] up0 -- the host
                             10.0.2.3 resolver

What leaves by up0 has up0's address; what the host sends to that address goes to the guest. The gateway's address stands for
the host: it is translated to an address of the host, except for the ports of ``--forward-localhost``, where a relay of ours
listens and connects to the host's loopback from outside.
"""

import os
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

from fc_agent.structs import Struct
from fcvm.linux import netlink, nft, rtnetlink
from fcvm.linux.netlink import Message, NetlinkError
from fcvm.linux.rtnetlink import DEVCONF_FORWARDING
from fcvm.network import guest, refusals
from fcvm.network.publish import Publish
from fcvm.network.spec import Port

UPLINK = "up0"
TABLE, FLOWS = "fcvm", "established"
HAS_FLOWS = "/proc/sys/net/netfilter/nf_flowtable_tcp_timeout"  # there if the kernel has flowtables, once it tracks connections
# No destinations of packets (RFC 4291, 2.5.2 to 2.5.5), but of sockets: one of slirp4netns that connects to them is connected to
# the IPv4 address in it, or to the host's loopback.
NOWHERE = (IPv6Network("::/96"), IPv6Network("::ffff:0:0/96"))
LOOPBACK = 1  # the first interface of every namespace
DNS_PORT = 53
_BACKLOG = 128


class Uplink(Struct):
    """``up0``'s addresses, its gateways, and how the host is reached.

    Attributes:
        host: what the gateway's address 10.0.2.2 is translated to; None where nothing is known to stand for the host.
        trusted: an address from which every port of the guest may be reached; None: from any that come through up0.
    """

    address: IPv4Interface
    gateway: IPv4Address
    host: IPv4Address | None
    trusted: IPv4Address | None
    mtu: int
    address6: IPv6Interface | None = None
    gateway6: IPv6Interface | None = None


def configure(uplink: Uplink) -> None:
    """Bring lo, tap0 and up0 up, with addresses and routes; both must exist. In the namespace.

    Raises:
        NetlinkError: the kernel refused something.
    """
    tap, up = socket.if_nametoindex(guest.TAP), socket.if_nametoindex(UPLINK)
    forward = {DEVCONF_FORWARDING: 1}
    messages: list[Message] = [
        rtnetlink.set_link(LOOPBACK),
        rtnetlink.set_link(tap, mtu=uplink.mtu, mac=guest.GATEWAY_MAC, conf=forward),
        rtnetlink.set_link(up, mtu=uplink.mtu, conf=forward),
        rtnetlink.address(tap, guest.GATEWAY),
        rtnetlink.address(tap, guest.RESOLVER),
        rtnetlink.neighbour(tap, guest.ADDRESS.ip, guest.MAC),
        rtnetlink.address(up, uplink.address),
        rtnetlink.default_route(uplink.gateway, up),
    ]
    with rtnetlink.open_socket() as route:
        route.request(messages)
        _configure6(route, uplink, tap, up)


def _configure6(route: netlink.Socket, uplink: Uplink, tap: int, up: int) -> None:
    """The same for IPv6. Without an uplink for it the guest is told at once that there is no route; it need not wait."""
    try:
        Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
        route.request([rtnetlink.address(tap, guest.GATEWAY6), rtnetlink.neighbour(tap, guest.ADDRESS6.ip, guest.MAC)])
    except OSError:
        if uplink.address6 is None:  # a kernel without IPv6
            return
        raise
    if uplink.address6 and uplink.gateway6:
        route.request([rtnetlink.address(up, uplink.address6), rtnetlink.default_route(uplink.gateway6.ip, up)])


def translate(uplink: Uplink, forwarded: Iterable[Port], published: Iterable[Publish] = ()) -> None:
    """Load the namespace's table. In the namespace.

    Arguments:
        forwarded: ports of the gateway's address that relays of ours listen on.
        published: ports of the guest that everybody may reach, not only ``uplink.trusted``.

    Raises:
        NetlinkError: the kernel refused something.
    """
    to_guest = nft.dnat(guest.ADDRESS.ip)
    batch = nft.Batch()
    batch.table(TABLE)
    batch.chain(TABLE, "prerouting", type="nat", hook=nft.PREROUTING, priority=nft.DSTNAT)
    source = [nft.saddr(uplink.trusted)] if uplink.trusted else [nft.nfproto(nft.IPV4)]
    batch.rule(TABLE, "prerouting", nft.iifname(UPLINK), *source, to_guest)
    from_guest = [nft.iifname(guest.TAP), nft.daddr(guest.GATEWAY.ip)]
    for port in forwarded:
        match = nft.dport(port.protocol, port.number)
        batch.rule(TABLE, "prerouting", *from_guest, match, nft.verdict(nft.ACCEPT))
    if uplink.host is not None:
        for protocol in nft.PROTOCOLS:
            batch.rule(TABLE, "prerouting", *from_guest, nft.l4proto(protocol), nft.dnat(uplink.host))
    _admit(batch, published)
    batch.chain(TABLE, "postrouting", type="nat", hook=nft.POSTROUTING, priority=nft.SRCNAT)
    batch.rule(TABLE, "postrouting", nft.oifname(UPLINK), nft.nfproto(nft.IPV4), nft.snat(uplink.address.ip))
    if uplink.address6:
        batch.rule(TABLE, "postrouting", nft.oifname(UPLINK), nft.nfproto(nft.IPV6), nft.snat(uplink.address6.ip))
    # the relays that listen here are for the guest alone
    batch.chain(TABLE, "input", type="filter", hook=nft.INPUT, priority=nft.FILTER)
    for protocol in nft.PROTOCOLS:
        batch.rule(TABLE, "input", nft.iifname(UPLINK), nft.l4proto(protocol), nft.verdict(nft.DROP))
    batch.chain(TABLE, "forward", type="filter", hook=nft.FORWARD, priority=nft.FILTER, policy=nft.DROP)
    accept = nft.verdict(nft.ACCEPT)
    batch.rule(TABLE, "forward", nft.ct_state("established", "related"), accept)
    for network in NOWHERE:
        batch.rule(TABLE, "forward", nft.iifname(guest.TAP), nft.daddr(network), nft.verdict(nft.DROP))
    batch.rule(TABLE, "forward", nft.iifname(guest.TAP), nft.oifname(UPLINK), accept)
    batch.rule(TABLE, "forward", nft.iifname(UPLINK), nft.oifname(guest.TAP), nft.ct_dnat(), accept)
    with nft.open_socket() as sock:
        batch.commit(sock)


def hasten() -> None:
    """Have packets of established connections pass from one device to the other past all rules and routing. Throughput through the
    namespace is that of a bare tap then: 0.99 and 1.06 there and back, 0.73 and 0.83 without (by CPU time, emulated).
    What is added to the rules later, as by ``refuse``, is not asked about such connections. In the namespace, after ``translate``.
    """
    if not os.path.exists(HAS_FLOWS):  # to try in vain would cost 15 ms
        return
    batch = nft.Batch()
    batch.flowtable(TABLE, FLOWS, [guest.TAP, UPLINK])
    batch.rule(TABLE, "forward", nft.ct_state("established"), nft.flow_add(FLOWS), first=True)
    with suppress(NetlinkError), nft.open_socket() as sock:  # its module may be missing
        batch.commit(sock)


def admit(published: Iterable[Publish]) -> list[int]:
    """Let everybody reach more ports of the guest; opens no fd. In the namespace."""
    batch = nft.Batch()
    _admit(batch, published)
    with nft.open_socket() as sock:
        batch.commit(sock)
    return []


def refuse(networks: Iterable[IPv4Network]) -> list[int]:
    """Keep the guest from ``networks``; opens no fd. In the namespace."""
    batch = nft.Batch()  # ahead of chain "forward", whose verdicts are for packets that pass this one
    batch.chain(TABLE, "refuse", type="filter", hook=nft.FORWARD, priority=nft.FILTER - 1)
    for network in networks:
        batch.rule(TABLE, "refuse", nft.iifname(guest.TAP), nft.daddr(network), nft.verdict(nft.DROP))
    with nft.open_socket() as sock:
        batch.commit(sock)
    return []


def _admit(batch: nft.Batch, published: Iterable[Publish]) -> None:
    for publish in published:
        match = nft.nfproto(nft.IPV4) + nft.dport(publish.protocol, publish.guest_port)
        batch.rule(TABLE, "prerouting", nft.iifname(UPLINK), match, nft.dnat(guest.ADDRESS.ip))


def listen(forwarded: Sequence[Port]) -> list[int]:
    """Sockets that serve the guest: the one that notices refusals, the resolver's UDP and TCP, then one for each forwarded
    port. In the namespace.
    """
    wanted = [(guest.RESOLVER, Port(DNS_PORT, "udp")), (guest.RESOLVER, Port(DNS_PORT, "tcp"))]
    wanted += [(guest.GATEWAY, port) for port in forwarded]
    sockets = [refusals.listen()]
    for interface, port in wanted:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM)
        sock.bind((str(interface.ip), port.number))
        if port.protocol == "tcp":
            sock.listen(_BACKLOG)
        sockets.append(sock)
    return [sock.detach() for sock in sockets]


def datagrams(count: int) -> list[int]:
    """UDP sockets from which a relay writes to the guest. In the namespace."""
    return [socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach() for _ in range(count)]
