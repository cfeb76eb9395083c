"""Forgetting connections that the kernel tracks (``linux/netfilter/nfnetlink_conntrack.h``).

Translation is decided at the first packet and remembered. A UDP client that just goes on keeps that memory alive, so its
packets would go where they went before a port was published, or to a VM that is gone.
"""

import ipaddress
import socket
import struct
from collections.abc import Collection

from fcvm.linux import netlink
from fcvm.linux.netlink import NLM_F_ACK, Message, NetlinkError, attribute, attributes, nested

NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1, 2
CTA_TUPLE_ORIG, CTA_FILTER = 1, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_DST = 2
CTA_PROTO_NUM, CTA_PROTO_DST_PORT = 1, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
# net/netfilter/nf_internals.h: what of the tuple is to be compared
_PROTO_NUM, _PROTO_DST_PORT = 1 << 3, 1 << 5


def forget_udp(sock: netlink.Socket, port: int, addresses: Collection[ipaddress.IPv4Address]) -> int:
    """Forget the UDP connections that were opened to this port of one of these addresses; returns how many.

    Arguments:
        sock: an nfnetlink socket of the namespace (``nft.open_socket``).

    Raises:
        NetlinkError: the kernel has no connection tracking, or (before Linux 5.8) cannot filter it.
    """
    protocol = nested(
        CTA_TUPLE_PROTO,
        attribute(CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP])),
        attribute(CTA_PROTO_DST_PORT, struct.pack(">H", port)),
    )
    flags = struct.pack("=I", _PROTO_NUM | _PROTO_DST_PORT)
    wanted = nested(CTA_TUPLE_ORIG, protocol) + nested(
        CTA_FILTER, attribute(CTA_FILTER_ORIG_FLAGS, flags), attribute(CTA_FILTER_REPLY_FLAGS, bytes(4))
    )
    head = bytes([socket.AF_INET, 0, 0, 0])  # struct nfgenmsg
    forgotten = 0
    for _, body in sock.dump(Message(_type(IPCTNL_MSG_CT_GET), 0, head + wanted)):
        original = attributes(body[4:])[CTA_TUPLE_ORIG]
        destination = attributes(attributes(original)[CTA_TUPLE_IP])[CTA_IP_V4_DST]
        if ipaddress.IPv4Address(destination) in addresses:
            try:
                delete = head + nested(CTA_TUPLE_ORIG, original)
                sock.request([Message(_type(IPCTNL_MSG_CT_DELETE), NLM_F_ACK, delete)])
                forgotten += 1
            except NetlinkError:
                continue  # it has just ended
    return forgotten


def _type(kind: int) -> int:
    return NFNL_SUBSYS_CTNETLINK << 8 | kind
