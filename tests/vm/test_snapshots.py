"""Snapshots and clones of real guests."""

import contextlib
import json
import secrets
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from vm.conftest import DEMO, TIMEOUT, fcvm, ok, running, vm


@pytest.fixture(scope="module")
def warm() -> Iterator[str]:
    """A snapshot of a container that counts."""
    name, tag = f"test-{secrets.token_hex(4)}", f"test-{secrets.token_hex(4)}"
    script = "echo begun; n=0; while :; do n=$((n+1)); echo $n > /tmp/count; sleep 0.2; done"
    ok("podman", "run", "-d", "--name", name, DEMO, "--", "sh", "-c", script)
    try:
        ok("snapshot", "create", name, "--tag", tag)
        assert (vm(name) or {})["status"] == "running"  # the source goes on
        assert int(ok("exec", name, "--", "cat", "/tmp/count")) > 0
    finally:
        fcvm("stop", "-t", "0", name)
    yield tag
    with contextlib.suppress(AssertionError):
        ok("snapshots", "rm", tag)


def test_a_clone_goes_on_as_itself(warm: str, vm_name: str) -> None:
    with running("snapshot", "run", "--snapshot", warm, "--name", vm_name):
        deadline = 240
        while (found := vm(vm_name)) is None or found["status"] != "running":
            deadline -= 1
            assert deadline
        assert found["snapshot"] == warm
        assert int(ok("exec", vm_name, "--", "cat", "/tmp/count")) > 0
        assert ok("exec", vm_name, "--vm", "--", "hostname") == f"{vm_name}\n".encode()


def test_a_clone_for_one_command(warm: str) -> None:
    assert ok("snapshot", "run", "--snapshot", warm, "--exec", "echo ready") == b"ready\n"


def test_two_clones_never_share_random_bytes(warm: str) -> None:
    command = "head -c 16 /dev/urandom"
    first, second = (ok("snapshot", "run", "--snapshot", warm, "--exec", command) for _ in range(2))
    assert len(first) == len(second) == 16
    assert first != second


def line(process: "subprocess.Popen[bytes]") -> bytes:
    """The next line that it prints; what it said on stderr if there is none."""
    assert process.stdout is not None
    text = process.stdout.readline()
    if not text:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read().decode())
    return text.strip()


def wait(condition) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_next_identical_run_starts_warm(vm_name: str) -> None:
    """The application starts once: the second run has its output, its random choice, and a name of its own."""
    script = f"echo {vm_name} begins; cat /proc/sys/kernel/random/uuid; httpd -h /www; n=0; while :; do n=$((n+1)); echo $n; sleep 0.5; done"
    options = ["podman", "run", "--warm", "--no-log-prefix", "--health-check", "http://127.0.0.1:80/"]

    def lines(process: "subprocess.Popen[bytes]", until: int) -> list[bytes]:
        found: list[bytes] = []
        while found[-1:] != [b"%d" % until]:
            found.append(line(process))
        return found

    def mine() -> list[str]:
        return [
            found["tag"]
            for found in json.loads(ok("snapshots", "--json"))
            if found["kind"] == "warm" and found["tag"] not in before
        ]

    before = [found["tag"] for found in json.loads(ok("snapshots", "--json"))]
    with running(*options, "--name", vm_name, DEMO, "--", "sh", "-c", script) as process:
        first = lines(process, 1)
        wait(mine)
        assert ok("stop", "-t", "0", vm_name)
    (tag,) = mine()
    try:
        other = f"{vm_name}-2"
        with running(*options, "--name", other, "-p", "127.0.0.1:18089:80", DEMO, "--", "sh", "-c", script) as process:
            second = lines(process, 30)
            assert second[:3] == first[:3]
            assert second[2:] == [b"%d" % n for n in range(1, 31)]  # nothing lost, nothing twice
            assert (vm(other) or {})["snapshot"] == tag
            with urllib.request.urlopen("http://127.0.0.1:18089/", timeout=TIMEOUT) as page:
                assert b"fcvm" in page.read()
            assert ok("exec", other, "--vm", "--", "hostname").decode().strip() == other
            assert ok("logs", other).split(b"\n")[: len(second)] == second
            assert ok("stop", "-t", "0", other)
    finally:
        fcvm("snapshots", "rm", tag)
