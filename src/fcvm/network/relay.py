"""Relays between sockets of two namespaces: TCP byte for byte with half-close and back-pressure, UDP by session.

A socket belongs to the namespace it was made in, so a process of the host can listen inside a VM's namespace and connect
outside, or the reverse: no helper process, no rule in any firewall.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from fcvm.network.loop import BATCH, READ, WRITE, Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CHUNK = 256 * 1024  # bytes kept per direction of a connection
PATIENCE = 1.5  # seconds until the next target is tried
UDP_SESSIONS = 1024  # per relay; the one idle the longest makes room
UDP_IDLE = 90.0  # seconds
_DATAGRAM = 1 << 16
IP_PKTINFO = 8  # linux/in.h; not in Python's socket module before 3.13

Target = tuple[int, tuple[object, ...]]
"""Address family and socket address."""


def target(ip: str, port: int) -> Target:
    """The target ``ip``:``port``; ``fe80::1%eth0`` is understood."""
    family, _, _, _, address = socket.getaddrinfo(ip, port, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)[0]
    return family, address


def start(loop: Loop, listener: socket.socket, targets: list[Target], *, priority: int | None = None) -> None:
    """Relay what arrives at ``listener``, of either kind; a datagram goes to the first target only.

    Arguments:
        priority: SO_PRIORITY of the sockets that lead to the targets.
    """
    if listener.type == socket.SOCK_STREAM:
        tcp(loop, listener, lambda: list(targets), priority=priority)
    else:
        family = targets[0][0]
        udp(loop, listener, targets[0], lambda: _socket(family, socket.SOCK_DGRAM, priority))


def tcp(
    loop: Loop,
    listener: socket.socket,
    targets: Callable[[], list[Target]],
    *,
    priority: int | None = None,
    most: int | None = None,
) -> None:
    """Relay every connection that ``listener`` accepts to the first of ``targets()`` that answers.

    Nobody answering resets the connection, as a closed port would. For ``priority`` see ``start``.

    Arguments:
        most: connections at a time; more are reset.
    """
    connections: set[_Connection] = set()

    def accept(_: int) -> None:
        for _ in range(BATCH):
            try:
                client, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    loop.watch(listener, 0, accept)  # no fd left: look again when some connection may have gone
                    loop.after(0.1, lambda: loop.watch(listener, READ, accept))
                return
            client.setblocking(False)
            if most is not None and len(connections) >= most:
                _reset(loop, client)
                continue
            connection = _Connection(loop, client, targets(), priority, connections.discard)
            connections.add(connection)
            connection.connect()

    loop.own(listener).setblocking(False)
    loop.call(lambda: loop.watch(listener, READ, accept))


def _socket(family: int, kind: int, priority: int | None) -> socket.socket:
    sock = socket.socket(family, kind)
    if priority is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
    return sock


class _Connection:
    """A client, its upstream, and what is on the way between them."""

    def __init__(
        self,
        loop: Loop,
        client: socket.socket,
        targets: list[Target],
        priority: int | None,
        over: Callable[[_Connection], None],
    ) -> None:
        self._loop = loop
        self._priority = priority
        self._over = over
        self._client = loop.own(client)
        self._upstream = client  # until one is connecting
        self._targets = targets
        self._pending: dict[socket.socket, bytearray] = {}  # bytes to be written, by destination
        self._ended: set[socket.socket] = set()  # sources at their end
        self._shut: set[socket.socket] = set()  # destinations that were told

    def connect(self) -> None:
        """Try the next target; without one the client is reset."""
        while self._targets:
            family, address = self._targets.pop(0)
            try:
                upstream = _socket(family, socket.SOCK_STREAM, self._priority)
            except OSError:  # no descriptor is left: the client is not to wait for ever
                break
            upstream.setblocking(False)
            if upstream.connect_ex(address) in (0, errno.EINPROGRESS):
                self._upstream = upstream
                self._loop.watch(upstream, WRITE, self._connected)
                if self._targets:
                    self._loop.after(PATIENCE, partial(self._late, upstream))
                return
            upstream.close()
        self._abort()

    def _late(self, upstream: socket.socket) -> None:
        """Give up a target that has not answered yet: the kernel would try for two minutes."""
        if self._upstream is upstream and not self._pending:
            self._next()

    def _next(self) -> None:
        self._loop.drop(self._upstream)
        self._upstream = self._client
        self.connect()

    def _connected(self, _: int) -> None:
        if self._upstream.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0:
            self._next()
            return
        for sock in (self._client, self._upstream):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pending[sock] = bytearray()
        self._rearm()

    def _rearm(self) -> None:
        for sock, other in ((self._client, self._upstream), (self._upstream, self._client)):
            reading = sock not in self._ended and not self._pending[other]
            events = (READ if reading else 0) | (WRITE if self._pending[sock] else 0)
            self._loop.watch(sock, events, lambda ready, sock=sock, other=other: self._ready(ready, sock, other))  # type: ignore[misc]

    def _ready(self, ready: int, sock: socket.socket, other: socket.socket) -> None:
        try:
            if ready & WRITE and self._pending[sock]:
                del self._pending[sock][: sock.send(self._pending[sock])]
            if ready & READ and sock not in self._ended and not self._pending[other]:
                data = sock.recv(CHUNK)
                if not data:
                    self._ended.add(sock)
                elif (sent := self._send(other, data)) < len(data):
                    self._pending[other] += data[sent:]
            for source, sink in ((sock, other), (other, sock)):
                if source in self._ended and not self._pending[sink] and sink not in self._shut:
                    self._shut.add(sink)
                    sink.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            return
        except OSError:
            self._abort()
            return
        if len(self._shut) == 2:
            self._loop.drop(self._client)
            self._loop.drop(self._upstream)
            self._over(self)
        else:
            self._rearm()

    @staticmethod
    def _send(sock: socket.socket, data: bytes) -> int:
        try:
            return sock.send(data)
        except BlockingIOError:
            return 0

    def _abort(self) -> None:
        """Reset both sides, so that neither takes it for an orderly end."""
        for sock in {self._client, self._upstream}:
            if sock.fileno() >= 0:
                _reset(self._loop, sock)
        self._over(self)


def _reset(loop: Loop, sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    loop.drop(sock)


def udp(loop: Loop, listener: socket.socket, target: Target, make: Callable[[], socket.socket] | None = None) -> None:
    """Relay datagrams between whoever writes to ``listener`` and ``target``: one socket a client, until it is idle.

    Arguments:
        make: makes such a socket, where it is not to be one of the loop's thread's own namespace.
    """
    _Sessions(loop, listener, target, make or (lambda: socket.socket(target[0], socket.SOCK_DGRAM)))


class _Sessions:
    """The clients of one UDP port. Answers leave from the address that the client wrote to (``IP_PKTINFO``)."""

    def __init__(self, loop: Loop, listener: socket.socket, target: Target, make: Callable[[], socket.socket]) -> None:
        self._loop = loop
        self._listener = listener
        self._target = target
        self._make = make
        self._sessions: OrderedDict[Any, socket.socket] = OrderedDict()
        self._used: set[Any] = set()
        self._ticking = False
        loop.own(listener).setblocking(False)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            listener.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        loop.call(lambda: loop.watch(listener, READ, self._from_client))

    def _from_client(self, _: int) -> None:
        for _ in range(BATCH):
            try:
                data, info, _, client = self._listener.recvmsg(_DATAGRAM, 128)
            except BlockingIOError:
                return
            session = self._sessions.get(client)
            if session is None:
                session = self._open(client, _source(info))
            self._sessions.move_to_end(client)
            self._used.add(client)
            try:
                session.send(data)
            except OSError:  # nobody listens (yet): the datagram is lost, as datagrams are
                continue

    def _open(self, client: Any, source: list[tuple[int, int, bytes]]) -> socket.socket:
        session = self._make()
        session.setblocking(False)
        session.connect(self._target[1])
        if len(self._sessions) >= UDP_SESSIONS:
            _, oldest = self._sessions.popitem(last=False)
            self._loop.drop(oldest)
        self._sessions[client] = session
        self._loop.watch(session, READ, lambda _: self._from_target(session, client, source))
        if not self._ticking:
            self._ticking = True
            self._loop.after(UDP_IDLE, self._expire)
        return session

    def _from_target(self, session: socket.socket, client: Any, source: list[tuple[int, int, bytes]]) -> None:
        try:
            data = session.recv(_DATAGRAM)
        except OSError:  # ECONNREFUSED: the guest's ICMP answer
            return
        self._used.add(client)
        self._listener.sendmsg([data], source, 0, client)

    def _expire(self) -> None:
        for client in [client for client in self._sessions if client not in self._used]:
            self._loop.drop(self._sessions.pop(client))
        self._used.clear()
        self._ticking = bool(self._sessions)
        if self._ticking:
            self._loop.after(UDP_IDLE, self._expire)


def _source(info: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """What makes an answer leave from the address that was written to."""
    for level, kind, data in info:
        if level == socket.IPPROTO_IP and kind == IP_PKTINFO:
            # struct in_pktinfo: interface, address to answer from, address in the header
            _, local, _ = struct.unpack("=i4s4s", data)
            return [(level, kind, struct.pack("=i4s4s", 0, local, bytes(4)))]
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
            return [(level, kind, data)]
    return []


def adopt(fd: int) -> socket.socket:
    """The socket behind an fd that arrived from another process."""
    os.set_blocking(fd, False)
    return socket.socket(fileno=fd)
