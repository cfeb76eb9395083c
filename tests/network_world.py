"""A world for network tests: a host, another host and a guest, all of them namespaces that the test makes.

    lan 192.0.2.1 ---- eth0 192.0.2.2 host ---- what is tested ---- tap0 :: eth0 guest

Nothing touches this machine's own network. A socket belongs to the namespace it was made in, so servers and clients of all
three places live in the test's own process. The guest is a namespace whose ``eth0`` is a tap; a process carries frames
between it and the VM's tap, as Firecracker does between the VM's tap and a real guest.
"""

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

import pytest

from fcvm.linux import namespaces, nft, rtnetlink, tap
from fcvm.linux.namespaces import Namespace
from fcvm.network import attach, guest
from fcvm.network.attach import Network
from fcvm.network.spec import NetworkSpec

HOST_IP, LAN_IP = "192.0.2.2", "192.0.2.1"
HOST_IP6, LAN_IP6 = "2001:db8::2", "2001:db8::1"
TIMEOUT = 20.0

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")


class Place:
    """A namespace with a thread of its own that lives as long: what ``run`` calls happens inside."""

    def __init__(self) -> None:
        self.namespace, _ = namespaces.create(list, user=False)
        self._thread = ThreadPoolExecutor(1, initializer=self.namespace.enter)
        self.run(lambda: self.links([rtnetlink.set_link(1)]))

    def run(self, function: Callable[[], Any]) -> Any:
        return self._thread.submit(function).result(TIMEOUT * 3)

    def links(self, messages: list[Any]) -> None:
        with rtnetlink.open_socket() as route:
            route.request(messages)

    def close(self) -> None:
        self._thread.shutdown()
        self.namespace.close()

    def make_socket(self, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        def make() -> socket.socket:
            sock = socket.socket(family, kind)
            sock.settimeout(TIMEOUT)
            return sock

        return self.run(make)

    def connect(self, ip: str, port: int, *, source: str = "") -> socket.socket:
        sock = self.make_socket(family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
        try:
            if source:
                sock.bind((source, 0))
            sock.connect((ip, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def ask(self, ip: str, port: int, data: bytes = b"hello", *, source: str = "") -> bytes:
        """Send, half-close and read to the end over TCP."""
        with self.connect(ip, port, source=source) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while chunk := sock.recv(1 << 16):
                answer += chunk
            return answer

    def ask_udp(self, ip: str, port: int, data: bytes = b"hello", *, attempts: int = 5) -> bytes:
        with self.make_socket(socket.SOCK_DGRAM, socket.AF_INET6 if ":" in ip else socket.AF_INET) as sock:
            sock.connect((ip, port))
            return self.exchange(sock, data, attempts)

    @staticmethod
    def exchange(sock: socket.socket, data: bytes, attempts: int = 5) -> bytes:
        """Send a datagram until an answer comes: some may be lost while a link comes up."""
        for attempt in range(attempts):
            sock.settimeout(TIMEOUT / attempts)
            sock.send(data)
            try:
                return sock.recv(1 << 16)
            except (TimeoutError, ConnectionRefusedError):
                if attempt == attempts - 1:
                    raise
        raise AssertionError

    def reachable(self, ip: str, port: int, wait: float = 1.0) -> bool:
        """Whether a TCP connection comes about; what is dropped takes ``wait`` seconds to tell."""
        with self.make_socket(family=socket.AF_INET6 if ":" in ip else socket.AF_INET) as sock:
            sock.settimeout(wait)
            try:
                sock.connect((ip, port))
            except OSError:
                return False
            return True

    def interfaces(self) -> set[str]:
        def look() -> set[str]:
            with rtnetlink.open_socket() as route:
                return {link.name for link in rtnetlink.links(route)}

        return self.run(look)

    def tables(self) -> set[str]:
        def look() -> set[str]:
            with nft.open_socket() as sock:
                return {name for _, name in nft.tables(sock)}

        return self.run(look)

    def shell(self, command: str, *, check: bool = True) -> str:
        """What a shell prints in here."""
        done = subprocess.run(
            ["sh", "-ec", command], capture_output=True, text=True, preexec_fn=self.namespace.enter, timeout=60
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout + done.stderr


class Server:
    """Says who it is and who asked, then what it was told: ``name client-ip data``; TCP or UDP."""

    def __init__(self, place: Place, name: str, ip: str, port: int, kind: int = socket.SOCK_STREAM) -> None:
        self.name = name.encode()
        self.kind = kind
        self.sock = place.make_socket(kind, socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.sock.settimeout(None)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind((ip, port))
        if kind == socket.SOCK_STREAM:
            self.sock.listen(64)
        self.port = self.sock.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def answer(self, data: bytes, client: str) -> bytes:
        return b"%s %s %s" % (self.name, client.encode(), data)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                if self.kind == socket.SOCK_DGRAM:
                    data, client = self.sock.recvfrom(1 << 16)
                    if client is None:  # shut down
                        return
                    self.sock.sendto(self.answer(data, client[0]), client)
                else:
                    sock, client = self.sock.accept()
                    threading.Thread(target=self._one, args=(sock, client[0]), daemon=True).start()

    def _one(self, sock: socket.socket, client: str) -> None:
        with sock, suppress(OSError):
            sock.settimeout(TIMEOUT)
            data = b""
            while chunk := sock.recv(1 << 16):
                data += chunk
            sock.sendall(self.answer(data, client))

    def close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # wakes accept
        if self.kind == socket.SOCK_DGRAM:
            with suppress(OSError):
                self.sock.settimeout(0)
        self.sock.close()


class DnsServer(Server):
    """Answers every question with 203.0.113.7, or with a code (2 is SERVFAIL), or (code -1) never."""

    code = 0

    def answer(self, data: bytes, client: str) -> bytes:
        if self.code < 0:
            return b""
        head = data[:2] + struct.pack(">HHHHH", 0x8180 | self.code, 1, 0 if self.code else 1, 0, 0)
        record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + ip_address("203.0.113.7").packed
        return head + data[12:] + (b"" if self.code else record)


def question(name: str, identity: int = 0x1234) -> bytes:
    """A DNS query for an A record."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack(">HHHHHH", identity, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


_PUMP = """
import os, select, sys
sys.path[:0] = {path!r}
from fcvm.linux import tap
from fcvm.linux.namespaces import Namespace
here, net, user = (int(word) if word != "-" else None for word in sys.argv[1:])
Namespace(net, user).enter()
there = tap.attach("tap0")
os.write(1, b"1")
poll = select.poll()
for fd in (here, there):
    poll.register(fd, select.POLLIN)
while True:
    for source, _ in poll.poll():
        try:
            os.write(there if source == here else here, os.read(source, 1 << 17))
        except OSError:
            pass  # the other end is down
"""


class FakeGuest(Place):
    """A guest behind a network's tap, configured as the agent would."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        fd = self.run(lambda: tap.attach("eth0"))
        words = [str(fd), str(network.namespace.net), str(network.namespace.user or "-")]
        fds = [fd, network.namespace.net, *([network.namespace.user] if network.namespace.user else [])]
        self.pump = subprocess.Popen(
            [sys.executable, "-ISc", _PUMP.format(path=sys.path), *words], pass_fds=fds, stdout=subprocess.PIPE
        )
        assert self.pump.stdout is not None
        assert self.pump.stdout.read(1) == b"1"
        os.close(fd)
        settings = network.guest
        index = self.run(lambda: socket.if_nametoindex("eth0"))
        messages = [
            rtnetlink.set_link(index, mtu=settings.mtu, mac=settings.mac),
            rtnetlink.address(index, ip_interface(settings.address)),
            rtnetlink.address(index, ip_interface(settings.address6)),
            rtnetlink.default_route(ip_address(settings.gateway), index),
        ]
        if settings.gateway6:
            messages.append(rtnetlink.default_route(ip_address(settings.gateway6), index))
        self.run(lambda: self.links(messages))

    def close(self) -> None:
        self.pump.kill()
        self.pump.wait()
        assert self.pump.stdout is not None
        self.pump.stdout.close()
        super().close()


class World:
    """The host and the other host, and everything that a test makes on them; closed in the reverse order."""

    def __init__(self, directory: Path, *, ipv6: bool = False) -> None:
        self.directory = directory
        self._undo = ExitStack()
        self.host = self._place(Place())
        self.lan = self._place(Place())
        lan = self.lan.namespace.net
        self.host.run(lambda: self.host.links([rtnetlink.veth("eth0", "eth0", lan, mtu=1500)]))
        for place, mine in ((self.host, (HOST_IP, HOST_IP6)), (self.lan, (LAN_IP, LAN_IP6))):
            index = place.run(lambda: socket.if_nametoindex("eth0"))
            messages = [rtnetlink.set_link(index), rtnetlink.address(index, ip_interface(f"{mine[0]}/24"))]
            if ipv6:
                messages.append(rtnetlink.address(index, ip_interface(f"{mine[1]}/64")))
            if place is self.host:
                messages.append(rtnetlink.default_route(ip_address(LAN_IP), index))
                messages += [rtnetlink.default_route(ip_address(LAN_IP6), index)] if ipv6 else []
            place.run(lambda place=place, messages=messages: place.links(messages))

    def _place(self, place: Any) -> Any:
        self._undo.callback(place.close)
        return place

    def network(self, spec: NetworkSpec, vm_id: str = "vm1") -> Network:
        """A network made on the host (in its thread, which lives as long as the world)."""
        directory = self.directory / vm_id
        directory.mkdir(exist_ok=True)
        return self.keep(self.host.run(lambda: attach.create(spec, vm_id, directory)))

    def keep(self, network: Network) -> Network:
        """Close it with the world."""
        self._undo.callback(self.host.run, network.close)
        return network

    def guest(self, network: Network) -> FakeGuest:
        return self._place(FakeGuest(network))

    def server(self, place: Place, name: str, ip: str, port: int = 0, kind: int = socket.SOCK_STREAM) -> Server:
        return self._place(Server(place, name, ip, port, kind))

    def dns(self, place: Place, ip: str, kind: int = socket.SOCK_DGRAM, code: int = 0) -> DnsServer:
        server = self._place(DnsServer(place, "dns", ip, 53, kind))
        server.code = code
        return server

    def close(self) -> None:
        self._undo.close()


__all__ = ["DnsServer", "FakeGuest", "Namespace", "Place", "Server", "World", "guest", "needs_root", "question"]
