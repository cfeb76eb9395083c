"""VMs in a VM. One outer and one inner VM for all of it: under emulation an inner one takes a minute or more to boot."""

import json
import re
import secrets
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm.conftest import DEMO, fcvm, ok, vm

PATIENCE = 1500  # seconds for anything inside; beside other work an emulated inner VM takes several minutes
pytestmark = pytest.mark.timeout(2 * PATIENCE)

INNER = "inner"
SERVER = "echo Hello from inception; exec httpd -f -p 80 -h /www"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the host that is mapped through both VMs."""
    directory = tmp_path_factory.mktemp("shared")
    (directory / "word").write_text("from the host")
    return directory


@pytest.fixture(scope="module")
def outer(shared: Path) -> Iterator[str]:
    """A VM that can run VMs, its port 8080 published."""
    name = f"test-{secrets.token_hex(4)}"
    options = ["--inception", "--privileged", "--cpu", "1", "--mem", "2g", "-p", "127.0.0.1::8080", "--map", f"{shared}:/shared"]
    ok("podman", "run", "-d", "--name", name, *options, DEMO, "--", "sleep", "100000", timeout=PATIENCE)
    try:
        yield name
    finally:
        fcvm("stop", "-t", "0", name)


@pytest.fixture(scope="module")
def inner(outer: str) -> str:
    """A web server in a VM in ``outer``, published there; returns ``outer``'s name, with which it ends."""
    options = ["--cpu", "1", "--mem", "320", "-p", "8080:80", "--map", "/shared:/shared"]
    inside(outer, "podman", "run", "-d", "--name", INNER, *options, DEMO, "--", "sh", "-c", SERVER)
    return outer


def guest(outer: str, *command: str) -> bytes:
    """Run a command in the outer VM's guest OS."""
    return ok("exec", outer, "--vm", "--", *command, timeout=PATIENCE)


def inside(outer: str, *args: str) -> bytes:
    """Run ``fcvm ARGS`` in the outer VM."""
    return guest(outer, "fcvm", *args)


def test_kvm_is_there_in_the_guest_and_in_a_privileged_container(outer: str) -> None:
    assert guest(outer, "ls", "/dev/kvm") == b"/dev/kvm\n"
    assert ok("exec", outer, "--", "ls", "/dev/kvm") == b"/dev/kvm\n"
    assert json.loads(inside(outer, "doctor", "--json"))["ok"]


def test_a_container_in_an_inner_vm_prints_its_line(inner: str) -> None:
    assert b"Hello from inception" in inside(inner, "logs", INNER)


def test_exec_into_an_inner_vm(inner: str) -> None:
    assert inside(inner, "exec", INNER, "--", "echo", "here") == b"here\n"
    kernel = inside(inner, "exec", INNER, "--vm", "--", "cat", "/proc/sys/kernel/hostname")
    assert kernel == f"{INNER}\n".encode()


def test_a_port_of_an_inner_vm_reaches_the_host(inner: str) -> None:
    network: dict[str, Any] = (vm(inner) or {})["network"]
    port = network["ports"][0]["host_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE) as answer:
        assert answer.status == 200


def test_a_directory_of_the_host_reaches_an_inner_container(inner: str, shared: Path) -> None:
    script = "cat /shared/word; echo from the inside > /shared/answer"
    assert inside(inner, "exec", INNER, "--", "sh", "-c", script) == b"from the host"
    assert (shared / "answer").read_text() == "from the inside\n"


def test_an_outer_vm_with_one_inside_has_no_snapshot(inner: str) -> None:
    refused = fcvm("snapshot", "create", inner, "--tag", f"test-{secrets.token_hex(4)}", timeout=PATIENCE)
    assert refused.returncode == 125
    assert b"1 VM runs in the VM" in refused.stderr
    assert inside(inner, "exec", INNER, "--", "echo", "still here") == b"still here\n"


def test_a_clone_inside(inner: str) -> None:
    inside(inner, "snapshot", "create", INNER, "--tag", "warm")
    assert inside(inner, "snapshot", "run", "--snapshot", "warm", "--exec", "echo a clone") == b"a clone\n"
    inside(inner, "snapshots", "rm", "warm")


def test_nothing_is_left_at_any_level(outer: str) -> None:
    inside(outer, "stop", "-t", "0", "--all")
    assert json.loads(inside(outer, "ls", "--all", "--json")) == []
    assert guest(outer, "ls", "/scratch/fcvm/vms", "/scratch/fcvm/state").split() == [b"/scratch/fcvm/state:", b"/scratch/fcvm/vms:"]
    assert fcvm("exec", outer, "--vm", "--", "pidof", "firecracker").returncode == 1
    assert re.findall(rb"veth|tap", guest(outer, "ls", "/sys/class/net")) == []
    assert guest(outer, "nft", "list", "tables") == b""
