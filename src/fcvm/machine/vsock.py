"""A virtio-vsock device: connections to a Unix socket here become connections to one port of the machine.

The transport of forwarded commands. Beside QEMU's user network, which cuts everything into packets of 1500 bytes, and
OpenSSH, whose ciphers an emulated CPU computes, it costs next to nothing, and file permissions guard it. Packets and
flow control: Virtual I/O Device specification 1.2, section 5.10. Only connections from the host to the machine exist.
"""

import errno
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field

from fcvm.machine.hostfs import scatter
from fcvm.machine.vhost_user import Backend, Complete
from fcvm.machine.virtqueue import Chain

HOST_CID = 2
GUEST_CID = 3
QUEUES = 2
RX, TX = 0, 1  # as the guest sees it

# struct virtio_vsock_hdr: source and destination cid, their ports, length, type, operation, flags, credit (2)
_HEADER = struct.Struct("<QQIIIHHIII")
STREAM = 1
OP_REQUEST, OP_RESPONSE, OP_RST, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, OP_CREDIT_REQUEST = range(1, 8)
SHUTDOWN_RECEIVE, SHUTDOWN_SEND = 1, 2

BUFFER = 1 << 20  # bytes that the guest may send before we have passed them on
UPDATE_AFTER = BUFFER // 4
FIRST_PORT = 1 << 20
NO_FILES_PAUSE = 0.01  # seconds


@dataclass(slots=True)
class _Connection:
    sock: socket.socket
    port: int  # ours
    open: bool = False
    pending: deque[memoryview] = field(default_factory=deque)  # from the guest, not taken by the local peer yet
    peer_buffer: int = 0
    peer_taken: int = 0
    sent: int = 0
    taken: int = 0  # bytes from the guest that the local peer has taken
    told: int = 0  # what the guest knows of that
    local_end: bool = False  # the local peer sends no more
    over: bool = False  # for the guest; the local peer may still have to take what is pending
    watched: int = 0

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for."""
        return self.peer_buffer - (self.sent - self.peer_taken & 0xFFFFFFFF)


class Vsock:
    """The device behind the vhost-user connection ``sock``; what connects to ``listener`` reaches the guest's ``port``."""

    def __init__(self, sock: socket.socket, listener: socket.socket, port: int) -> None:
        self._backend = Backend(sock, QUEUES, self._on_chain, config=struct.pack("<Q", GUEST_CID), stopped=self._on_stop)
        self._listener = listener
        self._port = port
        self._connections: dict[int, _Connection] = {}
        self._next = FIRST_PORT
        self._room: deque[tuple[Chain, Complete]] = deque()  # buffers that the guest has offered
        self._control: deque[tuple[int, int, int, int]] = deque()  # wait for one: our port, the guest's, operation, flags

    def serve(self) -> None:
        """Serve until QEMU ends. Raises ValueError, OSError: the guest or QEMU broke the protocol."""
        self._listener.setblocking(False)
        self._backend.watch(self._listener.fileno(), select.EPOLLIN, self._accept)
        try:
            self._backend.serve()
        finally:
            for connection in self._connections.values():
                connection.sock.close()
            self._listener.close()

    # The local side

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            time.sleep(NO_FILES_PAUSE)  # no descriptor is left: clients wait, and the machine goes on
            return
        sock.setblocking(False)
        self._next = self._next + 1 if self._next < 0xFFFFFFF0 else FIRST_PORT
        connection = self._connections[self._next] = _Connection(sock, self._next)
        self._backend.watch(sock.fileno(), 0, lambda events: self._ready(connection, events))
        self._tell(connection, OP_REQUEST)

    def _watch(self, connection: _Connection) -> None:
        """Poll for what can be done now."""
        events = select.EPOLLOUT if connection.pending else 0
        if connection.open and not (connection.local_end or connection.over) and connection.credit > 0 and self._room:
            events |= select.EPOLLIN
        if events != connection.watched:
            connection.watched = events
            self._backend.watch(connection.sock.fileno(), events, lambda events: self._ready(connection, events))

    def _ready(self, connection: _Connection, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(connection)
        if events & select.EPOLLIN and connection.watched & select.EPOLLIN:
            self._read(connection)
        elif events & (select.EPOLLHUP | select.EPOLLERR) and not connection.over:  # gone, while we wait for the guest
            self._tell(connection, OP_RST)
            self._finish(connection)

    def _read(self, connection: _Connection) -> None:
        """Take what the local peer has sent, into the buffers of the guest."""
        while self._room and connection.credit > 0:
            chain, complete = self._room[0]
            space = sum(map(len, chain.writable)) - _HEADER.size
            try:
                data = connection.sock.recv(min(space, connection.credit))
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                # Nobody here half-closes and goes on reading, so this is the end of a peer that wants no more either.
                connection.local_end = True
                self._tell(connection, OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
                break
            self._room.popleft()
            connection.sent += len(data)
            complete(scatter([self._header(connection.port, OP_RW, length=len(data)), data], chain.writable))
        self._watch(connection)

    def _flush(self, connection: _Connection) -> None:
        """Give the local peer what the guest has sent."""
        try:
            while connection.pending:
                count = connection.sock.send(connection.pending[0])
                connection.taken += count
                if count == len(connection.pending[0]):
                    connection.pending.popleft()
                else:
                    connection.pending[0] = connection.pending[0][count:]
        except BlockingIOError:
            pass
        except OSError:  # it is gone
            if not connection.over:
                self._tell(connection, OP_RST)
            self._finish(connection)
            return
        if connection.over and not connection.pending:
            self._finish(connection)
            return
        if connection.taken - connection.told >= UPDATE_AFTER and not connection.over:
            self._tell(connection, OP_CREDIT_UPDATE)
        self._watch(connection)

    def _end(self, connection: _Connection) -> None:
        """The guest knows nothing of this connection any more; the local peer gets what was sent before."""
        self._connections.pop(connection.port, None)
        connection.over = True
        self._flush(connection)

    def _finish(self, connection: _Connection) -> None:
        self._connections.pop(connection.port, None)
        connection.pending.clear()
        connection.over, connection.watched = True, 0
        self._backend.unwatch(connection.sock.fileno())
        connection.sock.close()

    # The guest's side

    def _header(self, port: int, operation: int, *, length: int = 0, flags: int = 0) -> bytes:
        connection = self._connections.get(port)
        taken = connection.taken if connection else 0
        if connection:
            connection.told = taken
        return _HEADER.pack(
            HOST_CID, GUEST_CID, port, self._port, length, STREAM, operation, flags, BUFFER, taken & 0xFFFFFFFF
        )

    def _tell(self, connection: _Connection, operation: int, flags: int = 0) -> None:
        self._tell_port(connection.port, self._port, operation, flags)

    def _tell_port(self, port: int, guest_port: int, operation: int, flags: int = 0) -> None:
        self._control.append((port, guest_port, operation, flags))
        self._send_control()

    def _send_control(self) -> None:
        while self._control and self._room:
            port, guest_port, operation, flags = self._control.popleft()
            chain, complete = self._room.popleft()
            header = bytearray(self._header(port, operation, flags=flags))
            struct.pack_into("<I", header, 20, guest_port)
            complete(scatter([header], chain.writable))

    def _on_chain(self, queue: int, chain: Chain, complete: Complete) -> None:
        if queue == RX:
            self._room.append((chain, complete))
            self._send_control()
            if len(self._room) == 1:  # they had stopped for want of it
                for connection in list(self._connections.values()):
                    self._watch(connection)
            return
        self._on_packet(b"".join(chain.readable))
        complete(0)

    def _on_packet(self, packet: bytes) -> None:
        if len(packet) < _HEADER.size:
            raise ValueError(f"a vsock packet of {len(packet)} bytes")
        _, _, guest_port, port, length, _, operation, flags, buffer, taken = _HEADER.unpack_from(packet)
        connection = self._connections.get(port)
        if connection is None or guest_port != self._port:
            if operation != OP_RST:  # of a connection that is over, or one that the guest wants: there are none
                self._tell_port(port, guest_port, OP_RST)
            return
        connection.peer_buffer, connection.peer_taken = buffer, taken
        if operation == OP_RESPONSE:
            connection.open = True
        elif operation == OP_RW:
            connection.pending.append(memoryview(packet)[_HEADER.size : _HEADER.size + length])
            self._flush(connection)
            return
        elif operation == OP_CREDIT_REQUEST:
            self._tell(connection, OP_CREDIT_UPDATE)
        elif operation == OP_SHUTDOWN and flags & SHUTDOWN_SEND:  # with or without receiving: sessions end whole
            self._tell(connection, OP_RST)
            self._end(connection)
            return
        elif operation == OP_RST:
            self._end(connection)
            return
        self._watch(connection)

    def _on_stop(self, queue: int) -> None:
        """The device was reset: its connections are gone, and so are the buffers."""
        if queue == RX:
            self._room.clear()
            self._control.clear()
            for connection in list(self._connections.values()):
                self._finish(connection)
