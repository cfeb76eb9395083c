"""The clone server and its clients, with real clones whose guest acts the agent (baremetal/guest.c)."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import baremetal
import pytest
from baremetal import Guest

from fc_agent import structs
from fcvm import config
from fcvm.errors import NotFoundError
from fcvm.firecracker import boot
from fcvm.setup import Assets
from fcvm.snapshots import create, servers, store, working_set
from fcvm.snapshots.client import Clone, Wanted
from fcvm.snapshots.server import CloneServer, Settings
from fcvm.storage.layout import Layout
from fcvm.vm import state
from fcvm.vm.spec import ImageUse, RunSpec

SERVE = """
import json, os, sys
from fcvm import config, setup
from fcvm.snapshots import server
from fcvm.storage.layout import Layout
settings = config.load({"base_dir": sys.argv[1]})
server.serve(
    server.Settings(**json.loads(sys.argv[2])),
    settings,
    setup.find(settings, Layout(settings.base_dir)),
    ready=lambda: print(os.getpid(), flush=True),
    say=lambda line: print(line, file=sys.stderr, flush=True),
)
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A data directory with the snapshot ``warm`` of a VM that runs a container."""
    made = Layout(tmp_path_factory.mktemp("base"))
    for path in (made.guest / "root.img", made.images / "image.img"):
        path.write_bytes(bytes(4096))
    spec = RunSpec(
        name="baseline",
        image=ImageUse(reference="localhost/demo", id="sha256:1", digest="sha256:2", path="/nowhere.img"),
        cpu=1,
        memory=64,
        network="none",
    )
    with baremetal.booted(made.base / "vm") as vmm:
        with Guest(made.base / "vm") as guest:
            guest.on_reset(baremetal.ACT_AGENT)
        manifest = structs.replace(
            baremetal.manifest(vmm),
            disks={boot.ROOT_DISK: "guest/root.img", boot.IMAGE_DISK: "images/image.img"},
            image={"reference": "localhost/demo"},
            spec=spec.to_json(),
        )
        create.take(made, "warm", vmm, manifest)
    (made.base / "assets.json").write_text(assets(made).to_json())
    return made


def assets(layout: Layout) -> Assets:
    """Of what setup makes, clones need Firecracker only."""
    nothing = layout.base / "nothing"
    return Assets(nothing, nothing, "", nothing, nothing, nothing, nothing, baremetal.firecracker(), "1.12.1")


def environment(layout: Layout) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FCVM_BASE_DIR": str(layout.base),
        "FCVM_ASSETS": str(layout.base / "assets.json"),
        "FCVM_MACHINE": "never",
        "FCVM_CONFIG": "/dev/null",
    }


@contextlib.contextmanager
def serving(layout: Layout, **settings: object) -> Iterator["subprocess.Popen[str]"]:
    """A clone server that is ready; ended by SIGTERM at the end, which must leave nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, layout.base, json.dumps({"tag": "warm", **settings})],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(layout),
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                assert process.stderr is not None
                raise AssertionError(process.stderr.read())
            assert int(line) == process.pid
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)
    servers._sweep(layout)
    assert clean(layout)


def clean(layout: Layout) -> bool:
    """Whether no VM, no server and no clone is left."""
    state.sweep(layout)
    vms = [p for p in layout.vms.iterdir() if not p.name.startswith(".pool-")]
    return vms == [] and list(state.records(layout)) == [] and servers.running(layout) == []


def fcvm(layout: Layout, *words: object, check: int | None = 0) -> "subprocess.CompletedProcess[str]":
    """Run `fcvm WORDS` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "fcvm", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(layout),
    )
    if check is not None:
        assert done.returncode == check, done
    return done


@contextlib.contextmanager
def client(layout: Layout, *words: object) -> Iterator["subprocess.Popen[str]"]:
    """`fcvm snapshot run WORDS`, while it runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "fcvm", "snapshot", "run", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(layout),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    return line.strip()


def names(layout: Layout) -> list[str]:
    return sorted(clone["name"] for server in servers.running(layout) for clone in server["clones"])


def wait_until(layout: Layout, expected: list[str]) -> None:
    """Wait until the clones of the servers are ``expected``."""
    for _ in range(1200):
        if names(layout) == expected:
            return
        threading.Event().wait(0.05)
    raise AssertionError(names(layout))


def wait_ready(layout: Layout, count: int) -> None:
    """Wait until the pool of the only server is full again."""
    for _ in range(1200):
        if servers.running(layout)[0]["ready"] == count:
            return
        threading.Event().wait(0.05)
    raise AssertionError(servers.running(layout))


def test_exec_in_a_fresh_clone(layout: Layout) -> None:
    with serving(layout) as server:
        done = fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "echo ready")
        assert done.stdout == "ready\n"
        assert done.stderr == ""
        for _ in range(3):  # the name is free again each time
            fcvm(layout, "snapshot", "run", "--pid", server.pid, "--name", "same", "--exec", "true")
        wait_until(layout, [])


def test_exec_with_a_port_in_a_loop(layout: Layout) -> None:
    with serving(layout, network="rootless") as server:
        for _ in range(3):
            fcvm(layout, "snapshot", "run", "--pid", server.pid, "-p", "127.0.0.1:28081:80", "--exec", "true")
            assert names(layout) == [], "so the port is free"


def test_output_and_name_of_a_clone(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        assert line_of(process) == "hello from the container"
        (record,) = state.records(layout)
        assert (record.name, record.pid, record.status, record.snapshot) == ("one", process.pid, "running", "warm")
        assert names(layout) == ["one"]
        assert "hello from the container" in fcvm(layout, "logs", "one").stdout
        assert fcvm(layout, "exec", "one", "--", "anything").stdout == "ready\n"
        assert fcvm(layout, "stop", "one").stdout == "one\n"
        assert process.wait(60) == 143


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_client_stops_its_clone(layout: Layout, number: int) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid) as process:
        line_of(process)
        process.send_signal(number)
        assert process.wait(60) == 143
        wait_until(layout, [])


def test_killed_client_takes_its_clone_with_it(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        line_of(process)
        process.kill()
        wait_until(layout, [])
        assert state.sweep(layout) == []
        assert list(state.records(layout)) == []


def test_reader_that_goes_away_ends_the_clone(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid) as process:
        assert process.stdout is not None
        process.stdout.close()  # before the container has printed, or after: then it prints nothing any more
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        wait_until(layout, [])


def test_clone_whose_output_nobody_reads_ends_as_by_sigpipe(layout: Layout) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "fcvm", "snapshot", "run", "--pid"]
    with serving(layout) as server, open(write, "wb") as nobody:
        done = subprocess.run([*words, str(server.pid)], stdout=nobody, env=environment(layout), timeout=120, check=False)
        assert done.returncode == 141, "as a run of its own"
        wait_until(layout, [])


def test_fleet_in_one_call(layout: Layout) -> None:
    with serving(layout, maximum=4) as server:
        with client(layout, "--pid", server.pid, "--name", "web", "--count", 5) as process:
            assert [line_of(process) for _ in range(5)] == [f"web-{n}" for n in range(1, 6)]
            assert names(layout) == [f"web-{n}" for n in range(1, 6)]
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 143
        wait_until(layout, [])


def test_fleet_of_one_is_a_fleet(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "web", "--count", 1) as process:
        assert line_of(process) == "web-1"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        wait_until(layout, [])


def test_fleet_with_a_name_that_is_taken_is_none(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "web-2") as process:
        line_of(process)
        for detach in ([], ["--detach"]):
            fleet = ["--name", "web", "--count", 3, *detach]
            done = fcvm(layout, "snapshot", "run", "--pid", server.pid, *fleet, check=125)
            assert "A VM named 'web-2' exists already" in done.stderr
            assert names(layout) == ["web-2"], "the others have gone when the command has"


def test_detached_clone_lives_as_long_as_the_server(layout: Layout) -> None:
    with serving(layout) as server:
        assert fcvm(layout, "snapshot", "run", "-d", "--pid", server.pid, "--name", "one").stdout == "one\n"
        assert names(layout) == ["one"]
        assert fcvm(layout, "exec", "one", "--", "anything").stdout == "ready\n"


def test_killed_server_ends_everything_with_a_message(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        line_of(process)
        children = baremetal.children(server.pid)
        pidfds = [os.pidfd_open(pid) for pid in children]
        assert len(pidfds) >= 1
        server.kill()
        assert process.wait(60) == 125
        assert process.stderr is not None
        assert f"The clone server {server.pid} has ended" in process.stderr.read()
        state.sweep(layout)  # as the next command does, for one that was just being started (linux/leash.py)
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], 60)[0]
            os.close(pidfd)


def test_killed_firecracker_ends_its_clone_alone(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        line_of(process)
        wait_ready(layout, 1)
        (record,) = state.records(layout)
        processes = [pid for pid in baremetal.children(server.pid) if record.id.encode() in cmdline(pid)]
        assert len(processes) == 1, "another one is in the pool"
        os.kill(processes[0], signal.SIGKILL)
        assert process.wait(60) == 125
        assert process.stderr is not None
        assert "Firecracker" in process.stderr.read()
        wait_until(layout, [])
        assert fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true").stdout == "ready\n"
        (listed,) = servers.running(layout)
        assert (listed["taken"], listed["late"]) == (2, 0), "the pool has what it had"


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_interrupt_asks_twice_when_clones_live(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        line_of(process)
        server.send_signal(signal.SIGINT)
        assert server.stderr is not None
        assert "1 clones of warm run; Ctrl-C again ends them" in server.stderr.readline()
        assert names(layout) == ["one"]
        server.send_signal(signal.SIGINT)
        assert process.wait(60) == 137
        assert server.wait(60) == 0


def test_stop_ends_servers_and_their_clones(layout: Layout) -> None:
    with serving(layout) as one, serving(layout) as two, client(layout, "--pid", one.pid, "--name", "one") as process:
        line_of(process)
        assert fcvm(layout, "snapshot", "stop", one.pid).stdout == f"{one.pid}\n"
        assert not (layout.base / "servers" / str(one.pid)).exists(), "it has ended when the command has"
        assert process.wait(60) == 137
        assert [server["pid"] for server in servers.running(layout)] == [two.pid]
        assert fcvm(layout, "snapshot", "stop", "warm").stdout == f"{two.pid}\n"
        assert (one.wait(60), two.wait(60)) == (0, 0)
        assert "There is no clone server warm" in fcvm(layout, "snapshot", "stop", "warm", check=125).stderr
        assert fcvm(layout, "snapshot", "stop", "--all").stdout == ""
        assert "fcvm snapshot ls" in fcvm(layout, "snapshot", "stop", check=125).stderr


def test_stop_of_a_server_that_still_fills_its_pool(layout: Layout, tmp_path: Path) -> None:
    """Its first Firecracker takes its time."""
    slow, end = tmp_path / "firecracker", tmp_path / "end"
    slow.write_text(f"#!/bin/sh\nwhile ! [ -e '{end}' ]; do sleep 0.1; done\n")
    slow.chmod(0o755)
    (tmp_path / "assets.json").write_text(structs.replace(assets(layout), firecracker=slow).to_json())
    words = [sys.executable, "-c", SERVE, str(layout.base), json.dumps({"tag": "warm"})]
    env = {**environment(layout), "FCVM_ASSETS": str(tmp_path / "assets.json")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            for _ in range(1200):
                if servers.running(layout) or process.poll() is not None:
                    break
                threading.Event().wait(0.05)
            assert process.poll() is None, process.communicate()
            assert servers.running(layout)[0]["ready"] == 0
            with ThreadPoolExecutor(1) as threads:
                stop = threads.submit(fcvm, layout, "snapshot", "stop", "warm")
                for _ in range(600):
                    if servers.running(layout) == []:  # it does not listen any more
                        break
                    threading.Event().wait(0.05)
                assert process.poll() is None, "it waits for its Firecracker"
                assert not stop.done(), "and is waited for"
                end.touch()
                assert stop.result().stdout == f"{process.pid}\n"
            stdout, stderr = process.communicate(timeout=60)
            assert stdout == "", "it never was ready"
            assert "The clone server of 'warm' is ending" in stderr
        finally:
            end.touch()
            process.kill()
    assert clean(layout)


def test_stop_comes_too_late(layout: Layout) -> None:
    server = CloneServer(Settings("nothing"), config.load({"base_dir": str(layout.base)}), assets(layout))
    with pytest.raises(NotFoundError):
        server.run()
    server.stop()


def test_interrupt_ends_an_idle_server(layout: Layout) -> None:
    with serving(layout) as server:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def test_served_memory_and_its_working_set(layout: Layout) -> None:
    with serving(layout, backend="uffd") as server:
        assert fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true").stdout == "ready\n"
        (listed,) = json.loads(fcvm(layout, "snapshot", "ls", "--json").stdout)
        assert listed["backend"] == "uffd"
        assert listed["faults"] > 0
        assert listed["taken"] == 1


def test_working_set_is_learned_from_a_first_clone_that_ends_at_once(layout: Layout) -> None:
    def faults() -> int:
        return int(servers.running(layout)[0]["faults"])

    recorded = working_set.path(store.find(layout, "warm"))
    with serving(layout, backend="uffd", prefetch=True, minimum=2, maximum=2) as server:
        loading = faults()
        fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true")
        wait_until(layout, [])
        assert working_set.load(recorded), "it is there when the clone has ended"
        wait_ready(layout, 2)
        first = faults() - loading
        fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true")
        wait_ready(layout, 2)
        assert faults() - loading - first < first, "one that was loaded before has it as well"
    with serving(layout, backend="uffd", prefetch=True):
        (listed,) = servers.running(layout)
        assert listed["faults"] < first
    recorded.unlink()


@contextlib.contextmanager
def altered(layout: Layout, network: str = "none", **spec: object) -> Iterator[str]:
    """The tag of a snapshot like ``warm``, of a VM with another network and spec."""
    warm, copy = layout.snapshots / "warm", layout.snapshots / "altered"
    shutil.copytree(warm, copy)
    values = json.loads((warm / "config.json").read_text())
    values["spec"] |= spec
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps({**values, "network": network}))
    yield copy.name
    store.remove(layout, copy.name)


@pytest.fixture
def connected(layout: Layout) -> Iterator[str]:
    """The tag of a snapshot of a VM that had a network, its own resolver, and a port of the host's loopback."""
    with altered(layout, network="rootless", forward_localhost=["5432"], dns=["192.0.2.53"]) as tag:
        yield tag


def test_prefixes_of_lines_but_not_of_a_terminals(layout: Layout) -> None:
    for tty, expected in ((False, "[ctr:out] hello from the container"), (True, "hello from the container")):
        with (
            altered(layout, tty=tty) as tag,
            serving(layout, tag=tag) as server,
            client(layout, "--pid", server.pid, "--log-prefix") as process,
        ):
            assert line_of(process) == expected
            process.kill()
            wait_until(layout, [])


def network_of(layout: Layout, pid: int, *words: object) -> tuple[str, list[str], list[str]]:
    """That of a clone: its mode, forwarded ports and resolvers."""
    with client(layout, "--pid", pid, "--name", "one", *words) as process:
        line_of(process)
        (record,) = state.records(layout)
        process.kill()
        wait_until(layout, [])
    return record.network["mode"], record.network["forward_localhost"], record.network["dns"]


def test_network_of_a_snapshot_is_that_of_the_pool(layout: Layout, connected: str) -> None:
    with serving(layout, tag=connected, backend="uffd") as server:
        assert network_of(layout, server.pid) == ("rootless", ["5432/tcp"], ["192.0.2.53"])
        assert servers.running(layout)[0]["taken"] == 1, "it was ready"
        assert network_of(layout, server.pid, "--network", "none")[:2] == ("none", [])
        wait_ready(layout, 1)
        before = servers.running(layout)[0]["faults"]
        network_of(layout, server.pid, "--network", "none")
        assert servers.running(layout)[0]["faults"] > before, "its memory is served as well"
        assert servers.running(layout)[0]["taken"] == 1
    with serving(layout, tag=connected, network="none") as server:
        assert network_of(layout, server.pid)[:2] == ("none", [])
        assert network_of(layout, server.pid, "--network", "rootless")[:2] == ("rootless", ["5432/tcp"])


def test_clones_that_come_and_go_leave_nothing_in_the_server(layout: Layout) -> None:
    def held(pid: int) -> tuple[int, int]:
        """Descriptors and threads."""
        return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))

    def memory(pid: int) -> int:
        """KiB that it has."""
        status = Path(f"/proc/{pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))

    def few(pid: int, most: tuple[int, int]) -> bool:
        return all(now <= then for now, then in zip(held(pid), most, strict=True))

    def come_and_go(count: int) -> None:
        clones = [Clone(layout, server.pid, Wanted(None, [])) for _ in range(count)]
        for clone in clones:
            clone.started()
        for clone in clones:
            clone.close()
        wait_until(layout, [])
        wait_ready(layout, 4)

    with serving(layout, backend="uffd", minimum=4, maximum=4) as server:
        for _ in range(10):  # until every thread has its stack and every allocator its arena
            come_and_go(4)
        descriptors, threads = held(server.pid)
        most = descriptors + 1, threads + 1  # a thread that just answered us may hold one
        before = memory(server.pid)
        for _ in range(50):
            come_and_go(4)
        for _ in range(600):  # the threads of clients that are on no list any more may not have ended yet
            if few(server.pid, most):
                break
            threading.Event().wait(0.1)
        assert few(server.pid, most), (held(server.pid), most)
        assert memory(server.pid) <= before + (8 << 10), (
            "two hundred clones leave nothing, and an allocator's arena is 64 KiB at least"
        )


def test_listing(layout: Layout) -> None:
    assert json.loads(fcvm(layout, "snapshot", "ls", "--json").stdout) == []
    with serving(layout, minimum=2) as server:
        (listed,) = json.loads(fcvm(layout, "snapshot", "ls", "--json").stdout)
        assert (listed["pid"], listed["tag"], listed["ready"], listed["clones"]) == (server.pid, "warm", 2, [])
        assert f"{server.pid}  warm" in fcvm(layout, "snapshot", "ls").stdout
        assert "yes" in fcvm(layout, "snapshots").stdout
        done = fcvm(layout, "snapshots", "rm", "warm", check=125)
        assert "in use" in done.stderr
    (snapshot,) = json.loads(fcvm(layout, "snapshots", "ls", "--json").stdout)
    assert (snapshot["tag"], snapshot["in_use"], snapshot["image"]) == ("warm", False, {"reference": "localhost/demo"})


def test_no_such_server_and_no_such_snapshot(layout: Layout) -> None:
    done = fcvm(layout, "snapshot", "run", "--pid", os.getpid(), "--exec", "true", check=125)
    assert f"There is no clone server with pid {os.getpid()}" in done.stderr
    with pytest.raises(AssertionError, match="no snapshot named 'nothing'"), serving(layout, tag="nothing"):
        pass


def test_snapshot_and_clone_of_a_clone(layout: Layout) -> None:
    with serving(layout) as server, client(layout, "--pid", server.pid, "--name", "one") as process:
        line_of(process)
        assert fcvm(layout, "snapshot", "create", "one", "--tag", "again").stdout == "again\n"
    try:
        assert store.find(layout, "again").manifest.parent == "warm"
        with serving(layout, tag="again") as server:
            assert fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true").stdout == "ready\n"
    finally:
        store.remove(layout, "again")


def test_export_and_import(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "warm.tar.zst"
    fcvm(layout, "snapshots", "export", "warm", file)
    assert fcvm(layout, "snapshots", "import", file, "other").stdout == "other\n"
    try:
        with serving(layout, tag="other") as server:
            assert fcvm(layout, "snapshot", "run", "--pid", server.pid, "--exec", "true").stdout == "ready\n"
    finally:
        assert fcvm(layout, "snapshots", "rm", "other").stdout == "other\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "Say what to clone"),
        (["run", "--pid", "1", "--snapshot", "x"], "Say what to clone"),
        (["run", "--pid", "x"], "--pid takes a whole number"),
        (["run", "--snapshot", "a/b"], "cannot name a snapshot"),
        (["run", "--snapshot", "x", "--count", "2"], "--count needs a clone server"),
        (["run", "--pid", "1", "--count", "2", "--publish", "80:80"], "cannot share a port"),
        (["run", "--pid", "1", "--count", "2", "--exec", "true"], "do not go together"),
        (["run", "--pid", "1", "--exec", ""], "no command"),
        (["serve", "x", "--pool", "3-2"], "wrong way round"),
        (["create", "--tag", "x"], "No VM is named"),
        (["create", "nobody", "--tag", "x"], "no VM named 'nobody'"),
    ],
)
def test_bad_input(layout: Layout, words: list[str], message: str) -> None:
    done = fcvm(layout, "snapshot", *words, check=125)
    assert message in done.stderr
    assert done.stdout == ""


# ---- without a server

DIRECT = """
import sys
from fcvm import config
from fcvm.cli.main import report
from fcvm.errors import FcvmError
from fcvm.snapshots import direct, verify
from fcvm.snapshots.client import Wanted

settings = config.load()
try:
    if sys.argv[1] == "verify":
        for check in verify.verify("warm", settings):
            print(check.passed, check.name, check.detail, flush=True)
    else:
        sys.exit(direct.run(sys.argv[1], Wanted("one", []), settings, command=sys.argv[2:] or None))
except FcvmError as error:
    report(error)
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def directly(layout: Layout, *words: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", DIRECT, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(layout),
    ) as process:
        try:
            yield process
        finally:
            process.kill()
    assert clean(layout)


def test_direct_clone_runs_until_it_is_stopped(layout: Layout) -> None:
    with directly(layout, "warm") as process:
        assert line_of(process) == "hello from the container"
        (record,) = state.records(layout)
        assert (record.name, record.pid, record.snapshot) == ("one", process.pid, "warm")
        assert store.in_use(layout, "warm")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 143
        assert not store.in_use(layout, "warm")


def test_direct_clone_for_one_command(layout: Layout) -> None:
    with directly(layout, "warm", "echo", "ready") as process:
        stdout, stderr = process.communicate(timeout=120)
        assert (process.returncode, stdout, stderr) == (0, "ready\n", "")


def test_direct_clone_of_nothing(layout: Layout) -> None:
    with directly(layout, "nothing") as process:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 125
        assert "There is no snapshot named 'nothing'" in stderr


def test_verify_tells_clones_that_are_not_themselves(layout: Layout) -> None:
    """This guest answers every command alike, so two clones of it have the same random bytes."""
    with directly(layout, "verify") as process:
        stdout, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    lines = stdout.splitlines()
    assert lines[0].startswith("True two clones run")
    assert lines[1].startswith("False random bytes differ")
    assert len(lines) == 4 + 2 * 5
    assert len([line for line in lines if line.startswith("False") and ": clock" in line]) == 2
