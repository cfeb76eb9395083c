"""Relays, the DNS forwarder and reserved ports, on the loopback."""

import errno
import gc
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fcvm.errors import ConflictError, HostError, NetworkError
from fcvm.network import dns, ports, relay, resolver
from fcvm.network.loop import Loop
from fcvm.network.publish import Publish, parse

TIMEOUT = 20.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    made.start()
    yield made
    made.close()


@pytest.fixture
def sockets() -> Iterator[Callable[..., socket.socket]]:
    made: list[socket.socket] = []

    def make(kind: int = socket.SOCK_STREAM, *, bind: bool = True) -> socket.socket:
        sock = socket.socket(socket.AF_INET, kind)
        made.append(sock)
        sock.settimeout(TIMEOUT)
        if bind:
            sock.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                sock.listen()
        return sock

    yield make
    for sock in made:
        sock.close()


def test_tcp_is_carried_whole_both_ways_and_ends_one_side_at_a_time(
    loop: Loop, sockets: Callable[..., socket.socket]
) -> None:
    upstream, listener = sockets(), sockets()
    address = listener.getsockname()
    relay.tcp(loop, listener, lambda: [relay.target(*upstream.getsockname())])
    data = os.urandom(8 << 20)  # more than all buffers on the way
    with socket.create_connection(address, TIMEOUT) as client:
        server, _ = upstream.accept()
        with server:
            server.settimeout(TIMEOUT)

            def echo() -> None:
                received = b""
                while chunk := server.recv(1 << 16):
                    received += chunk
                server.sendall(received)  # only after the client's end: half-closed
                server.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=echo)
            thread.start()
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            back = b""
            while chunk := client.recv(1 << 16):
                back += chunk
            thread.join()
    assert back == data


def test_a_slow_reader_stops_the_writer(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    upstream, listener = sockets(), sockets()
    address = listener.getsockname()
    relay.tcp(loop, listener, lambda: [relay.target(*upstream.getsockname())])
    with socket.create_connection(address, TIMEOUT) as client:
        server, _ = upstream.accept()
        with server:
            client.settimeout(0.3)
            sent = 0
            with suppress(TimeoutError):
                while sent < 1 << 30:
                    sent += client.send(bytes(1 << 20))
            assert sent < 1 << 28  # what the kernel's buffers and ours hold, far from endless
            client.close()
            received = 0
            server.settimeout(TIMEOUT)
            while chunk := server.recv(1 << 20):
                received += len(chunk)
            assert received == sent


def test_nobody_upstream_resets_the_client(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    listener, closed = sockets(), sockets()
    address, nowhere = listener.getsockname(), closed.getsockname()
    closed.close()
    relay.tcp(loop, listener, lambda: [relay.target(*nowhere)])
    # possibly before connect() has returned
    with pytest.raises(ConnectionResetError), socket.create_connection(address, TIMEOUT) as client:
        client.recv(1)


def test_without_descriptors_the_client_is_reset(
    loop: Loop, sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(relay, "_socket", none_left)
    listener = sockets()
    relay.tcp(loop, listener, lambda: [relay.target("127.0.0.1", 9)])
    # possibly before connect() has returned
    with pytest.raises(ConnectionResetError), socket.create_connection(listener.getsockname(), TIMEOUT) as client:
        client.recv(1)


def test_the_second_target_is_tried(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    listener, closed, upstream = sockets(), sockets(), sockets()
    address, nowhere, somewhere = listener.getsockname(), closed.getsockname(), upstream.getsockname()
    closed.close()
    relay.tcp(loop, listener, lambda: [relay.target(*nowhere), relay.target(*somewhere)])
    with socket.create_connection(address, TIMEOUT) as client:
        server, _ = upstream.accept()
        with server:
            server.sendall(b"second")
            assert client.recv(6) == b"second"


def test_a_reset_is_passed_on(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    upstream, listener = sockets(), sockets()
    address = listener.getsockname()
    relay.tcp(loop, listener, lambda: [relay.target(*upstream.getsockname())])
    with socket.create_connection(address, TIMEOUT) as client:
        server, _ = upstream.accept()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_udp_clients_get_their_own_answers(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    server, listener = sockets(socket.SOCK_DGRAM), sockets(socket.SOCK_DGRAM)
    address = listener.getsockname()
    relay.udp(loop, listener, relay.target(*server.getsockname()))
    clients = [sockets(socket.SOCK_DGRAM) for _ in range(10)]
    for number, client in enumerate(clients):
        client.sendto(b"%d" % number, address)
    for _ in clients:
        data, peer = server.recvfrom(100)
        server.sendto(b"to " + data, peer)
    for number, client in enumerate(clients):
        assert client.recvfrom(100) == (b"to %d" % number, address)


def test_udp_sessions_are_bounded(
    loop: Loop, sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "UDP_SESSIONS", 4)
    server, listener = sockets(socket.SOCK_DGRAM), sockets(socket.SOCK_DGRAM)
    address = listener.getsockname()
    relay.udp(loop, listener, relay.target(*server.getsockname()))
    before = len(os.listdir("/proc/self/fd"))
    clients = [sockets(socket.SOCK_DGRAM) for _ in range(40)]
    for client in clients:
        client.sendto(b"x", address)
        server.recvfrom(10)
    assert len(os.listdir("/proc/self/fd")) <= before + len(clients) + 4


class Flood(socket.socket):
    """A listener to which there is always something more."""

    def recvmsg(self, *_: int) -> object:
        return b"x", [], 0, ("127.0.0.1", 9)

    def recvfrom(self, *_: int) -> object:
        return b"x", ("127.0.0.1", 9)


@pytest.mark.parametrize("kind", ["udp", "dns"])
def test_a_loop_ends_while_datagrams_come_without_a_pause(kind: str) -> None:
    flooded = Loop()
    flooded.start()
    called = threading.Event()
    with Flood(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        if kind == "udp":
            relay.udp(flooded, listener, relay.target("127.0.0.1", 9))
        else:
            dns.forward(flooded, listener, socket.create_server(("127.0.0.1", 0)), list)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", address)  # never taken: it is always readable
        flooded.call(called.set)
        assert called.wait(TIMEOUT)
        closing = threading.Thread(target=flooded.close, daemon=True)
        closing.start()
        closing.join(TIMEOUT)
        assert not closing.is_alive()


def test_a_server_that_says_nothing_to_a_connection_gives_way(
    loop: Loop, sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "PATIENCE", 0.05, raising=False)
    silent, second, listener = sockets(), sockets(), sockets()
    silent.listen(0)
    full = [socket.socket() for _ in range(3)]  # what the kernel does not answer any more
    for sock in full:
        sock.setblocking(False)
        sock.connect_ex(silent.getsockname())
    targets = [relay.target(*sock.getsockname()) for sock in (silent, second)]
    relay.tcp(loop, listener, lambda: list(targets))
    with socket.create_connection(listener.getsockname(), TIMEOUT) as client:
        client.sendall(b"hello")
        server, _ = second.accept()
        with server:
            server.settimeout(TIMEOUT)
            assert server.recv(100) == b"hello"
    for sock in full:
        sock.close()


def test_connections_are_bounded_where_asked(loop: Loop, sockets: Callable[..., socket.socket]) -> None:
    upstream, listener = sockets(), sockets()
    relay.tcp(loop, listener, lambda: [relay.target(*upstream.getsockname())], most=2)

    def refused(wait: float) -> bool:
        # possibly before connect() has returned
        with suppress(TimeoutError), ExitStack() as undo:
            try:
                client = undo.enter_context(socket.create_connection(listener.getsockname(), TIMEOUT))
                client.settimeout(wait)
                client.recv(1)
            except ConnectionResetError:
                return True
        return False

    with ExitStack() as undo:
        clients = [undo.enter_context(socket.create_connection(listener.getsockname(), TIMEOUT)) for _ in range(2)]
        servers = [undo.enter_context(upstream.accept()[0]) for _ in range(2)]
        assert refused(TIMEOUT)
        clients[0].close()
        servers[0].close()
        while refused(0.3):  # its place is free soon
            pass


def test_idle_udp_sessions_are_closed(
    loop: Loop, sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "UDP_IDLE", 0.05)
    server, listener, client = (sockets(socket.SOCK_DGRAM) for _ in range(3))
    ended = threading.Event()
    dropped = loop.drop
    monkeypatch.setattr(loop, "drop", lambda sock: (dropped(sock), ended.set()))
    relay.udp(loop, listener, relay.target(*server.getsockname()))
    client.sendto(b"x", listener.getsockname())
    assert server.recv(10) == b"x"
    assert ended.wait(TIMEOUT)
    client.sendto(b"y", listener.getsockname())  # and a new one is made
    assert server.recv(10) == b"y"


QUERY = struct.pack(">HHHHHH", 0xABCD, 0x0100, 1, 0, 0, 0) + b"\1a\1b\0\0\1\0\1"


def answer(query: bytes, code: int = 0) -> bytes:
    return query[:2] + struct.pack(">H", 0x8180 | code) + query[4:]


@pytest.fixture
def ask(loop: Loop, sockets: Callable[..., socket.socket]) -> Callable[..., socket.socket]:
    """Start a forwarder for some servers and send it a query; the socket has the answer."""

    def start(*servers: socket.socket) -> socket.socket:
        udp, tcp, client = sockets(socket.SOCK_DGRAM), sockets(), sockets(socket.SOCK_DGRAM)
        addresses = [server.getsockname() for server in servers]
        dns.forward(loop, udp, tcp, lambda: [relay.target(*address) for address in addresses])
        client.connect(udp.getsockname())
        client.send(QUERY)
        return client

    return start


def test_dns_is_forwarded(ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket]) -> None:
    server = sockets(socket.SOCK_DGRAM)
    client = ask(server)
    query, peer = server.recvfrom(512)
    assert query == QUERY
    server.sendto(b"\0\0" + answer(QUERY)[2:], peer)  # another question's answer is not taken
    server.sendto(answer(QUERY), peer)
    assert client.recv(512) == answer(QUERY)


@pytest.mark.parametrize("code", [2, 4, 5])
def test_dns_asks_the_next_server_when_one_fails(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket], code: int
) -> None:
    first, second = sockets(socket.SOCK_DGRAM), sockets(socket.SOCK_DGRAM)
    client = ask(first, second)
    _, peer = first.recvfrom(512)
    first.sendto(answer(QUERY, code), peer)
    _, peer = second.recvfrom(512)
    second.sendto(answer(QUERY), peer)
    assert client.recv(512) == answer(QUERY)


def test_nothing_is_kept_of_queries_that_were_answered(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket]
) -> None:
    server = sockets(socket.SOCK_DGRAM)
    client = ask(server, sockets(socket.SOCK_DGRAM))
    for _ in range(20):
        _, peer = server.recvfrom(512)
        server.sendto(answer(QUERY), peer)
        assert client.recv(512) == answer(QUERY)
        client.send(QUERY)
    gc.collect()
    kept = [found for found in gc.get_objects() if isinstance(found, dns._Query)]
    assert sum(bool(query._data) for query in kept) <= 2  # the last ones


def test_queries_that_nobody_answers_are_given_up(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "GIVE_UP", 0.1)
    monkeypatch.setattr(dns, "PENDING", 1)
    silent = sockets(socket.SOCK_DGRAM)
    client = ask(silent)
    silent.recv(512)
    client.settimeout(0.05)
    silent.settimeout(0.05)
    for _ in range(400):  # the next is dropped until then
        client.send(QUERY)
        with suppress(TimeoutError):
            silent.recv(512)
            return
    raise AssertionError


def test_dns_that_does_not_exist_is_an_answer(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket]
) -> None:
    first, second = sockets(socket.SOCK_DGRAM), sockets(socket.SOCK_DGRAM)
    client = ask(first, second)
    _, peer = first.recvfrom(512)
    first.sendto(answer(QUERY, 3), peer)  # NXDOMAIN
    assert client.recv(512) == answer(QUERY, 3)


def test_dns_asks_the_next_server_when_one_is_silent_or_away(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "PATIENCE", 0.05)
    silent, away, good = (sockets(socket.SOCK_DGRAM) for _ in range(3))
    address = away.getsockname()
    away.close()

    class Away:
        def getsockname(self) -> object:
            return address

    client = ask(silent, Away(), good)
    _, peer = good.recvfrom(512)
    good.sendto(answer(QUERY), peer)
    assert client.recv(512) == answer(QUERY)


def test_dns_says_so_when_there_is_no_server(
    ask: Callable[..., socket.socket], sockets: Callable[..., socket.socket]
) -> None:
    away = sockets(socket.SOCK_DGRAM)
    address = away.getsockname()
    away.close()

    class Away:
        def getsockname(self) -> object:
            return address

    reply = ask(Away()).recv(512)
    assert reply[:2] == QUERY[:2]
    assert reply[3] & 0xF == dns.SERVFAIL
    assert reply[12:] == QUERY[12:]


@pytest.mark.parametrize(
    ("text", "servers", "search", "options"),
    [
        ("nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch corp.example home\n",
         ("127.0.0.53",), ("corp.example", "home"), ("edns0", "trust-ad")),
        ("# nameserver 1.1.1.1\n; x\nnameserver 192.0.2.1 # first\nnameserver fe80::1%lo\n",
         ("192.0.2.1", "fe80::1%lo"), (), ()),
        ("domain a\nsearch b c\n", ("127.0.0.1",), ("b", "c"), ()),
        ("search .\nnameserver\n", ("127.0.0.1",), (), ()),
        ("", ("127.0.0.1",), (), ()),
    ],
)  # fmt: skip
def test_resolv_conf(
    tmp_path: Path, text: str, servers: tuple[str, ...], search: tuple[str, ...], options: tuple[str, ...]
) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(text)
    assert resolver.read(path) == resolver.Resolver(servers, search, options)


def test_upstreams_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    upstreams = resolver.Upstreams(path=path)
    assert upstreams() == [(socket.AF_INET, ("127.0.0.1", 53))]
    path.write_text("nameserver 192.0.2.1\nnameserver nonsense\nnameserver ::1\n")
    assert upstreams() == [(socket.AF_INET, ("192.0.2.1", 53)), (socket.AF_INET6, ("::1", 53, 0, 0))]
    new = tmp_path / "new"
    new.write_text("nameserver 192.0.2.2\n")
    os.replace(new, path)
    assert upstreams() == [(socket.AF_INET, ("192.0.2.2", 53))]
    assert resolver.Upstreams(("192.0.2.9",), path)() == [(socket.AF_INET, ("192.0.2.9", 53))]


def test_a_reserved_port_is_taken_for_everybody() -> None:
    (one,) = ports.reserve(parse("127.0.0.1::80"))
    try:
        port = one.publish.host_port
        assert port > 0
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with pytest.raises(ConflictError) as caught:
            ports.reserve([Publish("127.0.0.1", port, 81)])
        assert f"Port {port}/tcp of 127.0.0.1 is in use by" in caught.value.message
        assert f"(pid {os.getpid()})" in caught.value.message
        assert caught.value.hint
        assert "--publish 127.0.0.1:0:81" in caught.value.hint
    finally:
        one.close()
    (again,) = ports.reserve([Publish("127.0.0.1", port, 80)])
    again.close()


def test_all_ports_or_none() -> None:
    (held,) = ports.reserve(parse("127.0.0.1::80"))
    free, *_ = ports.reserve(parse("127.0.0.1::80"))
    free.close()
    wanted = [free.publish, Publish("127.0.0.1", held.publish.host_port, 80)]
    with pytest.raises(ConflictError):
        ports.reserve(wanted)
    held.close()
    for reservation in ports.reserve(wanted):  # the first is free again
        reservation.close()


def test_a_port_of_every_address_is_the_same_in_both_families() -> None:
    (one,) = ports.reserve(parse("80"))
    with_port = {sock.getsockname()[1] for sock in one.sockets}
    one.close()
    assert with_port == {one.publish.host_port}


def test_another_hosts_address() -> None:
    with pytest.raises(NetworkError, match=r"203\.0\.113\.9 is not an address of this host"):
        ports.reserve(parse("203.0.113.9:8080:80"))


def test_a_privileged_port() -> None:
    error = ports.explain(OSError(errno.EACCES, "denied"), Publish("", 80, 80))
    assert isinstance(error, HostError)
    assert "Port 80/tcp needs root" in error.message
    assert error.hint
    assert "--publish 8080:80" in error.hint
    assert "ip_unprivileged_port_start=80" in error.hint
