"""fcvm.firecracker against the real Firecracker: its life, its console, its API's errors."""

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import baremetal
import pytest
from baremetal import Guest

from fcvm.errors import FirecrackerError
from fcvm.firecracker.api import Api
from fcvm.firecracker.process import API_SOCKET, Firecracker
from fcvm.linux import namespaces


@pytest.fixture
def vmm(tmp_path: Path):
    with Firecracker(baremetal.firecracker(), tmp_path, "test") as started:
        yield started


def test_answers_as_soon_as_it_is_made(vmm: Firecracker) -> None:
    assert vmm.api.get("/")["state"] == "Not started"
    assert not vmm.ended()


def test_guest_boots_and_answers_over_vsock(tmp_path: Path) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        assert vmm.api.get("/")["state"] == "Running"
        with Guest(tmp_path / "vm") as guest:
            assert guest.echo(42) == 42


def test_console_is_kept_in_the_file_and_in_the_tail(tmp_path: Path) -> None:
    with baremetal.booted(tmp_path / "vm") as vmm:
        assert "READY" in vmm.console.lines()
    kept = (tmp_path / "vm/console.log").read_bytes()
    assert b"BOOT\nREADY\n" in baremetal.without_log(kept)
    assert "    READY" in vmm.console.quote()


def test_refused_request_carries_the_fault_message(vmm: Firecracker) -> None:
    with pytest.raises(FirecrackerError, match="PUT /machine-config"):
        vmm.api.put("/machine-config", {"vcpu_count": 0, "mem_size_mib": 64})
    with pytest.raises(FirecrackerError, match="PUT /nonsense"):
        vmm.api.put("/nonsense", {})
    assert vmm.api.get("/")["state"] == "Not started", "the connection must survive a refusal"


def test_start_without_a_kernel_is_refused(vmm: Firecracker) -> None:
    with pytest.raises(FirecrackerError, match="refused PUT /actions"):
        vmm.api.put("/actions", {"action_type": "InstanceStart"})


def test_requests_sent_ahead_are_answered_in_order(vmm: Firecracker, tmp_path: Path) -> None:
    apis = [Api(tmp_path / API_SOCKET) for _ in range(3)]
    try:
        for api in apis:
            api.send("GET", "/version")
        assert {api.receive()["firecracker_version"] for api in apis} == {
            vmm.api.get("/version")["firecracker_version"]
        }
    finally:
        for api in apis:
            api.close()


def test_death_during_a_call_is_an_error(vmm: Firecracker) -> None:
    os.kill(vmm.pid, signal.SIGSTOP)  # so that the call cannot be answered
    failures: list[BaseException] = []

    def call() -> None:
        try:
            vmm.api.get("/")
        except FirecrackerError as error:
            failures.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    os.kill(vmm.pid, signal.SIGKILL)
    thread.join(60)
    assert len(failures) == 1
    assert "died during GET /" in str(failures[0]) or "does not answer GET /" in str(failures[0])
    assert select.select([vmm.pidfd], [], [], 60)[0], "the pidfd must tell the death"


def test_call_after_death_is_an_error(vmm: Firecracker) -> None:
    os.kill(vmm.pid, signal.SIGKILL)
    vmm.process.wait()
    with pytest.raises(FirecrackerError):
        vmm.api.get("/")


def test_call_that_is_not_answered_times_out(vmm: Firecracker, tmp_path: Path) -> None:
    api = Api(tmp_path / API_SOCKET, timeout=0.05)
    os.kill(vmm.pid, signal.SIGSTOP)
    try:
        with pytest.raises(FirecrackerError, match=r"within 0\.05 seconds"):
            api.get("/")
    finally:
        api.close()


def test_kill_ends_and_reaps_and_may_be_repeated(vmm: Firecracker) -> None:
    vmm.kill()
    assert vmm.ended()
    assert not Path(f"/proc/{vmm.pid}").exists()
    vmm.kill()


def test_program_that_does_not_start_says_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(FirecrackerError, match="did not start") as caught:
        Firecracker(baremetal.firecracker(), tmp_path, "test", arguments=("--no-such-argument",))
    assert "no-such-argument" in caught.value.message
    assert baremetal.children() == []


@pytest.mark.parametrize("user", [False, True])
def test_runs_in_its_namespace_and_leaves_us_in_ours(tmp_path: Path, user: bool) -> None:
    before = os.readlink("/proc/self/ns/net")
    namespace, _ = namespaces.create(list, user=user)
    with namespace, Firecracker(baremetal.firecracker(), tmp_path, "test", namespace=namespace) as vmm:
        inside = os.stat(f"/proc/{vmm.pid}/ns/net")
        assert os.path.samestat(inside, os.fstat(namespace.net))
        assert os.readlink("/proc/self/ns/net") == before


def test_stale_api_socket_is_replaced(tmp_path: Path) -> None:
    with Firecracker(baremetal.firecracker(), tmp_path, "one"):
        pass
    assert (tmp_path / API_SOCKET).exists(), "a killed Firecracker leaves its socket"
    with Firecracker(baremetal.firecracker(), tmp_path, "two") as vmm:
        assert vmm.api.get("/")["id"] == "two"


def test_directory_with_a_long_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    with baremetal.booted(deep), Guest(deep) as guest:
        assert guest.echo(7) == 7


OWNER = """
import os, sys
from pathlib import Path
from fcvm.firecracker.process import Firecracker
vmm = Firecracker(Path(sys.argv[1]), Path(sys.argv[2]), "test")
print(vmm.pid, flush=True)
sys.stdin.read()
"""


def test_dies_with_its_owner(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, baremetal.firecracker(), tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as owner:
        assert owner.stdout is not None
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
        try:
            owner.kill()
            assert select.select([pidfd], [], [], 60)[0]
        finally:
            os.close(pidfd)
