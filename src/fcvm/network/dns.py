"""The guest's resolver, 10.0.2.3: forwards every query to the host's resolvers, from the host.

Queries are passed on as they are. If a server does not answer in time, refuses or fails, the next one is asked as well and the
first good answer wins. Each query leaves from a socket, and so a random port, of its own.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from functools import partial

from fcvm.network import relay
from fcvm.network.loop import BATCH, READ, Loop
from fcvm.network.relay import Target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PATIENCE = 1.5  # seconds until the next server is asked too; the guest's own resolver repeats after 5
GIVE_UP = 8.0  # seconds
PENDING = 128  # queries at a time; more are dropped, and repeated by the guest
CONNECTIONS = 64  # at a time, over TCP
_SIZE = 1 << 16
_HEADER = 12  # bytes (RFC 1035, 4.1.1)
SERVFAIL, NOTIMP, REFUSED = 2, 4, 5


def forward(loop: Loop, udp: socket.socket, tcp: socket.socket, upstreams: Callable[[], list[Target]]) -> None:
    """Answer what arrives at ``udp`` and ``tcp`` (listening) with what ``upstreams()`` say."""
    _Forwarder(loop, udp, upstreams)
    relay.tcp(loop, tcp, upstreams, most=CONNECTIONS)


class _Forwarder:
    def __init__(self, loop: Loop, listener: socket.socket, upstreams: Callable[[], list[Target]]) -> None:
        self.loop = loop
        self.listener = loop.own(listener)
        self.pending: dict[_Query, float] = {}  # until when they are tried
        self._ticking = False
        self._upstreams = upstreams
        listener.setblocking(False)
        loop.call(lambda: loop.watch(listener, READ, self._query))

    def _query(self, _: int) -> None:
        for _ in range(BATCH):
            try:
                data, client = self.listener.recvfrom(_SIZE)
            except BlockingIOError:
                return
            if len(data) >= _HEADER and len(self.pending) < PENDING:
                query = _Query(self, client, data, self._upstreams())
                self.pending[query] = time.monotonic() + GIVE_UP
                query.ask()
                self._tick()

    def _tick(self) -> None:
        """See to it that queries are given up in time; the first is due first."""
        if self.pending and not self._ticking:
            self._ticking = True
            self.loop.after(next(iter(self.pending.values())) - time.monotonic(), self._expire)

    def _expire(self) -> None:
        self._ticking = False
        now = time.monotonic()
        for query in [query for query, end in self.pending.items() if end <= now]:
            query.finish()
        self._tick()


class _Query:
    """One question: who asks, the servers that have not been asked, the sockets on which answers may come."""

    def __init__(self, forwarder: _Forwarder, client: Any, data: bytes, servers: list[Target]) -> None:
        self._forwarder = forwarder
        self._client = client
        self._data = data
        self._servers = servers
        self._asked: list[socket.socket] = []
        self._last: bytes | None = None
        self._done = False

    def ask(self) -> None:
        """Ask the next server; when there is none and nobody can answer any more, say what was said last."""
        while self._servers and not self._done:
            family, address = self._servers.pop(0)
            try:
                sock = socket.socket(family, socket.SOCK_DGRAM)
            except OSError:
                continue
            try:
                sock.setblocking(False)
                sock.connect(address)
                sock.send(self._data)
            except OSError:  # no route, say
                sock.close()
                continue
            self._asked.append(sock)
            self._forwarder.loop.watch(sock, READ, partial(self._answer, sock))
            if self._servers:
                self._forwarder.loop.after(PATIENCE, self.ask)
            return
        if not self._asked and not self._done:
            self.finish(self._last or _failure(self._data))

    def _answer(self, sock: socket.socket, _: int) -> None:
        try:
            data = sock.recv(_SIZE)
        except OSError:  # ECONNREFUSED: there is no server
            data = b""
        if data and (len(data) < _HEADER or data[:2] != self._data[:2]):
            return  # not an answer to this question
        if data and data[3] & 0xF not in (SERVFAIL, NOTIMP, REFUSED):
            self.finish(data)
            return
        self._last = data or self._last
        self._asked.remove(sock)
        self._forwarder.loop.drop(sock)
        self.ask()

    def finish(self, answer: bytes | None = None) -> None:
        """Give the answer, if there is one, and keep nothing: a timer may still know of this query."""
        if self._done:
            return
        self._done = True
        self._forwarder.pending.pop(self, None)
        self._data, self._last = b"", None
        for sock in self._asked:
            self._forwarder.loop.drop(sock)
        if answer is not None:
            self._forwarder.listener.sendto(answer, self._client)


def _failure(query: bytes) -> bytes:
    """SERVFAIL to ``query``: its header with QR and RA set and the code, and its question."""
    identity, flags, questions = struct.unpack_from(">HHH", query)
    return struct.pack(">HHHHHH", identity, flags | 0x8080 | SERVFAIL, questions, 0, 0, 0) + query[_HEADER:]
