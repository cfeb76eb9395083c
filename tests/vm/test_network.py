"""The network of real guests."""

import socket
import threading
import time
import urllib.request
from contextlib import closing, suppress

import pytest
from vm.conftest import fcvm, ok, vm


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int, ip: str = "127.0.0.1") -> bytes:
    """GET / of a published port, asked again until its server is up."""
    host = f"[{ip}]" if ":" in ip else ip
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)  # nothing tells when a server in a guest begins to listen


class Service(threading.Thread):
    """A TCP server on the host that says ``name`` to whoever connects."""

    def __init__(self, name: str, ip: str) -> None:
        super().__init__(daemon=True)
        self.sock = socket.create_server((ip, 0))
        self.port: int = self.sock.getsockname()[1]
        self.answer = f"HTTP/1.0 200 OK\r\n\r\n{name}".encode()
        self.start()

    def run(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.sock.accept()
                with client:
                    client.recv(4096)
                    client.sendall(self.answer)

    def close(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


HTTPD = ("httpd", "-f", "-p", "80", "-h", "/www")


def test_a_published_port_reaches_the_container(detached, vm_name: str) -> None:
    port = free_port()
    detached(*HTTPD, options=["--publish", f"127.0.0.1:{port}:80"])
    found = vm(vm_name)
    assert found is not None
    assert [(p["host_ip"], p["host_port"], p["guest_port"]) for p in found["network"]["ports"]] == [("127.0.0.1", port, 80)]
    assert b"<" in get(port)


@pytest.mark.parametrize("mode", ["bridged"])
def test_the_host_and_the_guest_reach_each_other(detached, vm_name: str, mode: str) -> None:
    """Published on all addresses; the host's loopback is closed but for what is asked."""
    port = free_port()
    with (
        closing(Service("public", "0.0.0.0")) as public,
        closing(Service("forwarded", "127.0.0.1")) as forwarded,
        closing(Service("secret", "127.0.0.1")) as secret,
    ):
        options = ["--network", mode, "--publish", f"{port}:80", "--forward-localhost", str(forwarded.port)]
        detached(*HTTPD, options=options)
        for ip in ("127.0.0.1", "::1", *own_addresses()):
            assert b"<" in get(port, ip), ip
        found = vm(vm_name)
        assert found is not None
        assert found["network"]["mode"] == mode
        ask = "for port in {}; do timeout 10 wget -q -O - http://host.containers.internal:$port/ || echo closed; echo; done"
        ports = f"{public.port} {forwarded.port} {secret.port}"
        out = ok("exec", vm_name, "--", "sh", "-c", ask.format(ports) + "; cat /etc/resolv.conf")
    assert out.split() == [b"public", b"forwarded", b"closed", b"nameserver", b"10.0.2.3"]


def own_addresses() -> list[str]:
    """The host's own IPv4 address towards the world, if it has one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.connect(("198.41.0.4", 9))
        return [sock.getsockname()[0]]
    return []


def test_a_port_in_use_is_an_error_before_anything_starts(vm_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = fcvm("podman", "run", "--name", vm_name, "--publish", f"127.0.0.1:{port}:80", "localhost/fcvm-demo", "--", "true")
    assert done.returncode == 125
    assert str(port).encode() in done.stderr
    assert vm(vm_name) is None


def test_without_a_network_there_is_only_loopback() -> None:
    out = ok("podman", "run", "--network", "none", "localhost/fcvm-demo", "--", "sh", "-c", "wget -q -T 3 -O - http://10.0.2.2/ || echo none")
    assert out == b"none\n"
