"""Snapshots and clones of real guests."""

import contextlib
import secrets
from collections.abc import Iterator

import pytest
from vm.conftest import DEMO, fcvm, ok, running, vm


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
