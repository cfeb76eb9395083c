"""Ends the TCP connections that a restored VM has from its former life (sock_diag(7), SOCK_DESTROY).

Their other ends belong to the VM that the snapshot was taken of. Without this a program would wait for minutes for an
answer that cannot come; so it gets ECONNABORTED at once. Connections over the loopback interface stay.
"""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

# <linux/sock_diag.h>, <linux/netlink.h>, <linux/inet_diag.h>, <net/tcp_states.h>
NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 1, 4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
TCP_LISTEN, TCP_CLOSE, TCP_TIME_WAIT = 10, 7, 6
CONNECTED = 0xFFF & ~(1 << TCP_LISTEN | 1 << TCP_CLOSE | 1 << TCP_TIME_WAIT)

SOCKET_ID = slice(4, 52)  # of inet_diag_msg: ports, addresses, interface, cookie
ADDRESSES = 4  # offset of the source address in it


def destroy_connections() -> int:
    """Abort every TCP connection to another host; returns how many there were. A kernel that cannot says 0."""
    count = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            for identity in list(_connections(family)):
                with contextlib.suppress(OSError):
                    _destroy(family, identity)
                    count += 1
    return count


def _connections(family: int) -> Iterator[bytes]:
    with _open() as netlink:
        _send(netlink, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, _request(family, bytes(48)))
        while True:
            data = netlink.recv(1 << 16)
            while len(data) >= 16:
                length, kind = struct.unpack_from("IH", data)
                if kind in (NLMSG_DONE, NLMSG_ERROR):
                    return
                identity = data[16:length][SOCKET_ID]
                size = 4 if family == socket.AF_INET else 16
                if not _is_loopback(identity[ADDRESSES : ADDRESSES + size]):
                    yield identity
                data = data[(length + 3) & ~3 :]


def _destroy(family: int, identity: bytes) -> None:
    with _open() as netlink:
        _send(netlink, SOCK_DESTROY, NLM_F_ACK, _request(family, identity))
        (code,) = struct.unpack_from("i", netlink.recv(1 << 16), 16)
        if code:
            raise OSError(-code, os.strerror(-code))


def _open() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)


def _send(netlink: socket.socket, kind: int, flags: int, body: bytes) -> None:
    netlink.send(struct.pack("IHHII", 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0) + body)


def _request(family: int, identity: bytes) -> bytes:
    """``struct inet_diag_req_v2``."""
    return struct.pack("BBBBI", family, socket.IPPROTO_TCP, 0, 0, CONNECTED) + identity


def _is_loopback(address: bytes) -> bool:
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return parsed.ipv4_mapped.is_loopback
    return parsed.is_loopback
