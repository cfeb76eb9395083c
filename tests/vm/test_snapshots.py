"""Snapshots and clones of real guests.

One VM is booted for all of them; it counts, says so, and serves a page. Everything else is a clone of it.
"""

import contextlib
import json
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm.conftest import DEMO, ROOT, TIMEOUT, environment, fcvm, line, ls, ok, running, vm, wait, where_vms_are

SCRIPT = "httpd -h /www; echo begun; n=0; while :; do n=$((n+1)); echo $n; echo $n > /tmp/count; sleep 0.5; done"


def name() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def baseline() -> Iterator[str]:
    """The snapshot of a container that counts and serves."""
    source, tag = name(), name()
    ok("podman", "run", "-d", "--name", source, DEMO, "--", "sh", "-c", SCRIPT)
    try:
        wait(lambda: len(ok("logs", source).split()) > 2)  # a clone goes on behind it
        ok("snapshot", "create", source, "--tag", tag)
        before = int(ok("exec", source, "--", "cat", "/tmp/count"))
        assert (vm(source) or {})["status"] == "running"
        wait(lambda: int(ok("exec", source, "--", "cat", "/tmp/count")) > before)  # the source goes on
        lines = ok("logs", source).split()
        assert lines[:1] == [b"begun"]
        assert lines[1:] == [b"%d" % n for n in range(1, len(lines))]  # nothing lost, nothing twice
    finally:
        fcvm("stop", "-t", "0", source)
    yield tag
    ok("snapshots", "rm", tag)


@contextlib.contextmanager
def serving(tag: str, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A clone server that is ready: the process in the foreground here, and its pid where the VMs are."""
    with running("snapshot", "serve", tag, *options) as process:
        yield process, line(process).decode()


@pytest.fixture(scope="module")
def server(baseline: str) -> Iterator[str]:
    """The pid of a clone server of the baseline."""
    with serving(baseline, "--pool", "1-3") as (process, pid):
        yield pid
        assert ok("snapshot", "stop", pid).decode() == f"{pid}\n"
        assert process.wait(TIMEOUT) == 0
    assert json.loads(ok("snapshot", "ls", "--json")) == []


def listed(pid: str) -> dict[str, Any]:
    """What ``snapshot ls`` says of a server."""
    return next(s for s in json.loads(ok("snapshot", "ls", "--json")) if str(s["pid"]) == pid)


def clones(pid: str) -> list[str]:
    """The clones of a server."""
    return sorted(clone["name"] for clone in listed(pid)["clones"])


def test_a_clone_of_a_clone_goes_on_as_itself(baseline: str, vm_name: str) -> None:
    tags, source = [name(), name()], baseline
    try:
        for tag in [*tags, None]:
            with running("snapshot", "run", "--snapshot", source, "--name", vm_name, "--no-log-prefix") as process:
                first = int(line(process))  # the output goes on with whole lines, without a gap
                assert [int(line(process)) for _ in range(3)] == [first + 1, first + 2, first + 3]
                found = vm(vm_name)
                assert found is not None
                assert (found["status"], found["snapshot"]) == ("running", source)
                assert int(ok("exec", vm_name, "--", "cat", "/tmp/count")) > first
                assert ok("exec", vm_name, "--vm", "--", "hostname").decode().strip() == vm_name
                assert b"begun" not in ok("logs", vm_name)
                if tag is not None:
                    assert ok("snapshot", "create", vm_name, "--tag", tag).decode().strip() == tag
                    source = tag
                assert ok("stop", "-t", "0", vm_name).decode().strip() == vm_name
            assert vm(vm_name) is None
    finally:
        fcvm("snapshots", "rm", *tags)


@pytest.mark.timeout(6 * TIMEOUT)
def test_verify_and_carry_elsewhere(baseline: str, tmp_path: Path) -> None:
    done = fcvm("snapshot", "verify", baseline, timeout=2 * TIMEOUT)
    checks = done.stdout.decode().splitlines()
    assert done.returncode == 0, (checks, done.stderr)
    assert len(checks) >= 12
    assert all(check.startswith("ok") for check in checks)
    ok("snapshots", "export", baseline, str(tmp_path / "it.tar.zst"))
    copy, other = name(), name()
    try:
        assert ok("snapshots", "import", str(tmp_path / "it.tar.zst"), copy).decode().strip() == copy
        assert ok("snapshot", "run", "--snapshot", copy, "--exec", "echo ready") == b"ready\n"
        assert ok("snapshots", "import", "-", other, input=(tmp_path / "it.tar.zst").read_bytes()).decode().strip() == other
    finally:
        fcvm("snapshots", "rm", copy, other)


def test_a_clone_for_one_command(server: str) -> None:
    assert ok("snapshot", "run", "--pid", server, "--exec", "echo ready") == b"ready\n"
    done = fcvm("snapshot", "run", "--pid", server, "--exec", "sh -c 'echo no >&2; exit 7'")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"", b"no\n")


def test_two_clones_never_share_random_bytes(server: str) -> None:
    command = "head -c 16 /dev/urandom"
    first, second = (ok("snapshot", "run", "--pid", server, "--exec", command) for _ in range(2))
    assert len(first) == len(second) == 16
    assert first != second


def test_a_killed_client_takes_its_clone_with_it(server: str, vm_name: str) -> None:
    with running("snapshot", "run", "--pid", server, "--name", vm_name) as process:
        line(process)
        process.kill()
        process.wait()
        wait(lambda: vm(vm_name) is None)
    wait(lambda: clones(server) == [])


def held(server: str) -> list[bytes]:
    """How many descriptors and threads a clone server has; Firecrackers, network namespaces, interfaces, tables that there are."""
    counts = (f"ls /proc/{server}/fd", f"ls /proc/{server}/task", "pgrep -x firecracker", "lsns -rnt net", "ip -o link", "nft list tables")
    script = "; ".join(f"{count} | wc -l" for count in counts)
    return subprocess.run(where_vms_are("sh", "-c", script), env=environment(), capture_output=True, check=True).stdout.split()


def test_clones_that_come_and_go_leave_nothing(server: str, vm_name: str) -> None:
    ok("snapshot", "run", "--pid", server, "--name", vm_name, "--exec", "true")

    def settled() -> bool:
        """What was asked for lately counts no more."""
        found = listed(server)
        return bool(found["ready"] == found["target"] == 1)

    wait(settled)
    before: list[bytes] = []
    while before != (now := held(server)):  # the last one's end
        before = now
    for _ in range(20):
        ok("snapshot", "run", "--pid", server, "--name", vm_name, "--exec", "true")
    assert clones(server) == []
    assert vm(vm_name) is None
    wait(lambda: held(server) == before)


def test_a_clone_in_the_background_lives_as_long_as_its_server(baseline: str, vm_name: str) -> None:
    pid = ok("snapshot", "serve", "-d", "--pool", "1", baseline).decode().strip()
    try:
        assert ok("snapshot", "run", "--pid", pid, "-d", "--name", vm_name, "--network", "none").decode().strip() == vm_name
        wait(lambda: len(ok("logs", "--tail", "3", vm_name).split()) == 3)
        before = int(ok("exec", vm_name, "--", "cat", "/tmp/count"))
        wait(lambda: int(ok("exec", vm_name, "--", "cat", "/tmp/count")) > before)
        found = vm(vm_name) or {}
        assert (found["network"]["mode"], found["snapshot"]) == ("none", baseline)
        assert clones(pid) == [vm_name]
        ok("snapshots", "prune", "--all")
        assert baseline in ok("snapshots").decode(), "what is served is in use"
    finally:
        assert ok("snapshot", "stop", pid).decode() == f"{pid}\n"
    assert vm(vm_name) is None


def test_a_killed_server_ends_its_clones_with_a_message(baseline: str, vm_name: str) -> None:
    with (
        serving(baseline, "--backend", "uffd") as (_, pid),
        running("snapshot", "run", "--pid", pid, "--name", vm_name) as process,
    ):
        line(process)
        (listed,) = (s for s in json.loads(ok("snapshot", "ls", "--json")) if str(s["pid"]) == pid)
        assert listed["backend"] == "uffd"
        assert listed["faults"] > 0
        subprocess.run(where_vms_are("kill", "-9", pid), env=environment(), check=True)
        assert process.wait(TIMEOUT) == 125
        assert process.stderr is not None
        assert f"The clone server {pid} has ended, and its clones with it." in process.stderr.read().decode()
    assert vm(vm_name) is None


def test_control_c_at_a_server_with_clones_asks_first(baseline: str, vm_name: str) -> None:
    with (
        serving(baseline, "--pool", "0") as (served, pid),
        running("snapshot", "run", "--pid", pid, "--name", vm_name) as process,
    ):
        line(process)
        served.send_signal(signal.SIGINT)
        assert served.stderr is not None
        assert b"1 clones of" in served.stderr.readline()
        assert (vm(vm_name) or {})["status"] == "running"
        served.send_signal(signal.SIGINT)
        assert served.wait(TIMEOUT) == 0
        assert process.wait(TIMEOUT) == 137


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


# ---- the demonstrations, as a person runs them


def example(script: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *options],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.timeout(5 * TIMEOUT)
def test_example_clone_speed(baseline: str) -> None:
    out = example("clone-speed", "--snapshot", baseline, "--rounds", "2")
    assert "from the pool: 2 clones" in out
    assert "without a server: 2 clones" in out


@pytest.mark.timeout(5 * TIMEOUT)
def test_example_memory_sharing(baseline: str) -> None:
    rows = [row.split() for row in example("memory-sharing", "--snapshot", baseline, "--count", "4").splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "4"]
    assert float(rows[1][1]) < 4 * float(rows[0][1])  # four share what one has alone


@pytest.mark.timeout(5 * TIMEOUT)
def test_example_scale_out() -> None:
    """Twenty VMs whose guests serve on the same port, each on a port of its own on the host."""
    out = example("scale-out", "--count", "20", "--port", "18101")
    assert "20 of them have answered" in out
    assert [found for found in ls() if found["name"].startswith("demo-")] == []


# ---- what a clone does not share with the VM that its snapshot is of

# As fast as a shell can: who it is, and a random number; beside it a connection to the host, until that ends.
RESTLESS = """
(nc host.containers.internal PORT >/tmp/heard; echo ended >/tmp/ended) &
httpd -h /www
while :; do read name </proc/sys/kernel/hostname; read uuid </proc/sys/kernel/random/uuid; echo $name $uuid; done >/tmp/lines
"""
COUNT = "n=0; while :; do echo $n; n=$((n+1)); done"


@pytest.fixture(scope="module")
def talker() -> Iterator[int]:
    """The port of a server on the host's loopback that says something to each client again and again."""

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while True:
                connection.sendall(b".")
                time.sleep(0.2)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=listener.accept()[:1], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def pair(talker: int) -> Iterator[tuple[str, list[str]]]:
    """A source whose snapshot was taken while all kinds of things went on in it, and two clones."""
    source, tag, names = name(), name(), [name(), name()]
    script = RESTLESS.replace("PORT", str(talker))
    options = ["--forward-localhost", str(talker), "--publish", "127.0.0.1::80"]
    ok("podman", "run", "-d", "--name", source, *options, DEMO, "--", "sh", "-c", script)
    try:
        wait(lambda: fcvm("exec", source, "--", "test", "-s", "/tmp/heard").returncode == 0)
        with contextlib.ExitStack() as stack:
            for place in ([], ["--vm"]):
                process = stack.enter_context(running("exec", source, *place, "--", "sh", "-c", "echo begun; sleep 4711"))
                assert line(process) == b"begun"
            counting = stack.enter_context(running("exec", source, "--", "sh", "-c", COUNT))
            numbers = [int(line(counting)) for _ in range(100)]
            ok("snapshot", "create", source, "--tag", tag)
            numbers += [int(line(counting)) for _ in range(5000)]
            assert numbers == list(range(len(numbers))), "a session that ran meanwhile lost or repeated something"
            for clone in names:
                stack.enter_context(running("snapshot", "run", "--snapshot", tag, "--name", clone))
            for clone in names:
                wait(lambda clone=clone: (vm(clone) or {}).get("status") == "running")
            yield source, names
            for clone in names:
                ok("stop", "-t", "0", clone)
    finally:
        fcvm("stop", "-t", "0", source)
        fcvm("snapshots", "rm", tag)


def test_nothing_runs_in_a_clone_before_it_is_itself(pair: tuple[str, list[str]]) -> None:
    source, names = pair
    first, second = (ok("exec", clone, "--", "cat", "/tmp/lines").decode().splitlines()[:-1] for clone in names)
    common = next(n for n, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    assert common > 0
    for clone, lines in zip(names, (first, second), strict=True):
        assert {entry.split()[0] for entry in lines[:common]} == {source}
        strangers = [entry for entry in lines[common:] if entry.split()[0] != clone]
        assert len(strangers) <= 1, "at most the line that was being written"
        assert len(lines) > common + 10
    assert not {entry.split()[1] for entry in first[common:]} & {entry.split()[1] for entry in second[common:]}


def test_connections_end_in_a_clone_and_go_on_in_the_source(pair: tuple[str, list[str]]) -> None:
    source, names = pair
    for clone in names:
        wait(lambda clone=clone: fcvm("exec", clone, "--", "test", "-e", "/tmp/ended").returncode == 0)
    heard = len(ok("exec", source, "--", "cat", "/tmp/heard"))
    wait(lambda: len(ok("exec", source, "--", "cat", "/tmp/heard")) > heard)
    assert fcvm("exec", source, "--", "test", "-e", "/tmp/ended").returncode == 1


def test_the_source_keeps_its_published_port(pair: tuple[str, list[str]]) -> None:
    source, _ = pair
    (port,) = (vm(source) or {})["network"]["ports"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port['host_port']}/", timeout=TIMEOUT) as answer:
        assert answer.status == 200


def test_sessions_of_the_source_are_not_in_a_clone(pair: tuple[str, list[str]]) -> None:
    source, names = pair
    sleeping = "ps -o args | grep -c '[s]leep 4711'"
    for clone in names:
        assert ok("exec", clone, "--", "sh", "-c", f"{sleeping}; true").strip() == b"0"
        assert ok("exec", clone, "--vm", "--", "sh", "-c", f"busybox {sleeping}; true").strip() == b"0"
    assert int(ok("exec", source, "--", "sh", "-c", sleeping)) > 0
