"""The network of real guests."""

import socket
import time
import urllib.request

from vm.conftest import fcvm, ok, vm


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def get(port: int) -> bytes:
    """GET / of a published port, asked again until its server is up."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
                return bytes(answer.read())
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)  # nothing tells when a server in a guest begins to listen


HTTPD = ("httpd", "-f", "-p", "80", "-h", "/www")


def test_a_published_port_reaches_the_container(detached, vm_name: str) -> None:
    port = free_port()
    detached(*HTTPD, options=["--publish", f"127.0.0.1:{port}:80"])
    found = vm(vm_name)
    assert found is not None
    assert [(p["host_ip"], p["host_port"], p["guest_port"]) for p in found["network"]["ports"]] == [("127.0.0.1", port, 80)]
    assert b"<" in get(port)


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
