"""Bridged networking, for root: a veth pair, a /30 of its own, and one nftables table on the host.

    guest -- tap0 [ namespace ] up0 -- fcvm<N> [ host: NAT ] -- the world

The host's table is owned by a socket of this process and the veth by the namespace, so both are gone when this process and
Firecracker are, however they ended. Published ports are translated by the kernel, from other hosts, from the host's own
addresses and from localhost; what it does not translate (IPv6 clients) arrives at the sockets that hold the ports and is
relayed.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Interface, ip_address, ip_network

from fc_agent.structs import Struct, field
from fcvm.errors import NetworkError
from fcvm.linux import conntrack, namespaces, netlink, nft, rtnetlink, tap
from fcvm.linux.namespaces import Namespace
from fcvm.linux.netlink import NetlinkError
from fcvm.linux.rtnetlink import DEVCONF_FORWARDING, DEVCONF_ROUTE_LOCALNET
from fcvm.network import firewall, guest, host, inner, relay
from fcvm.network.inner import Uplink
from fcvm.network.loop import Loop
from fcvm.network.ports import Reservation
from fcvm.network.publish import Publish
from fcvm.network.spec import NetworkSpec
from fcvm.network.subnets import PREFIX, Subnet, candidates

LOOPBACK = ip_network("127.0.0.0/8")
MTU = 1500  # bytes, where the host has no default route to take it from
_MTUS = (1280, 9000)  # less does not carry IPv6; more gains nothing behind segmentation offload


class Bridged(Struct):
    """A bridged network that is up: what ``attach.Network`` needs of it."""

    namespace: Namespace
    sockets: tuple[socket.socket, ...]
    mtu: int
    ipv6: bool
    families: tuple[int, ...]
    changed: tuple[str, ...]
    subnet: Subnet
    table: str
    owner: netlink.Socket
    udp: set[int] = field(default_factory=set)
    watch: tuple[tuple[int, str], ...] = ()

    @property
    def host_ip(self) -> str:
        """The address at which the host reaches the guest."""
        return str(self.subnet.inner.ip)

    @property
    def interface(self) -> str:
        """The host's interface towards the VM."""
        return self.subnet.interface

    def open(self, published: Sequence[Publish]) -> None:
        """Let more ports of the host lead to the guest."""
        public = _public(published)
        if public:
            namespaces.inside(self.namespace, lambda: inner.admit(public))
        batch = nft.Batch()
        _translate(batch, self.table, self.subnet, published)
        batch.commit(self.owner)
        self.opened(published)

    def opened(self, published: Sequence[Publish]) -> None:
        """Note what has been opened, and have packets of connections from before go there as well."""
        self.udp.update(publish.host_port for publish in published if publish.protocol == "udp")
        self.forget()

    def serve(self, reservations: Sequence[Reservation], loop: Loop) -> None:
        """Relay what arrives at the sockets that hold the ports: what the kernel does not translate, such as IPv6."""
        for reservation in reservations:
            target = relay.target(self.host_ip, reservation.publish.guest_port)
            for sock in reservation.sockets:
                relay.start(loop, sock, [target])

    def attend(self, loop: Loop) -> None:
        """Stay beside other firewalls when they change."""
        firewall.keep_open(loop, self.families)

    def forget(self) -> None:
        """Have the kernel decide anew where packets to our UDP ports go."""
        if self.udp:
            with suppress(NetlinkError), nft.open_socket() as sock, rtnetlink.open_socket() as route:
                own = {a.ip for _, a in rtnetlink.addresses(route) if isinstance(a, IPv4Interface)}
                for port in self.udp:
                    conntrack.forget_udp(sock, port, own)


@contextmanager
def bridged(spec: NetworkSpec, vm_id: str, published: Sequence[Publish]) -> Iterator[Bridged]:
    """A bridged network, until the block is left.

    Arguments:
        vm_id: names the host's table.
        published: the ports to open from the start, with the free ones decided.

    Raises:
        NetworkError: this is not root, or the kernel or a firewall refuses; nothing is left behind.
    """
    if os.geteuid() != 0:
        raise NetworkError("Bridged networking needs root.", hint="sudo fcvm ..., or --network rootless")
    with ExitStack() as undo:
        try:
            yield _set_up(spec, vm_id, published, undo)
        except NetlinkError as error:
            raise NetworkError(
                f"The VM's network could not be set up: {error.strerror}.", hint="fcvm doctor"
            ) from error


def _set_up(spec: NetworkSpec, vm_id: str, published: Sequence[Publish], undo: ExitStack) -> Bridged:
    route = undo.enter_context(rtnetlink.open_socket())
    outside = namespaces.current()
    undo.callback(os.close, outside)
    way_out = host.uplink(route)
    mtu = min(max(way_out.mtu, _MTUS[0]), _MTUS[1]) if way_out else MTU
    way_out6 = host.uplink(route, 6)
    chosen: list[Subnet] = []

    def furnish() -> list[int]:
        tap.create(guest.TAP)
        with rtnetlink.open_socket() as own:
            chosen.append(_connect(own, outside, candidates(route, vm_id), mtu))
        uplink = _uplink(chosen[0], spec, mtu, ipv6=way_out6 is not None)
        inner.configure(uplink)
        inner.translate(uplink, spec.forward_localhost, _public(published))
        inner.hasten()
        return inner.listen(spec.forward_localhost)

    namespace, fds = namespaces.create(furnish, user=False)
    subnet = chosen[0]
    undo.enter_context(namespace)
    sockets = tuple(undo.enter_context(relay.adopt(fd)) for fd in fds)

    link = rtnetlink.link(route, subnet.interface)
    assert link is not None
    undo.callback(firewall.ending, route, link.index)
    # the neighbour on this link is a namespace of ours, so 127.0.0.1 may be translated towards it
    conf = {DEVCONF_FORWARDING: 1, DEVCONF_ROUTE_LOCALNET: 1}
    route.request(
        [rtnetlink.set_link(link.index, conf=conf), rtnetlink.address(link.index, subnet.host)]
        + ([rtnetlink.address(link.index, subnet.host6)] if way_out6 else [])
    )
    changed = host.enable_forwarding()
    changed6 = host.enable_forwarding6(way_out6.name, subnet.interface) if way_out6 else None
    ipv6 = changed6 is not None
    families = (nft.IPV4, nft.IPV6) if ipv6 else (nft.IPV4,)
    added = firewall.open_up(families)
    table = f"{PREFIX}-{vm_id}"
    owner = nft.open_socket()
    up = Bridged(
        namespace=namespace,
        sockets=sockets,
        mtu=mtu,
        ipv6=ipv6,
        families=families,
        changed=(*changed, *(changed6 or ()), *added),
        subnet=subnet,
        table=table,
        owner=owner,
    )
    undo.callback(up.forget)  # once the table is gone
    undo.enter_context(owner)
    _load(owner, table, subnet, published, ipv6=ipv6)
    up.opened(published)
    return up


def _uplink(subnet: Subnet, spec: NetworkSpec, mtu: int, *, ipv6: bool) -> Uplink:
    return Uplink(
        address=subnet.inner,
        gateway=subnet.host.ip,
        host=spec.host or subnet.host.ip,
        trusted=subnet.host.ip,
        mtu=mtu,
        address6=subnet.inner6 if ipv6 else None,
        gateway6=subnet.host6 if ipv6 else None,
    )


def _connect(own: netlink.Socket, outside: int, subnets: Iterator[Subnet], mtu: int) -> Subnet:
    """Make the veth pair from inside, the other end in the host's namespace, under the first name that is free."""
    for subnet in subnets:
        try:
            own.request([rtnetlink.veth(inner.UPLINK, subnet.interface, outside, mtu=mtu)])
            return subnet
        except NetlinkError as error:
            if error.errno != errno.EEXIST:
                raise
    raise AssertionError


def _load(owner: netlink.Socket, table: str, subnet: Subnet, published: Sequence[Publish], *, ipv6: bool) -> None:
    """The host's side of the translation, in one transaction."""
    batch = nft.Batch()
    batch.table(table, owner=True)
    batch.chain(table, "postrouting", type="nat", hook=nft.POSTROUTING, priority=nft.SRCNAT)
    to_vms = nft.oifname(f"{PREFIX}*", equal=False)
    to_this = nft.oifname(subnet.interface)
    # from the guest to the world; other VMs see whom they talk to
    batch.rule(table, "postrouting", to_vms, nft.saddr(subnet.inner.ip), nft.masquerade())
    if ipv6:
        batch.rule(table, "postrouting", to_vms, nft.saddr(subnet.inner6.ip), nft.masquerade())
    # from localhost, and from the guest back to itself through a published port
    batch.rule(table, "postrouting", to_this, nft.saddr(LOOPBACK), nft.masquerade())
    batch.rule(table, "postrouting", to_this, nft.saddr(subnet.inner.ip), nft.masquerade())
    _translate(batch, table, subnet, published)
    try:
        batch.commit(owner)
    except NetlinkError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise NetworkError(
                f"The nftables of this host's kernel ({os.uname().release}) lack what bridged networking needs.",
                hint="Linux 5.12 or later with nf_tables and nft_nat, or --network rootless",
            ) from error
        if error.errno == errno.EEXIST:
            raise NetworkError(f"There is a table {table} in this host's nftables already.", hint="fcvm ls") from error
        raise


def _translate(batch: nft.Batch, table: str, subnet: Subnet, published: Sequence[Publish]) -> None:
    """Rules that send ports of the host to the namespace: for what arrives, and for what the host itself sends."""
    translated = [publish for publish in published if ":" not in publish.host_ip]
    if translated:  # a chain that is there stays as it is
        batch.chain(table, "prerouting", type="nat", hook=nft.PREROUTING, priority=nft.DSTNAT)
        batch.chain(table, "output", type="nat", hook=nft.OUTPUT, priority=nft.DSTNAT)
    for publish in translated:
        everywhere = publish.host_ip in ("", "0.0.0.0")
        to = nft.nfproto(nft.IPV4) + nft.to_this_host() if everywhere else nft.daddr(ip_address(publish.host_ip))
        port = nft.dport(publish.protocol, publish.host_port)
        for chain in ("prerouting", "output"):
            batch.rule(table, chain, to, port, nft.dnat(subnet.inner.ip, publish.guest_port))


def _public(published: Sequence[Publish]) -> list[Publish]:
    """Those that others than the host itself are translated to; relays, which serve IPv6, are the host itself."""
    return [p for p in published if not p.host_ip or not (":" in p.host_ip or ip_address(p.host_ip).is_loopback)]
