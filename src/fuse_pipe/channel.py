"""A stream of FUSE messages that survives its connection: what was not acknowledged is sent again, exactly once.

A mount has numbered channels, each over a stream socket (vsock, Unix). A connection opens with one JSON line from the
relay and one from the server::

    {"fuse_pipe": 1, "session": ID, "channel": N, "base": B, "received": R}
    {"fuse_pipe": 1, "kind": "directory" | "file", "read_only": bool, "received": S}    or    {"error": TEXT}

and then carries FUSE messages unchanged: requests one way, replies the other. ``received`` counts the messages that a
side has taken in on this channel over all connections; the other side drops that many and sends the rest again.
Between times each side says now and then how many it has taken in, in a message that no kernel sends: to the server a
request with opcode ``ACK``, to the relay a reply with error ``ACK``; the count is in the ``unique`` field. ``base`` is
the number of the first message that the relay still has, where a server without memory of the session starts.
Channel -1 carries notifications to the relay, and answers that must not come before them; nothing back.

Where both say ``"quiet": true``, requests may be marked QUIET, in the padding of their header: they get no answer, but for
a message FAILED when a write fails (the node's id in place of ``unique``, then an errno in eight bytes and the number of
the last handle that was opened before). And just before an answer the server may send what will be asked next: ATTRIBUTES and CONTENT (the node's id in place of ``unique``, then the number of
notifications that it has sent, then a ``struct fuse_attr_out``, or a handle and all that the file holds). They are not
counted.
"""

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from fuse_pipe.errors import ConnectionLost, ProtocolError
from fuse_pipe.messages import IN_HEADER, OUT_HEADER

PROTOCOL = 1
NOTIFY = -1
CHANNELS = 64  # of one mount, at most
ACK, FAILED, ATTRIBUTES, CONTENT = 0x4657_4143, 0x4657_4146, 0x4657_4154, 0x4657_4344
QUIET_AT = 38  # in struct fuse_in_header
ACK_EVERY = 32  # messages, or
ACK_BYTES = 1 << 20
HELLO_MOST = 4096
LARGE = 64 * 1024
VSOCK_MOST = 128 * 1024  # bytes to wait for at once: vsock refuses (ENOMEM) what its buffer, of 256 KiB, cannot hold
BUFFER = 4 << 20  # asked of the kernel for each socket
_IOV_MAX = 1024
# What a side keeps for a peer that acknowledges nothing; a real one is far below it.
KEPT_MESSAGES = 16384
KEPT_BYTES = 192 << 20

Buffers = Sequence[bytes | bytearray | memoryview]
_LENGTH = struct.Struct("<I")


def tune(sock: socket.socket) -> None:
    """Room for several large messages, where the kernel allows it."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        forced = {socket.SO_SNDBUF: 32, socket.SO_RCVBUF: 33}[option]  # SO_SNDBUFFORCE, SO_RCVBUFFORCE
        try:
            sock.setsockopt(socket.SOL_SOCKET, forced, BUFFER)
        except OSError:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)


def send_all(sock: socket.socket, buffers: Buffers) -> None:
    """Send all buffers with as few calls as possible."""
    if len(buffers) == 1:
        sock.sendall(buffers[0])
        return
    for first in range(0, len(buffers), _IOV_MAX):
        part = list(buffers[first : first + _IOV_MAX])
        sent = sock.sendmsg(part)
        while part:
            if sent >= len(part[0]):
                sent -= len(part.pop(0))
            else:
                part[0] = memoryview(part[0])[sent:]
                sent = sock.sendmsg(part)


class Channel:
    """One side of a channel. ``received`` counts the peer's messages, ``unacked`` are ours that it may not have."""

    def __init__(self, number: int, ack: bytes) -> None:
        """``ack``: the header of this side's ACK message; its unique field is filled in."""
        self.number = number
        self.sock: socket.socket | None = None
        self.lock = threading.Lock()
        self.serving = threading.Lock()  # held by the thread that reads this channel's connection
        self.known = False  # whether the counts are those of a peer that was connected before
        self.received = 0
        self.base = 0  # the number of unacked[0]
        self.unacked: deque[Buffers] = deque()
        self.leaving: Sequence[Buffers] = ()  # what ``send`` is about to be called with, for ``unknown``
        self.dropped: Callable[[Buffers], None] | None = None  # told what the peer has, to use its buffer again
        self._ack = bytearray(ack)
        self._acked = 0
        self._bytes = 0
        self.kept = 0  # bytes in unacked

    def count(self, size: int) -> None:
        """A message of the peer's was taken in."""
        self.received += 1
        self._bytes += size

    def overdue(self) -> bool:
        """Whether the peer should get an ACK even without anything else to send."""
        return self.received - self._acked >= ACK_EVERY or self._bytes >= ACK_BYTES

    def due(self) -> bytes | None:
        """An ACK to send along, if one is due."""
        if not self.overdue():
            return None
        self._acked, self._bytes = self.received, 0
        struct.pack_into("<Q", self._ack, 8, self.received)
        return bytes(self._ack)

    def acknowledged(self, count: int) -> None:
        """The peer has taken in ``count`` messages of ours."""
        if not self.base <= count <= self.base + len(self.unacked):
            raise ProtocolError(f"{count} messages acknowledged of {self.base} to {self.base + len(self.unacked)}")
        while self.base < count:
            message = self.unacked.popleft()
            self.base += 1
            self.kept -= sum(map(len, message))
            if self.dropped is not None:
                self.dropped(message)

    def send(self, messages: Sequence[Buffers]) -> None:
        """Send messages, or keep them for the next connection if there is none.

        Raises:
            ProtocolError: the peer acknowledges nothing, and too much is kept for it already; these are not.
        """
        with self.lock:
            if len(self.unacked) > KEPT_MESSAGES or self.kept > KEPT_BYTES:
                raise ProtocolError("nothing is acknowledged")
            self.unacked.extend(messages)
            if messages is self.leaving:
                self.leaving = ()
            self.kept += sum(len(buffer) for message in messages for buffer in message)
            if self.sock is None:
                return
            ack = self.due()
            buffers = [buffer for message in messages for buffer in message]
            if ack is not None:
                buffers.append(ack)
            if not buffers:
                return
            try:
                send_all(self.sock, buffers)
            except OSError:  # whoever reads this connection notices as well, and sees to a new one
                self.sock = None

    def unknown(self) -> list[Buffers]:
        """All that the peer may not have. Does not wait for a peer that takes nothing, as ``send`` may at this moment."""
        leaving = self.leaving
        unacked = list(self.unacked)
        return unacked if any(message is leaving[0] for message in unacked if leaving) else [*unacked, *leaving]

    def attach(self, sock: socket.socket, received: int) -> None:
        """Go on over a new connection whose peer has taken in ``received``; the rest is sent again."""
        with self.lock:
            self.acknowledged(received)
            self.known = True
            self.sock = sock
            self._acked, self._bytes = self.received, 0
            try:
                for message in list(self.unacked):
                    send_all(sock, message)
            except OSError:
                self.sock = None

    def detach(self, sock: socket.socket) -> None:
        """The connection is gone."""
        with self.lock:
            if self.sock is sock:
                self.sock = None


def server_channel(number: int) -> Channel:
    """A channel whose ACKs are for a relay."""
    return Channel(number, OUT_HEADER.pack(OUT_HEADER.size, ACK, 0))


def relay_channel(number: int) -> Channel:
    """A channel whose ACKs are for a server."""
    return Channel(number, IN_HEADER.pack(IN_HEADER.size, ACK, 0, 0, 0, 0, 0, 0, 0))


class Reader:
    """Cuts a byte stream into messages, each of which begins with its own length."""

    def __init__(self, sock: socket.socket, least: int, most: int) -> None:
        self.sock = sock
        self.least, self.most = least, most
        self._wait_most = VSOCK_MOST if sock.family == socket.AF_VSOCK else most
        self.buffer = bytearray(2 * most)
        self.view = memoryview(self.buffer)
        self.start = self.end = 0
        self._missing = 0  # bytes of the message that has begun

    def more(self) -> None:
        """Wait for bytes and take in what there is.

        Raises:
            ConnectionLost: the peer closed the connection, or it broke.
        """
        if self.start == self.end:
            self.start = self.end = 0
        elif len(self.buffer) - self.start < self.most:
            rest = self.end - self.start
            self.view[:rest] = bytes(self.view[self.start : self.end])
            self.start, self.end = 0, rest
        try:
            if self._missing > LARGE:  # one wake-up for the whole message, not one for each piece
                count = self.sock.recv_into(self.view[self.end :], min(self._missing, self._wait_most), socket.MSG_WAITALL)
            else:
                count = self.sock.recv_into(self.view[self.end :])
        except OSError as error:
            raise ConnectionLost(str(error)) from error
        if count == 0:
            raise ConnectionLost("the peer closed the connection")
        self.end += count

    def next(self) -> memoryview | None:
        """The next whole message, valid until ``more`` is called; None if there is none yet.

        Raises:
            ProtocolError: its length cannot be that of a message.
        """
        have = self.end - self.start
        if have < 4:
            self._missing = 0
            return None
        (length,) = _LENGTH.unpack_from(self.buffer, self.start)
        if not self.least <= length <= self.most:
            raise ProtocolError(f"a message of {length} bytes")
        if have < length:
            self._missing = length - have
            return None
        self._missing = 0
        message = self.view[self.start : self.start + length]
        self.start += length
        return message


def send_hello(sock: socket.socket, hello: dict[str, Any]) -> None:
    """Send the line that opens a connection."""
    sock.sendall(json.dumps(hello).encode() + b"\n")


def receive_hello(sock: socket.socket, timeout: float = 30) -> dict[str, Any]:
    """The peer's line; byte by byte, because messages follow it.

    Raises:
        ProtocolError: it is not what opens a connection.
        ConnectionLost: the peer went away, or said nothing for ``timeout`` seconds.
    """
    line = bytearray()
    sock.settimeout(timeout)
    try:
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                raise ConnectionLost("the peer closed the connection")
            line += byte
            if len(line) > HELLO_MOST:
                raise ProtocolError("a hello without an end")
    except OSError as error:
        raise ConnectionLost(str(error)) from error
    finally:
        sock.settimeout(None)
    try:
        hello = json.loads(line)
    except ValueError as error:
        raise ProtocolError("a hello that is not JSON") from error
    if not isinstance(hello, dict) or (hello.get("fuse_pipe") != PROTOCOL and "error" not in hello):
        raise ProtocolError("a hello of another protocol")
    return hello
