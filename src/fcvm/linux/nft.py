"""nftables by nfnetlink: tables, chains and rules in one transaction, without a program or a library.

A rule is a list of expressions, small instructions that load something into a register, compare it, and end in a verdict or a
translation (``linux/netfilter/nf_tables.h``). The functions below are named after the words of nft(8), and ``nft list
ruleset`` prints what they make as one would have typed it.

    batch = Batch()
    batch.table("t", owner=True)
    batch.chain("t", "nat", type="nat", hook=PREROUTING, priority=DSTNAT)
    batch.rule("t", "nat", iifname("eth0"), dport("tcp", 8080), dnat(IPv4Address("10.0.2.100"), 80))
    batch.commit(sock)

A table made with ``owner`` belongs to the socket that made it: nobody else can change or flush it, and the kernel removes it
when the socket is closed, however the process ended.
"""

import errno
import functools
import ipaddress
import socket
import struct
import sys
from collections.abc import Sequence

from fc_agent.structs import Struct
from fcvm.linux import netlink
from fcvm.linux.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Message,
    NetlinkError,
    attribute,
    attributes,
    each_attribute,
    nested,
    text,
)

# linux/netfilter.h: families and hooks
INET, IPV4, IPV6 = 1, 2, 10
PREROUTING, INPUT, FORWARD, OUTPUT, POSTROUTING = range(5)
DROP, ACCEPT = 0, 1
# linux/netfilter_ipv4.h: priorities
RAW, DSTNAT, FILTER, SRCNAT = -300, -100, 0, 100

# linux/netfilter/nfnetlink.h, nf_tables.h
NFNL_SUBSYS_NFTABLES = 10
NFNLGRP_NFTABLES = 7  # every change
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NEWTABLE, GETTABLE, _, NEWCHAIN, GETCHAIN, _, NEWRULE, GETRULE, DELRULE = range(9)
NEWGEN, NEWFLOWTABLE = 15, 22
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS = 1, 2
NFT_TABLE_F_OWNER = 2
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_EXPRESSIONS, NFTA_RULE_USERDATA = 1, 2, 3, 4, 7
NFTA_FLOWTABLE_TABLE, NFTA_FLOWTABLE_NAME, NFTA_FLOWTABLE_HOOK = 1, 2, 3
NFTA_FLOWTABLE_HOOK_NUM, NFTA_FLOWTABLE_HOOK_PRIORITY, NFTA_FLOWTABLE_HOOK_DEVS = 1, 2, 3
NFTA_DEVICE_NAME, NF_NETDEV_INGRESS = 1, 0
NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2
NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE = 1, 2, 1
NFT_META_IIFNAME, NFT_META_OIFNAME, NFT_META_NFPROTO, NFT_META_L4PROTO = 6, 7, 15, 16
NFT_CMP_EQ, NFT_CMP_NEQ = 0, 1
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER = 1, 2
NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR = 3, 2
NFT_CT_STATE, NFT_CT_STATUS = 0, 2
NFT_NAT_SNAT, NFT_NAT_DNAT = 0, 1
NFT_REG_VERDICT, NFT_REG_1, NFT_REG_2 = 0, 1, 2
NFTA_TARGET_NAME = 1  # linux/netfilter/nf_tables_compat.h
UDATA_COMMENT = 0  # libnftnl/udata.h: NFTNL_UDATA_RULE_COMMENT

RTN_LOCAL = 2  # linux/rtnetlink.h
IFNAMSIZ = 16
PROTOCOLS = {"tcp": 6, "udp": 17}
# linux/netfilter/nf_conntrack_common.h
STATES = {"established": 1 << 1, "related": 1 << 2, "new": 1 << 3}
IPS_DST_NAT = 1 << 5

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def open_socket() -> netlink.Socket:
    """An nfnetlink socket of the calling thread's network namespace."""
    return netlink.Socket(netlink.NETLINK_NETFILTER)


class Batch:
    """Changes that happen together or not at all.

    Arguments:
        family: of all tables in it. The words below are for ``INET``: they say which protocol they are about.
    """

    def __init__(self, family: int = INET) -> None:
        self._family = family
        self._messages: list[Message] = []

    def table(self, name: str, *, owner: bool = False) -> None:
        """Add a table; EEXIST if there is one. With ``owner`` it goes when the socket is closed (Linux 5.12)."""
        body = text(NFTA_TABLE_NAME, name) + _be32(NFTA_TABLE_FLAGS, NFT_TABLE_F_OWNER if owner else 0)
        self._add(NEWTABLE, NLM_F_CREATE | NLM_F_EXCL, body)

    def chain(self, table: str, name: str, *, type: str, hook: int, priority: int, policy: int = ACCEPT) -> None:
        """Add a base chain."""
        where = nested(NFTA_CHAIN_HOOK, _be32(NFTA_HOOK_HOOKNUM, hook), _be32(NFTA_HOOK_PRIORITY, priority))
        body = text(NFTA_CHAIN_TABLE, table) + text(NFTA_CHAIN_NAME, name) + where
        body += text(NFTA_CHAIN_TYPE, type) + _be32(NFTA_CHAIN_POLICY, policy)
        self._add(NEWCHAIN, NLM_F_CREATE, body)

    def flowtable(self, table: str, name: str, devices: Sequence[str]) -> None:
        """Add a flowtable (Linux, networking/nf_flowtable.rst): packets that come in by ``devices`` and belong to a connection
        that ``flow_add`` has entered leave at once, translated, past all rules and routing. ENOENT where the kernel has none.
        """
        names = nested(NFTA_FLOWTABLE_HOOK_DEVS, *(text(NFTA_DEVICE_NAME, device) for device in devices))
        hook = _be32(NFTA_FLOWTABLE_HOOK_NUM, NF_NETDEV_INGRESS) + _be32(NFTA_FLOWTABLE_HOOK_PRIORITY, 0) + names
        body = text(NFTA_FLOWTABLE_TABLE, table) + text(NFTA_FLOWTABLE_NAME, name) + nested(NFTA_FLOWTABLE_HOOK, hook)
        self._add(NEWFLOWTABLE, NLM_F_CREATE, body)

    def rule(self, table: str, chain: str, *expressions: bytes, first: bool = False, comment: str = "") -> None:
        """Add a rule at the end of a chain, or as its ``first``."""
        body = text(NFTA_RULE_TABLE, table) + text(NFTA_RULE_CHAIN, chain) + nested(NFTA_RULE_EXPRESSIONS, *expressions)
        if comment:
            value = comment.encode() + b"\0"
            body += attribute(NFTA_RULE_USERDATA, bytes([UDATA_COMMENT, len(value)]) + value)
        self._add(NEWRULE, NLM_F_CREATE | (0 if first else NLM_F_APPEND), body)

    def delete_rule(self, rule: "Rule") -> None:
        """Remove a rule that ``rules`` found."""
        body = text(NFTA_RULE_TABLE, rule.table) + text(NFTA_RULE_CHAIN, rule.chain)
        self._add(DELRULE, 0, body + attribute(NFTA_RULE_HANDLE, struct.pack(">Q", rule.handle)))

    def commit(self, sock: netlink.Socket) -> None:
        """Do it all, or nothing.

        Raises:
            NetlinkError: something was refused; nothing has changed.
        """
        if self._messages:
            edge = struct.pack(">BBH", 0, 0, NFNL_SUBSYS_NFTABLES)
            begin, end = (Message(kind, 0, edge) for kind in (NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END))
            sock.request([begin, *self._messages, end])

    def _add(self, kind: int, flags: int, body: bytes) -> None:
        self._messages.append(Message(_type(kind), NLM_F_ACK | flags, _head(self._family) + body))


# Rules are made of few different words: a VM's table takes half a millisecond less with them kept.
_expressions = functools.lru_cache(maxsize=512)


@_expressions
def iifname(name: str, *, equal: bool = True) -> bytes:
    """``iifname NAME`` (``NAME*`` for a prefix), or ``iifname != NAME``."""
    return _interface(NFT_META_IIFNAME, name, equal)


@_expressions
def oifname(name: str, *, equal: bool = True) -> bytes:
    """``oifname NAME`` (``NAME*`` for a prefix), or ``oifname != NAME``."""
    return _interface(NFT_META_OIFNAME, name, equal)


@_expressions
def nfproto(family: int) -> bytes:
    """``meta nfproto ipv4``."""
    return _meta(NFT_META_NFPROTO) + _compare(bytes([family]))


@_expressions
def l4proto(protocol: str) -> bytes:
    """``meta l4proto tcp``."""
    return _meta(NFT_META_L4PROTO) + _compare(bytes([PROTOCOLS[protocol]]))


@_expressions
def saddr(network: Network | Address, *, equal: bool = True) -> bytes:
    """``ip saddr NETWORK``, or ``!=``."""
    return _address(network, {4: 12, 6: 8}, equal)


@_expressions
def daddr(network: Network | Address, *, equal: bool = True) -> bytes:
    """``ip daddr NETWORK``, or ``!=``."""
    return _address(network, {4: 16, 6: 24}, equal)


@_expressions
def dport(protocol: str, port: int) -> bytes:
    """``tcp dport PORT``."""
    return l4proto(protocol) + _payload(NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2) + _compare(struct.pack(">H", port))


@_expressions
def to_this_host() -> bytes:
    """``fib daddr type local``: sent to any address of this host."""
    load = _expression("fib", _be32(1, NFT_REG_1), _be32(2, NFT_FIB_RESULT_ADDRTYPE), _be32(3, NFTA_FIB_F_DADDR))
    return load + _compare(struct.pack("=I", RTN_LOCAL))


@_expressions
def ct_state(*names: str) -> bytes:
    """``ct state established,related``."""
    return _ct(NFT_CT_STATE, sum(STATES[name] for name in names))


@_expressions
def ct_dnat() -> bytes:
    """``ct status dnat``: of a connection whose destination was translated."""
    return _ct(NFT_CT_STATUS, IPS_DST_NAT)


@_expressions
def verdict(code: int) -> bytes:
    """``accept`` or ``drop``."""
    data = nested(2, nested(NFTA_DATA_VERDICT, _be32(NFTA_VERDICT_CODE, code)))
    return _expression("immediate", _be32(1, NFT_REG_VERDICT), data)


@_expressions
def flow_add(flowtable: str) -> bytes:
    """``flow add @FLOWTABLE``; the rule ends here for what a flowtable cannot take."""
    return _expression("flow_offload", text(1, flowtable))


def counter() -> bytes:
    """``counter``."""
    return _expression("counter")


@_expressions
def dnat(address: Address, port: int | None = None) -> bytes:
    """``dnat to ADDRESS:PORT``, or the port unchanged."""
    return _nat(NFT_NAT_DNAT, address, port)


@_expressions
def snat(address: Address) -> bytes:
    """``snat to ADDRESS``."""
    return _nat(NFT_NAT_SNAT, address, None)


@_expressions
def masquerade() -> bytes:
    """``masquerade``."""
    return _expression("masq")


def _type(kind: int) -> int:
    return NFNL_SUBSYS_NFTABLES << 8 | kind


def _head(family: int) -> bytes:
    return struct.pack(">BBH", family, 0, 0)  # struct nfgenmsg


def _be32(type: int, value: int) -> bytes:
    return attribute(type, struct.pack(">I", value & 0xFFFFFFFF))


def _expression(name: str, *data: bytes) -> bytes:
    return nested(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *data))


def _value(type: int, data: bytes) -> bytes:
    return nested(type, attribute(NFTA_DATA_VALUE, data))


def _meta(key: int) -> bytes:
    return _expression("meta", _be32(2, key), _be32(1, NFT_REG_1))


def _payload(base: int, offset: int, length: int) -> bytes:
    return _expression("payload", _be32(1, NFT_REG_1), _be32(2, base), _be32(3, offset), _be32(4, length))


def _compare(data: bytes, *, equal: bool = True) -> bytes:
    return _expression("cmp", _be32(1, NFT_REG_1), _be32(2, NFT_CMP_EQ if equal else NFT_CMP_NEQ), _value(3, data))


def _mask(mask: bytes) -> bytes:
    zero = _value(5, bytes(len(mask)))
    return _expression("bitwise", _be32(1, NFT_REG_1), _be32(2, NFT_REG_1), _be32(3, len(mask)), _value(4, mask), zero)


def _interface(key: int, name: str, equal: bool) -> bytes:
    data = name[:-1].encode() if name.endswith("*") else name.encode().ljust(IFNAMSIZ, b"\0")
    return _meta(key) + _compare(data, equal=equal)


def _address(network: Network | Address, offsets: dict[int, int], equal: bool) -> bytes:
    whole = ipaddress.ip_network(network)
    family = IPV4 if whole.version == 4 else IPV6
    size = whole.max_prefixlen // 8
    mask = _mask(whole.netmask.packed) if whole.prefixlen < whole.max_prefixlen else b""
    load = _payload(NFT_PAYLOAD_NETWORK_HEADER, offsets[whole.version], size)
    return nfproto(family) + load + mask + _compare(whole.network_address.packed, equal=equal)


def _ct(key: int, bits: int) -> bytes:
    load = _expression("ct", _be32(2, key), _be32(1, NFT_REG_1))
    return load + _mask(struct.pack("=I", bits)) + _compare(bytes(4), equal=False)


def _nat(kind: int, address: Address, port: int | None) -> bytes:
    family = IPV4 if address.version == 4 else IPV6
    load = _expression("immediate", _be32(1, NFT_REG_1), _value(2, address.packed))
    target = [_be32(1, kind), _be32(2, family), _be32(3, NFT_REG_1)]
    if port is not None:
        load += _expression("immediate", _be32(1, NFT_REG_2), _value(2, struct.pack(">H", port)))
        target.append(_be32(5, NFT_REG_2))
    return load + _expression("nat", *target)


class Chain(Struct):
    """A chain as the kernel lists it; ``hook``, ``type`` and ``policy`` are None in a chain that is only jumped to."""

    family: int
    table: str
    name: str
    type: str | None
    hook: int | None
    policy: int | None


class Rule(Struct):
    """A rule as the kernel lists it: its expressions by name (a target of iptables by its own, in lower case), its verdict if
    it has one, and its comment.
    """

    family: int
    table: str
    chain: str
    handle: int
    expressions: tuple[str, ...]
    verdict: int | None
    comment: str

    @property
    def refuses(self) -> bool:
        """Whether it drops or rejects what it matches."""
        return self.verdict == DROP or "reject" in self.expressions


def tables(sock: netlink.Socket) -> list[tuple[int, str]]:
    """Family and name of every table of the socket's namespace."""
    listed = sock.dump(Message(_type(GETTABLE), 0, _head(0)))
    return [(body[0], _string(attributes(body[4:])[NFTA_TABLE_NAME])) for _, body in listed]


def chains(sock: netlink.Socket, *, leave_out: str = "") -> list[Chain]:
    """Every chain of the socket's namespace, but of tables whose name begins with ``leave_out``."""
    listed = [body for _, body in sock.dump(Message(_type(GETCHAIN), 0, _head(0)))]
    if leave_out:  # looked for in the raw message: reading hundreds of chains takes milliseconds
        unwanted = struct.pack("=H", NFTA_CHAIN_TABLE) + leave_out.encode()
        listed = [body for body in listed if unwanted not in body]
    return [_chain(body) for body in listed]


def chain(sock: netlink.Socket, family: int, table: str, name: str) -> Chain | None:
    """One chain, or None if there is none of that name."""
    body = _head(family) + text(NFTA_CHAIN_TABLE, table) + text(NFTA_CHAIN_NAME, name)
    try:
        return _chain(sock.request([Message(_type(GETCHAIN), NLM_F_ACK, body)])[0])
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _chain(body: bytes) -> Chain:
    values = attributes(body[4:])
    hook = attributes(values[NFTA_CHAIN_HOOK]) if NFTA_CHAIN_HOOK in values else {}
    return Chain(
        family=body[0],
        table=_string(values[NFTA_CHAIN_TABLE]),
        name=_string(values[NFTA_CHAIN_NAME]),
        type=_string(values[NFTA_CHAIN_TYPE]) if NFTA_CHAIN_TYPE in values else None,
        hook=_number(hook.get(NFTA_HOOK_HOOKNUM)),
        policy=_number(values.get(NFTA_CHAIN_POLICY)),
    )


def subscribe(sock: netlink.Socket, *, but: bytes) -> socket.socket:
    """Hear of every change, but not to tables whose name begins with the five bytes ``but``.

    The first message tells for a whole transaction; the table's name is the first attribute in all that matter.
    """
    kind = 4 if sys.byteorder == "little" else 5  # the low byte of the type
    name = netlink.HEADER.size + 4 + 4  # after struct nfgenmsg and the attribute's header
    load_byte, load_word, if_equal, end = 0x30, 0x20, 0x15, 0x06  # linux/bpf_common.h
    program = (
        (load_byte, 0, 0, kind),
        (if_equal, 4, 0, NEWGEN),
        (load_word, 0, 0, name),
        (if_equal, 0, 3, int.from_bytes(but[:4], "big")),
        (load_byte, 0, 0, name + 4),
        (if_equal, 0, 1, but[4]),
        (end, 0, 0, 0),  # drop
        (end, 0, 0, 0xFFFFFFFF),
    )
    return sock.subscribe(NFNLGRP_NFTABLES, program)


def rules(sock: netlink.Socket, family: int, table: str, chain: str) -> list[Rule]:
    """The rules of one chain, in their order."""
    body = _head(family) + text(NFTA_RULE_TABLE, table) + text(NFTA_RULE_CHAIN, chain)
    return [
        _rule(family, table, chain, attributes(listed[4:])) for _, listed in sock.dump(Message(_type(GETRULE), 0, body))
    ]


def _rule(family: int, table: str, chain: str, values: dict[int, bytes]) -> Rule:
    names: list[str] = []
    code = None
    for _, element in each_attribute(values.get(NFTA_RULE_EXPRESSIONS, b"")):
        expression = attributes(element)
        names.append(_string(expression[NFTA_EXPR_NAME]))
        if names[-1] == "target":  # of iptables' own kind
            target = attributes(expression[NFTA_EXPR_DATA]).get(NFTA_TARGET_NAME, b"")
            names[-1] = _string(target).lower()
        if names[-1] == "immediate":
            data = attributes(attributes(expression[NFTA_EXPR_DATA])[2])
            if NFTA_DATA_VERDICT in data:
                code = _number(attributes(data[NFTA_DATA_VERDICT])[NFTA_VERDICT_CODE])
    handle = int.from_bytes(values[NFTA_RULE_HANDLE], "big")
    return Rule(family, table, chain, handle, tuple(names), code, _comment(values.get(NFTA_RULE_USERDATA, b"")))


def _comment(userdata: bytes) -> str:
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        if kind == UDATA_COMMENT:
            return _string(userdata[offset + 2 : offset + 2 + length])
        offset += 2 + length
    return ""


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _number(value: bytes | None) -> int | None:
    return None if value is None else int.from_bytes(value, "big", signed=True)
