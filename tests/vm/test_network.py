"""The network of real guests: a VM with nginx in each mode for most tests; FCVM_TEST_NETWORKS=rootless tests one mode."""

import contextlib
import http.client
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from vm.conftest import FCVM, ROOT, TIMEOUT, environment, fcvm, ok, running, vm, where_vms_are

from fcvm.network.inner import HAS_FLOWS

NGINX = "localhost/fcvm-nginx"
MODES = os.environ.get("FCVM_TEST_NETWORKS", "bridged,rootless" if os.geteuid() == 0 else "rootless").split(",")
# nginx on port 80; on 81 a server that only the guest's loopback reaches, on 82 another one
SERVERS = (
    "busybox httpd -f -p 127.0.0.1:81 -h /var/www & echo $! > /run/dead.pid; "
    "busybox httpd -p 82 -h /var/www; exec nginx -g 'daemon off;'"
)
PAGE = b"<title>"
PATIENCE = 240  # seconds until something in a guest has happened, under emulation beside other work
UDP = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(60)
sock.sendto(b"hello", (sys.argv[1], int(sys.argv[2])))
answer = sock.recv(100)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("", 5353))
print(answer.decode(), flush=True)
while True:
    data, client = sock.recvfrom(100)
    sock.sendto(b"guest " + data, client)
"""


def free_ports(count: int) -> list[int]:
    """Free TCP ports, one after the other."""
    while True:
        with ExitStack() as stack, suppress(OSError):
            first = stack.enter_context(socket.create_server(("", 0))).getsockname()[1]
            for port in range(first + 1, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return list(range(first, first + count))


def own_addresses() -> list[str]:
    """The host's own IPv4 address towards the world, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(("198.41.0.4", 9))
        return [sock.getsockname()[0]]
    return []


def get(port: int, ip: str = "127.0.0.1", process: "subprocess.Popen[bytes] | None" = None) -> bytes:
    """GET / of a published port, asked again until its server is up or ``process`` has ended."""
    host = f"[{ip}]" if ":" in ip else ip
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < deadline
            assert process is None or process.poll() is None, "the VM has ended"
            time.sleep(0.5)  # nothing tells when a server in a guest begins to listen


def wget(name: str, *urls: str) -> list[bytes]:
    """What the container ``name`` gets from each URL: the answer's first line, or why there is none."""
    one = 'out=$(busybox timeout 20 busybox wget -q -O - http://{}/ 2>&1 | busybox head -n 1); echo "${{out:-nothing}}"'
    return ok("exec", name, "--", "sh", "-c", "; ".join(one.format(url) for url in urls)).splitlines()


class Service(threading.Thread):
    """A server on the host: ``answer`` to whoever sends something, by TCP (HTTP) or UDP."""

    def __init__(self, ip: str, answer: bytes, *, udp: bool = False, port: int = 0) -> None:
        super().__init__(daemon=True)
        self.answer = answer
        if udp:
            self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                self.sock.bind((ip, port))
            except OSError:
                self.sock.close()
                raise
        else:
            self.sock = socket.create_server((ip, port))
        self.port: int = self.sock.getsockname()[1]
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while self.sock.type == socket.SOCK_STREAM:
                client, _ = self.sock.accept()
                with client, suppress(OSError):
                    client.recv(4096)
                    client.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + self.answer)
            while data_and_client := self.sock.recvfrom(4096):
                if not data_and_client[0]:
                    return
                self.sock.sendto(self.reply(data_and_client[0]), data_and_client[1])

    def reply(self, data: bytes) -> bytes:
        return self.answer + data

    def close(self) -> None:
        with suppress(OSError):  # ENOTCONN for UDP, which wakes the thread all the same
            self.sock.shutdown(socket.SHUT_RDWR)
        self.join()
        self.sock.close()


class Resolver(Service):
    """Says 203.0.113.7 to every question for an address of IPv4, and nothing to others."""

    def reply(self, data: bytes) -> bytes:
        question = data[12 : data.index(b"\0", 12) + 5]
        wanted = question[-4:-2] == b"\0\1"  # type A
        answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + bytes([203, 0, 113, 7]) if wanted else b""
        return data[:2] + b"\x81\x80\0\1" + bytes([0, wanted, 0, 0, 0, 0]) + question + answer


@dataclass(frozen=True, slots=True)
class Host:
    """What listens on the host."""

    public: Service
    forwarded: Service
    secret: Service
    udp: Service
    dns: Resolver | None


@dataclass(frozen=True, slots=True)
class Guest:
    """A VM, the host's ports that lead to it, and what its ``fcvm podman run`` prints on stderr.

    ``web`` (80) is published on every address, ``local`` (82) on the loopback; nobody reaches what is behind ``dead`` (81).
    """

    name: str
    mode: str
    web: int
    dead: int
    local: int
    udp: int
    errors: Path
    process: "subprocess.Popen[bytes]"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with ExitStack() as stack:
        dns = None
        for ip in own_addresses():
            with suppress(OSError):  # port 53 is for root, and may be another server's
                dns = stack.enter_context(closing(Resolver(ip, b"", udp=True, port=53)))
        services = [
            stack.enter_context(closing(service))
            for service in (
                Service("0.0.0.0", b"public"),
                Service("127.0.0.1", b"forwarded"),
                Service("127.0.0.1", b"secret"),
                Service("0.0.0.0", b"host ", udp=True),
            )
        ]
        yield Host(*services, dns)


@contextlib.contextmanager
def started(host: Host, mode: str, directory: Path) -> Iterator[Guest]:
    """A VM in the foreground, so that its warnings are seen."""
    name, errors = f"test-{secrets.token_hex(4)}", directory / f"{mode}.stderr"
    web, dead, local, udp = free_ports(4)
    publish = f"{web}:80,{dead}:81,127.0.0.1:{local}:82,127.0.0.1:{udp}:5353/udp"
    words = ["--network", mode, "--publish", publish, "--forward-localhost", str(host.forwarded.port)]
    if host.dns:
        words += ["--dns", own_addresses()[0]]
    run = [*FCVM, "podman", "run", "--name", name, "--mem", "256", *words, NGINX, "--", "sh", "-c", SERVERS]
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            run, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment()
        )
    try:
        yield Guest(name, mode, web, dead, local, udp, errors, process)
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def guests(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Guest]]:
    """A VM of each mode that this user may have, by its mode."""
    subprocess.run([sys.executable, str(ROOT / "examples/build"), "nginx"], check=True, env=environment(), timeout=TIMEOUT)
    with ExitStack() as stack:
        found = {mode: stack.enter_context(started(host, mode, tmp_path_factory.getbasetemp())) for mode in MODES}
        for guest in found.values():
            assert PAGE in get(guest.web, process=guest.process)
        yield found


@pytest.fixture(params=MODES)
def guest(request: pytest.FixtureRequest, guests: dict[str, Guest]) -> Guest:
    return guests[request.param]


def test_without_a_network_there_is_only_loopback() -> None:
    out = ok("podman", "run", "--network", "none", "localhost/fcvm-demo", "--", "sh", "-c", "wget -q -T 3 -O - http://10.0.2.2/ || echo none")
    assert out == b"none\n"


def test_published_ports_reach_nginx(guest: Guest) -> None:
    for ip in ("127.0.0.1", "::1", *own_addresses()):
        assert PAGE in get(guest.web, ip), ip
    assert PAGE in get(guest.local)
    for ip in own_addresses():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((ip, guest.local), timeout=30)
    network = (vm(guest.name) or {})["network"]
    assert network["mode"] == guest.mode
    assert [(port["host_ip"], port["host_port"], port["guest_port"], port["protocol"]) for port in network["ports"]] == [
        ("", guest.web, 80, "tcp"),
        ("", guest.dead, 81, "tcp"),
        ("127.0.0.1", guest.local, 82, "tcp"),
        ("127.0.0.1", guest.udp, 5353, "udp"),
    ]


@pytest.mark.skipif("bridged" not in MODES, reason="needs the bridged mode")
def test_an_established_connection_passes_the_rules_by(guests: dict[str, Guest]) -> None:
    """The namespace's flowtable has it, where the kernel has flowtables (fcvm/network/inner.py)."""
    if subprocess.run(where_vms_are("test", "-e", HAS_FLOWS), check=False).returncode:
        pytest.skip("the kernel has no flowtables")
    guest = guests["bridged"]
    inside = 'cat "/proc/$(pgrep -f "firecracker .*--id $0")/net/nf_conntrack"'
    with closing(http.client.HTTPConnection("127.0.0.1", guest.web, timeout=PATIENCE)) as connection:
        for _ in range(2):
            connection.request("GET", "/")
            assert PAGE in connection.getresponse().read()
        look = subprocess.run(where_vms_are("sh", "-c", inside, (vm(guest.name) or {})["id"]), capture_output=True, text=True, check=True)
    found = [line for line in look.stdout.splitlines() if "[OFFLOAD]" in line]
    assert any("dport=80 " in line for line in found), look.stdout


def test_the_guest_reaches_the_host_but_for_its_loopback(guest: Guest, host: Host) -> None:
    name = "host.containers.internal"
    found = wget(guest.name, *(f"{name}:{service.port}" for service in (host.public, host.forwarded, host.secret)))
    assert found[:2] == [b"public", b"forwarded"]
    assert b"Connection refused" in found[2]


def test_datagrams_both_ways(guest: Guest, host: Host) -> None:
    """A guest that asks the host, and answers two clients of the host."""
    with running("exec", "--vm", guest.name, "--", "python3", "-c", UDP, "10.0.2.2", str(host.udp.port)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"host hello\n"
        with closing(client()) as one, closing(client()) as two:
            for sock, text in ((one, b"one"), (two, b"two"), (one, b"three")):
                sock.sendto(text, ("127.0.0.1", guest.udp))
                assert sock.recv(100) == b"guest " + text
        process.kill()


def client() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(60)
    return sock


def test_names_are_looked_up_by_the_resolver_of_the_host(guest: Guest, host: Host) -> None:
    if host.dns is None:
        pytest.skip("needs root, and a host that has an address")
    out = ok("exec", guest.name, "--", "busybox", "nslookup", "-type=a", "some.name.test")
    assert b"10.0.2.3" in out
    assert b"203.0.113.7" in out


@pytest.mark.skipif(len(MODES) < 2, reason="needs both modes")
def test_vms_reach_each_other_by_published_ports_only(guests: dict[str, Guest]) -> None:
    for one, other in (("bridged", "rootless"), ("rootless", "bridged")):
        network = (vm(guests[other].name) or {})["network"]
        closed = [f"10.0.2.2:{guests[other].local}"] + [f"{ip}:{guests[other].local}" for ip in own_addresses()]
        if network["host_ip"]:
            closed += [f"{network['host_ip']}:82"]
        found = wget(guests[one].name, f"10.0.2.2:{guests[other].web}", *closed)
        assert len(found) == 1 + len(closed), found
        assert b"<" in found[0]
        assert not [line for line in found[1:] if b"<" in line]


def test_a_service_on_the_loopback_only_is_told_of(guest: Guest) -> None:
    """When a connection is refused, and not any more when the service has been mended."""

    def connect() -> None:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{guest.dead}/", timeout=20).close()

    until(lambda: noted(guest), connect)
    warning = f"Port 81 is published, but what listens on it in {guest.name} does so on the loopback only"
    assert warning in guest.errors.read_text()
    assert b"->81 (loopback only)" in ok("ls")
    ok("exec", guest.name, "--", "sh", "-c", "kill $(busybox cat /run/dead.pid); busybox httpd -p 81 -h /var/www")
    assert PAGE in get(guest.dead)
    until(lambda: not noted(guest))


def noted(guest: Guest) -> bool:
    ports = (vm(guest.name) or {})["network"]["ports"]
    return bool([port for port in ports if port.get("loopback_only")])


def until(condition: Callable[[], bool], action: Callable[[], None] = lambda: None) -> None:
    """Repeat ``action`` until ``condition``."""
    deadline = time.monotonic() + PATIENCE
    action()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)
        action()


def test_a_port_in_use_is_an_error_before_anything_starts(vm_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fcvm("podman", "run", "--name", vm_name, "--publish", f"127.0.0.1:{port}:80", "localhost/fcvm-demo", "--", "true")
    assert done.returncode == 125
    assert str(port).encode() in done.stderr
    assert vm(vm_name) is None
