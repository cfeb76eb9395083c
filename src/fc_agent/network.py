"""The guest's network, by rtnetlink (rtnetlink(7), netlink(7)): ``ip`` would take longer to start than all of this."""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

from fc_agent import linux
from fc_agent.protocol import NetworkPlan

INTERFACE = "eth0"

# <linux/rtnetlink.h>, <linux/netlink.h>
RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_DELROUTE, RTM_DELNEIGH, RTM_GETNEIGH = 16, 20, 24, 25, 29, 30
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE, NLM_F_DUMP = 1, 4, 0x100, 0x400, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
IFLA_MTU, IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS, RTA_OIF, RTA_GATEWAY, NDA_DST = 4, 1, 2, 8, 4, 5, 1
IFF_UP = 1
IFA_F_NODAD = 2  # nobody else has our address: the namespace is ours
RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST = 254, 3, 0, 1
NUD_PERMANENT, NUD_NOARP = 0x80, 0x40
ETH_P_ARP, ETH_P_IP = 0x806, 0x800

# These are bind-mounted into the container, and linked from the guest's /etc: written in place, both see it.
FILES = "/run/fcvm/etc"
HOSTS, RESOLV_CONF, HOSTNAME = f"{FILES}/hosts", f"{FILES}/resolv.conf", f"{FILES}/hostname"


class Netlink:
    """One rtnetlink socket."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, 0))

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, body: bytes) -> None:
        """Send a request and wait for its acknowledgement; raises OSError."""
        self._send(kind, flags | NLM_F_ACK, body)
        for answer, content in self._messages():
            if answer == NLMSG_ERROR:
                (code,) = struct.unpack_from("i", content)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Every object of a kind."""
        self._send(kind, NLM_F_DUMP, body)
        return [content for answer, content in self._messages() if answer not in (NLMSG_ERROR, NLMSG_DONE)]

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._socket.send(struct.pack("IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)

    def _messages(self) -> Iterator[tuple[int, bytes]]:
        while True:
            data = self._socket.recv(1 << 16)
            while len(data) >= 16:
                length, kind = struct.unpack_from("IH", data)
                yield kind, data[16:length]
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                data = data[(length + 3) & ~3 :]


def attribute(kind: int, value: bytes) -> bytes:
    """A netlink attribute with its padding."""
    return struct.pack("HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def present() -> bool:
    """Whether the VM has a network interface at all."""
    return os.path.exists(f"/sys/class/net/{INTERFACE}")


def configure(plan: NetworkPlan) -> None:
    """Give ``eth0`` its addresses, routes and MTU; doing it again changes nothing. Raises OSError."""
    if not present():
        return
    index = socket.if_nametoindex(INTERFACE)
    with Netlink() as netlink:
        link = struct.pack("BxHiII", socket.AF_UNSPEC, 0, index, IFF_UP, IFF_UP)
        netlink.request(RTM_NEWLINK, 0, link + attribute(IFLA_MTU, struct.pack("I", plan.mtu)))
        for address, gateway in ((plan.address, plan.gateway), (plan.address6, plan.gateway6)):
            if address is not None:
                # IPv6 may be off in this kernel; the rest works without it.
                with contextlib.suppress(OSError) if ":" in address else contextlib.nullcontext():
                    _add_address(netlink, index, address, gateway)


def _add_address(netlink: Netlink, index: int, address: str, gateway: str | None) -> None:
    interface = ipaddress.ip_interface(address)
    family = socket.AF_INET if interface.version == 4 else socket.AF_INET6
    packed = interface.ip.packed
    body = struct.pack("BBBBI", family, interface.network.prefixlen, IFA_F_NODAD, RT_SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
    netlink.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body)
    default = struct.pack("BBBBBBBBI", family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    default += attribute(RTA_OIF, struct.pack("I", index))
    if gateway is not None:
        default += attribute(RTA_GATEWAY, ipaddress.ip_address(gateway).packed)
        netlink.request(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, default)
    else:  # the VM that a snapshot is of may have had one
        with contextlib.suppress(ProcessLookupError):
            netlink.request(RTM_DELROUTE, 0, default)


def forget_neighbours() -> None:
    """Empty the neighbour table: in a restored VM it tells of the network that the snapshot was taken in."""
    if not present():
        return
    index = socket.if_nametoindex(INTERFACE)
    with Netlink() as netlink:
        for entry in netlink.dump(RTM_GETNEIGH, struct.pack("BxxxiHBB", socket.AF_UNSPEC, index, 0, 0, 0)):
            _, where, state, _, _ = struct.unpack_from("BxxxiHBB", entry)
            if where == index and not state & (NUD_PERMANENT | NUD_NOARP):
                with contextlib.suppress(OSError):
                    netlink.request(RTM_DELNEIGH, 0, entry)


def announce(plan: NetworkPlan) -> None:
    """Tell the network who has our address now: a gratuitous ARP request (RFC 5227, 3)."""
    if not present():
        return
    with open(f"/sys/class/net/{INTERFACE}/address") as file:
        mac = bytes.fromhex(file.read().strip().replace(":", ""))
    address = ipaddress.ip_interface(plan.address).ip.packed
    packet = struct.pack("!HHBBH", 1, ETH_P_IP, 6, 4, 1) + mac + address + bytes(6) + address
    with contextlib.suppress(OSError), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((INTERFACE, 0))
        raw.send(b"\xff" * 6 + mac + struct.pack("!H", ETH_P_ARP) + packet)


def write_files(plan: NetworkPlan | None, hostname: str) -> None:
    """/etc/hosts, /etc/resolv.conf and /etc/hostname, for the guest and its container."""
    os.makedirs(FILES, exist_ok=True)
    hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    resolver = []
    if plan is not None and present():
        hosts.append(f"{ipaddress.ip_interface(plan.address).ip} {hostname}")
        hosts += [f"{address} {name}" for name, address in plan.hosts.items()]
        resolver += [f"nameserver {server}" for server in plan.dns]
        resolver += [f"search {' '.join(plan.search)}"] if plan.search else []
        resolver += [f"options {' '.join(plan.options)}"] if plan.options else []
    else:
        hosts.append(f"127.0.1.1 {hostname}")
    for path, lines in ((HOSTS, hosts), (RESOLV_CONF, resolver), (HOSTNAME, [hostname])):
        link = f"/etc/{os.path.basename(path)}"
        linux.write(path, "".join(f"{line}\n" for line in lines))
        if not os.path.islink(link) or os.readlink(link) != path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(link)
            os.symlink(path, link)
