"""Nothing is left behind: after a close, a failure at any step, or a kill of any process, as root and as another user."""

import json
import os
import pwd
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from network_world import TIMEOUT, World, needs_root

from fcvm.errors import NetworkError
from fcvm.linux import namespaces, tap
from fcvm.network import attach, bridged, firewall, host, inner, relay, rootless, slirp, spec

pytestmark = needs_root

# a supervisor as the real one: a network, a process in it, and an end when either is lost
SUPERVISOR = """
import json, os, select, sys
from pathlib import Path
from fcvm import process
from fcvm.network import attach, spec
mode, directory = sys.argv[1:]
with attach.create(spec.parse(mode, ["80", "53/udp"] if mode != "none" else []), "vm1", Path(directory)) as network:
    child = process.spawn(["sleep", "1000"], setup=network.namespace.enter)
    pidfd = os.pidfd_open(child.pid)
    helper = getattr(getattr(network._backend, "slirp", None), "process", None)
    print(json.dumps({"child": child.pid, "helper": helper and helper.pid, "ports": network.describe()["ports"],
                      "namespace": os.readlink(f"/proc/{child.pid}/ns/net")}), flush=True)
    poll = select.poll()
    for fd in (pidfd, *(fd for fd, _ in network.watch)):
        poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll()}
    child.kill()
    child.wait()
print(json.dumps([says for fd, says in network.watch if fd in ready]), flush=True)
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


def holders(namespace: str) -> list[str]:
    """Processes that are in a namespace or hold it open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for link in [process / "ns/net", *process.glob("fd/*")]:
                with suppress(OSError):
                    if str(link.readlink()) == namespace:
                        found.append(str(link))
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    """The kernel takes a namespace apart in the background, and there is nothing to wait on."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


class Supervised:
    """The supervisor's process, in the world's host, as root or as ``nobody``."""

    def __init__(self, world: World, mode: str, user: str) -> None:
        directory = world.directory / "vm"
        directory.mkdir()
        account = pwd.getpwnam(user)
        os.chown(directory, account.pw_uid, account.pw_gid)
        for parent in (directory, *directory.parents):
            if parent.stat().st_uid == 0 and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o711)

        # udev lets everybody use it; a host without udev may not
        tun = world.directory / "tun"
        os.mknod(tun, 0o666 | stat.S_IFCHR, os.makedev(10, 200))
        tun.chmod(0o666)
        become = 'mount --bind "$0" /dev/net/tun; exec setpriv --reuid "$1" --regid "$2" --clear-groups -- "$3" -c "$4" "$5" "$6"'
        # the interpreter of a virtual environment may lie where only root may look
        python = sys.executable if account.pw_uid == 0 else "/usr/bin/python3"
        words = [tun, account.pw_uid, account.pw_gid, python, SUPERVISOR, mode, directory]
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-ec", become, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=world.host.namespace.enter,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(attach.__file__).parents[2])},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read().decode() if self.process.stderr else ""
        told: dict[str, Any] = json.loads(line)
        self.child: int = told["child"]
        self.helper: int | None = told["helper"]
        self.port: int = told["ports"][0]["host_port"] if told["ports"] else 0
        self.namespace: str = told["namespace"]
        self.pids = [pid for pid in (self.process.pid, self.child, self.helper) if pid]
        self.pidfds = [os.pidfd_open(pid) for pid in self.pids]

    def all_gone(self) -> bool:
        """Wait until every process has ended."""
        for fd in self.pidfds:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            if not poll.poll(TIMEOUT * 1000):
                return False
        return True

    def close(self) -> str:
        for fd in self.pidfds:
            with suppress(OSError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
        out, _ = self.process.communicate()
        return out.decode()


KILLED = [
    (mode, user, victim)
    for mode, users in (("bridged", ["root"]), ("rootless", ["root", "nobody"]), ("none", ["root", "nobody"]))
    for user in users
    for victim in ("supervisor", "child", *(["helper"] if mode == "rootless" else []))
]


@pytest.mark.parametrize(("mode", "user", "victim"), KILLED)
def test_killing_any_process(world: World, mode: str, user: str, victim: str) -> None:
    if user != "root" and not readable_by_all(Path(attach.__file__)):
        pytest.skip("the checkout cannot be read by others")
    interfaces, tables = world.host.interfaces(), world.host.tables()
    supervised = Supervised(world, mode, user)
    try:
        pid = {"supervisor": supervised.process.pid, "child": supervised.child, "helper": supervised.helper}[victim]
        assert pid
        os.kill(pid, signal.SIGKILL)
        assert supervised.all_gone()
    finally:
        said = supervised.close()
    if victim == "helper":
        assert slirp.DIED in said
    assert eventually(lambda: world.host.interfaces() == interfaces)
    assert eventually(lambda: not holders(supervised.namespace)), holders(supervised.namespace)
    assert world.host.tables() == tables
    assert not world.host.reachable("127.0.0.1", supervised.port or 1)


def readable_by_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def children() -> set[str]:
    """The pids of our children; those of a thread that ends meanwhile go to another."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            found.update((task / "children").read_text().split())
    return found


STEPS: list[tuple[str, Any, str]] = [
    ("bridged", tap, "create"),
    ("bridged", bridged, "_connect"),
    ("bridged", inner, "configure"),
    ("bridged", inner, "translate"),
    ("bridged", inner, "listen"),
    ("bridged", host, "enable_forwarding"),
    ("bridged", firewall, "open_up"),
    ("bridged", bridged, "_load"),
    ("bridged", relay, "start"),
    ("bridged", attach, "_serve"),
    ("bridged", attach.Loop, "start"),
    ("rootless", tap, "create"),
    ("rootless", inner, "configure"),
    ("rootless", inner, "translate"),
    ("rootless", inner, "listen"),
    ("rootless", slirp.process, "spawn"),
    ("rootless", slirp.os, "pidfd_open"),
    ("rootless", slirp.Slirp, "forward"),
    ("rootless", relay, "udp"),
    ("rootless", relay, "start"),
    ("rootless", attach, "_serve"),
    ("rootless", attach.Loop, "start"),
    ("none", tap, "create"),
    ("none", namespaces, "current"),
]


@pytest.mark.parametrize(("mode", "module", "name"), STEPS, ids=[f"{m}-{n}" for m, _, n in STEPS])
def test_a_failure_at_any_step(
    world: World, monkeypatch: pytest.MonkeyPatch, mode: str, module: Any, name: str
) -> None:
    wanted = spec.parse(mode, ["80,[::1]::81,53/udp"] if mode != "none" else [])
    attach.create(spec.parse("none"), "warm-up", world.directory).close()  # what is opened once and kept
    interfaces, tables = world.host.interfaces(), world.host.tables()
    before = descriptors()
    had = children()
    called = []

    def fail(*_: object, **__: object) -> None:
        called.append(1)
        raise NetworkError("made to fail")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(NetworkError, match="made to fail"):
        world.network(wanted)
    monkeypatch.undo()
    assert world.host.tables() == tables
    assert eventually(lambda: world.host.interfaces() == interfaces)
    assert descriptors() <= before
    assert children() <= had


@pytest.mark.parametrize("mode", ["bridged", "rootless", "none"])
def test_everything_is_gone_after_close(world: World, mode: str) -> None:
    interfaces, tables, before = world.host.interfaces(), world.host.tables(), descriptors()
    network = world.network(spec.parse(mode, ["80,53/udp"] if mode != "none" else []))
    namespace = os.readlink(f"/proc/self/fd/{network.namespace.net}")
    assert holders(namespace)
    world.host.run(network.close)
    world.host.run(network.close)
    assert not holders(namespace)
    assert descriptors() <= before
    assert world.host.tables() == tables
    assert eventually(lambda: world.host.interfaces() == interfaces)
    assert list((world.directory / "vm1").iterdir()) == []


def test_the_callers_own_namespaces_never_change(world: World) -> None:
    before = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user")]
    for mode in ("bridged", "rootless", "none"):
        world.network(spec.parse(mode), mode)
    with pytest.raises(ZeroDivisionError):
        namespaces.create(lambda: [1 // 0], user=False)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        namespaces.create(lambda: [1 // 0], user=True)
    assert [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user")] == before


def test_slirp4netns_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rootless.process, "environment", lambda extra=None: {"PATH": "/nonexistent"})
    with pytest.raises(Exception, match="slirp4netns is not installed") as caught:
        world.network(spec.parse("rootless"))
    assert "apt-get install slirp4netns" in str(getattr(caught.value, "hint", ""))


def test_slirp4netns_does_not_start(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "bin"
    bad.mkdir()
    (bad / "slirp4netns").write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 1\n")
    (bad / "slirp4netns").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bad}:{os.environ['PATH']}")
    with pytest.raises(NetworkError, match="did not start: no such luck"):
        world.network(spec.parse("rootless"))


def test_no_tun_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "TUN", "/dev/net/nonexistent")
    for mode in ("bridged", "rootless", "none"):
        with pytest.raises(Exception, match="no tap devices") as caught:
            world.network(spec.parse(mode))
        assert getattr(caught.value, "hint", "") == "sudo modprobe tun"
