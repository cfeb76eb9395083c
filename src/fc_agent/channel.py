"""A framed byte channel that outlives its connections.

Two processes hold a ``Channel`` each; between them is one stream connection at a time (a Unix socket, vsock). Frames are
numbered by their order. A sender keeps every frame until the peer has acknowledged it, so after a broken connection both
say how many frames they have seen and the sender goes on right there: nothing is lost, nothing comes twice.

    type (u8), length (u32, big endian), payload

Frames that are sent but not consumed by the peer count against ``WINDOW``: a sender that is ``full`` stops reading its
source. Small frames (signals, sizes) are never held back, so they overtake data that nobody reads.

The class only moves bytes; it never waits. Sockets are non-blocking and whoever owns the channel polls them.
"""

import struct

from fc_agent.jsontext import dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing is slow to import, and the client of `fcvm exec` counts milliseconds
    from _socket import socket
    from collections import deque
    from typing import Any
else:
    from _collections import deque  # what `collections` has it from, which is slow as well

# Frame types; the direction is in docs/architecture.md, "Sessions".
ACK, STDIN, STDIN_EOF, RESIZE, SIGNAL, STDOUT, STDERR, STARTED, EXIT, HANGUP = range(10)

WINDOW = 1 << 20  # bytes that may be on their way, unconsumed
CHUNK = 1 << 16  # bytes read from a source, and so the usual payload of a data frame
MAX_PAYLOAD = 1 << 20  # a longer frame is a broken peer
MAX_LINE = 4 << 20  # the opening line carries an environment; Linux allows less than this for execve

HEADER = struct.Struct(">BI")
COUNT = struct.Struct(">Q")
SIZE = struct.Struct(">HH")


class ChannelError(Exception):
    """The peer broke the protocol; the connection is of no use any more."""


class Channel:
    """One end of a conversation. ``start`` is the number of frames that an earlier owner of this end had sent and seen."""

    def __init__(self, *, sent: int = 0, received: int = 0) -> None:
        self.received = received  # frames seen, whether consumed or not
        self.socket: socket | None = None
        self._acknowledged = sent  # frames that the peer has consumed: the number of the first one in _kept
        self._kept: deque[bytes] = deque()  # every frame that is not acknowledged
        self._unsent: deque[bytes] = deque()  # those of them that this connection has not seen yet
        self._line = b""  # to be written first
        self._writing = memoryview(b"")  # what is left of the write that is under way
        self._held = 0  # bytes in _kept
        self._consumed = received
        self._announced = received  # what our last ACK on this connection said
        self._input = bytearray()

    @property
    def full(self) -> bool:
        """Whether the source should not be read for now."""
        return self._held >= WINDOW

    @property
    def settled(self) -> bool:
        """Whether the peer has consumed everything that was sent."""
        return not self._kept

    @property
    def acknowledged(self) -> int:
        """How many of our frames the peer has consumed."""
        return self._acknowledged

    @property
    def wants_write(self) -> bool:
        """Whether there is a connection and something to write to it."""
        return self.socket is not None and bool(self._line or self._writing or self._unsent or (self._consumed != self._announced))

    def attach(self, connection: "socket", *, peer_received: int, rest: bytes = b"", line: bytes = b"") -> None:
        """Go on over ``connection``, whose peer has seen ``peer_received`` of our frames; an earlier one is dropped.

        Arguments:
            rest: bytes that were already read from it, behind the opening line.
            line: our answer to that, to be written before anything else.

        Raises:
            ChannelError: the peer claims a number of frames that cannot be.
        """
        skip = peer_received - self._acknowledged
        if not 0 <= skip <= len(self._kept):
            raise ChannelError(f"the peer has seen {peer_received} frames of {self._acknowledged + len(self._kept)}")
        self.detach()
        connection.setblocking(False)
        self.socket = connection
        self._unsent = deque(self._kept)
        for _ in range(skip):
            self._unsent.popleft()
        self._announced = 0  # if anything was consumed: a window that the peer kept over the break opens again
        self._line = line
        self._input += rest

    def detach(self) -> None:
        """Drop the connection, if there is one; what was not acknowledged stays for the next."""
        if self.socket is not None:
            self.socket.close()
        self.socket = None
        self._writing = memoryview(b"")
        self._input.clear()

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Queue a frame; ``flush`` writes it."""
        frame = HEADER.pack(kind, len(payload)) + payload
        self._kept.append(frame)
        self._unsent.append(frame)
        self._held += len(frame)

    def consume(self, count: int) -> None:
        """Say that the first ``count`` frames ever received are dealt with; the peer may send as much again."""
        self._consumed = max(self._consumed, count)

    def flush(self) -> None:
        """Write as much as the connection takes now.

        Raises:
            ConnectionError: the connection is gone.
        """
        if self.socket is None:
            return
        while True:
            if not self._writing:
                self._writing = self._next()
                if not self._writing:
                    return
            try:
                sent = self.socket.send(self._writing)
            except BlockingIOError:
                return
            except OSError as error:
                raise _broken(error) from error
            self._writing = self._writing[sent:]

    def _next(self) -> memoryview:
        """What to write next, together: every write to a guest, and every one of its own, costs it an interrupt."""
        batch: list[bytes] = []
        if self._line:
            batch.append(self._line)
            self._line = b""
        if self._consumed != self._announced:
            self._announced = self._consumed
            batch.append(HEADER.pack(ACK, COUNT.size) + COUNT.pack(self._consumed))
        size = sum(map(len, batch))
        while self._unsent and (not size or size + len(self._unsent[0]) <= CHUNK):
            batch.append(self._unsent.popleft())
            size += len(batch[-1])
        return memoryview(batch[0] if len(batch) == 1 else b"".join(batch))

    def receive(self) -> list[tuple[int, bytes]]:
        """Read once and return the frames that are complete now: ``(type, payload)``, ACKs already dealt with.

        Raises:
            ConnectionError: the connection has ended.
            ChannelError: the peer does not speak this protocol.
        """
        assert self.socket is not None
        if not self.buffered():
            try:
                data = self.socket.recv(4 * CHUNK)
            except BlockingIOError:
                return []
            except OSError as error:
                raise _broken(error) from error
            if not data:
                raise ConnectionResetError("the peer closed the connection")
            self._input += data
        return self._parse()

    def buffered(self) -> bool:
        """Whether ``receive`` has something to say without reading (a frame came with the opening line)."""
        if len(self._input) < HEADER.size:
            return False
        length = int.from_bytes(self._input[1:5], "big")
        return len(self._input) >= HEADER.size + length or length > MAX_PAYLOAD

    def _parse(self) -> list[tuple[int, bytes]]:
        frames: list[tuple[int, bytes]] = []
        position, end = 0, len(self._input)
        with memoryview(self._input) as view:
            while end - position >= HEADER.size:
                kind, length = HEADER.unpack_from(view, position)
                if length > MAX_PAYLOAD or kind > HANGUP:
                    raise ChannelError(f"frame of type {kind} and {length} bytes")
                start = position + HEADER.size
                if end - start < length:
                    break
                position = start + length
                payload = bytes(view[start:position])
                if kind == ACK:
                    self._on_ack(payload)
                else:
                    self.received += 1
                    frames.append((kind, payload))
        del self._input[:position]
        return frames

    def _on_ack(self, payload: bytes) -> None:
        if len(payload) != COUNT.size:
            raise ChannelError("malformed ACK")
        (count,) = COUNT.unpack(payload)
        if count > self._acknowledged + len(self._kept) - len(self._unsent):
            raise ChannelError(f"{count} frames acknowledged, fewer were sent")
        while self._acknowledged < count:
            self._held -= len(self._kept.popleft())
            self._acknowledged += 1


def _broken(error: OSError) -> ConnectionError:
    return error if isinstance(error, ConnectionError) else ConnectionResetError(str(error))


def line(message: "dict[str, Any]") -> bytes:
    """An opening line, or the answer to one."""
    return dumps(message).encode() + b"\n"


def send_line(connection: "socket", message: "dict[str, Any]") -> None:
    """Write an opening line; ``connection`` is blocking, with a timeout."""
    connection.sendall(line(message))


def read_line(connection: "socket") -> "tuple[dict[str, Any], bytes]":
    """Read an opening line: the object, and the bytes behind it that came along. ``connection`` is blocking.

    Raises:
        ConnectionError: the peer went away (or OSError, on a timeout).
        ChannelError: it is not one line with a JSON object.
    """
    data = bytearray()
    while (end := data.find(b"\n", max(0, len(data) - CHUNK))) < 0:
        if len(data) > MAX_LINE:
            raise ChannelError("the opening line is too long")
        more = connection.recv(CHUNK)
        if not more:
            raise ConnectionResetError("the peer closed the connection")
        data += more
    try:
        message = loads(data[:end])
    except (ValueError, RecursionError) as error:
        raise ChannelError(f"the opening line is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ChannelError("the opening line is not a JSON object")
    return message, bytes(data[end + 1 :])
