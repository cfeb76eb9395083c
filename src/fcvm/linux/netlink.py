"""Netlink: the framing that rtnetlink and nfnetlink share.

A message is a header (length, type, flags, sequence number, port), a fixed struct of its family and then attributes, each a
type, a length and a value padded to four bytes (``linux/netlink.h``). Many messages go out in one ``send`` and every one is
answered by an acknowledgement that carries an errno and, thanks to ``NETLINK_EXT_ACK``, often the kernel's own sentence.

A socket belongs for ever to the network namespace in which it was made, whoever uses it from wherever. So a socket made
before ``unshare`` still speaks for the old namespace: nobody has to move back and forth.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from fc_agent.structs import Struct

# linux/netlink.h
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12
NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSGERR_ATTR_MSG = 1
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
SO_ATTACH_FILTER = 26  # asm-generic/socket.h
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11

HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH").pack
_PADDING = (b"", b"\0", b"\0\0", b"\0\0\0")
_RECEIVE = 1 << 16


class Message(Struct):
    """One request: its type, its flags (``NLM_F_REQUEST`` is added) and everything after the header."""

    type: int
    flags: int
    body: bytes


def attribute(type: int, value: bytes) -> bytes:
    """One attribute, padded."""
    length = 4 + len(value)
    return _ATTRIBUTE(length, type) + value + _PADDING[-length & 3]


def nested(type: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(type | NLA_F_NESTED, b"".join(attributes))


def text(type: int, value: str) -> bytes:
    """An attribute that holds a NUL-terminated string."""
    return attribute(type, value.encode() + b"\0")


def u32(type: int, value: int) -> bytes:
    """An attribute that holds an unsigned 32-bit number in the host's byte order (rtnetlink)."""
    return attribute(type, struct.pack("=I", value))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in ``data`` by type (without the nesting and byte-order bits); the last of a repeated one."""
    return dict(each_attribute(data))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in ``data``, in their order."""
    offset = 0
    while offset + 4 <= len(data):
        length, type = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield type & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += length + 3 & ~3


class NetlinkError(OSError):
    """The kernel refused message number ``index`` of a request."""

    def __init__(self, errno: int, reason: str, index: int) -> None:
        super().__init__(errno, f"netlink: {os.strerror(errno)}" + (f" ({reason})" if reason else ""))
        self.index = index


class Socket:
    """A netlink socket of the namespace that the calling thread is in; a context manager."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def __enter__(self) -> "Socket":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def subscribe(self, group: int, program: Sequence[tuple[int, int, int, int]] = ()) -> socket.socket:
        """Receive what the kernel tells ``group`` from now on; returns the socket itself, to wait on and read from.

        Arguments:
            program: a filter that runs in the kernel, as code, jump if true, jump if false and operand of each
                instruction (``linux/filter.h``), so that what is not wanted wakes nobody.
        """
        if program:
            code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
            filter = struct.pack("@HP", len(program), ctypes.addressof(code))  # struct sock_fprog
            self._socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, filter)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._socket.setblocking(False)
        return self._socket

    def request(self, requests: Sequence[Message]) -> list[bytes]:
        """Send ``requests`` at once, wait for the answer to each that asks for one, and return the bodies of replies.

        Raises:
            NetlinkError: for the first message that was refused, once all of them have been answered (rtnetlink
                carries out the others all the same; nfnetlink undoes the whole batch).
        """
        waiting: dict[int, int] = {}
        packet = bytearray()
        for index, message in enumerate(requests):
            self._sequence += 1
            if message.flags & NLM_F_ACK:
                waiting[self._sequence] = index
            size = HEADER.size + len(message.body)
            packet += HEADER.pack(size, message.type, message.flags | NLM_F_REQUEST, self._sequence, 0) + message.body
            packet += bytes(-size % 4)
        self._socket.send(packet)
        replies: list[bytes] = []
        refused: NetlinkError | None = None
        while waiting:
            for type, flags, sequence, body in self._receive():
                if type != NLMSG_ERROR:
                    if sequence in waiting:
                        replies.append(body)
                    continue
                error = _refusal(body, flags, waiting.get(sequence, 0))
                if error is not None and (refused is None or error.index < refused.index):
                    refused = error
                if waiting.pop(sequence, None) is None and error is not None:
                    waiting.clear()  # the batch as a whole was refused: nothing else will be answered
        if refused is not None:
            raise refused
        return replies

    def dump(self, message: Message) -> list[tuple[int, bytes]]:
        """Everything that the kernel lists in answer to ``message``: type and body of each.

        Raises:
            NetlinkError: it was refused.
        """
        self._sequence += 1
        size = HEADER.size + len(message.body)
        flags = message.flags | NLM_F_REQUEST | NLM_F_DUMP
        self._socket.send(HEADER.pack(size, message.type, flags, self._sequence, 0) + message.body)
        found: list[tuple[int, bytes]] = []
        while True:
            for type, flags, sequence, body in self._receive():
                if sequence != self._sequence:
                    continue
                if type == NLMSG_DONE:
                    return found
                if type == NLMSG_ERROR:
                    error = _refusal(body, flags, 0)
                    if error is not None:
                        raise error
                    return found
                found.append((type, body))

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        return messages(self._socket.recv(_RECEIVE))


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message in what was received at once."""
    offset = 0
    while offset + HEADER.size <= len(data):
        size, type, flags, sequence, _ = HEADER.unpack_from(data, offset)
        yield type, flags, sequence, data[offset + HEADER.size : offset + size]
        offset += size + 3 & ~3


def _refusal(body: bytes, flags: int, index: int) -> NetlinkError | None:
    errno = -struct.unpack_from("=i", body)[0]
    if errno == 0:
        return None
    reason = ""
    if flags & NLM_F_ACK_TLVS:
        # struct nlmsgerr: the errno, then the header of the message and, unless capped, its body
        start = 4 + (HEADER.size if flags & NLM_F_CAPPED else struct.unpack_from("=I", body, 4)[0])
        reason = attributes(body[start:]).get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode(errors="replace")
    return NetlinkError(errno, reason, index)
