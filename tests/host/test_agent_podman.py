"""The agent with the guest image's real Podman, conmon and crun, in namespaces instead of a VM (``agent_guest.py``)."""

import base64
import hashlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fc_agent.protocol import ContainerPlan, HealthPlan, Identity, NetworkPlan, Plan, VolumePlan
from fcvm import config
from fcvm.agent.session import Client, Exit, Request, Resume, stream
from fcvm.setup import assets
from fcvm.storage.layout import Layout


def root_image() -> Path | None:
    settings = config.load()
    base, image = assets.image_of(settings, Layout(settings.base_dir))
    return None if image is None else base / "guest" / image.id / "root.img"


pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(root_image() is None, reason="needs the guest image: fcvm setup"),
]


class Guest:
    """An agent in namespaces, and the host's end of its channels."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / "control"))
        self.listener.listen(1)
        program = str(Path(__file__).with_name("agent_guest.py"))
        self.log = open(directory / "console", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            ["unshare", "-mpfuin", "--kill-child", "--propagation", "private", sys.executable, program, str(root_image()), str(directory)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )  # fmt: skip
        pidfd = os.pidfd_open(self.process.pid)
        ready = select.select([self.listener, pidfd], [], [], 120)[0]
        os.close(pidfd)
        if self.listener not in ready:
            self.close()
            raise AssertionError((directory / "console").read_text())
        self.connection, _ = self.listener.accept()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        assert self.wait("hello")["state"]["phase"] == "waiting"

    def _read(self) -> None:
        with self.connection.makefile("r") as lines:
            for line in lines:
                self.messages.put(json.loads(line))

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def wait(self, kind: str) -> dict[str, Any]:
        """The next message of a kind; others before it are dropped."""
        while True:
            try:
                message = self.messages.get(timeout=120)
            except queue.Empty:
                raise AssertionError((self.directory / "console").read_text()) from None
            assert message["type"] != "error", message
            if message["type"] == kind:
                return message

    def plan(self, *command: str, volumes: Sequence[VolumePlan] = (), **options: Any) -> None:
        plan = Plan(
            identity("box"),
            ContainerPlan(**{"image": "localhost/bb", "command": list(command) or None, **options}),
            NetworkPlan("10.0.2.100/24", "10.0.2.2", dns=["10.0.2.3"], hosts={"host.containers.internal": "10.0.2.2"}),
            list(volumes),
        )
        self.send({"type": "plan", **plan.to_json()})

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.directory / "sessions"))
        return connection

    def main(self, stdin: bytes | None = None) -> tuple[Exit, bytes, bytes]:
        """The container's own streams, to the end."""
        return self._stream(Resume("main"), stdin)

    def exec(self, *argv: str, stdin: bytes | None = None, **options: Any) -> tuple[Exit, bytes, bytes]:
        return self._stream(Request(argv, stdin=stdin is not None, **options), stdin)

    def _stream(self, request: Request | Resume, data: bytes | None) -> tuple[Exit, bytes, bytes]:
        output = {"stdout": bytearray(), "stderr": bytearray()}
        read = None
        if data is not None:
            read, write = os.pipe()
            threading.Thread(target=feed, args=(write, data)).start()
        try:
            ended = stream(self.connect, request, stdin=read, on_output=lambda name, piece: output[name].extend(piece))
        finally:
            if read is not None:
                os.close(read)
        return ended, bytes(output["stdout"]), bytes(output["stderr"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.listener.close()
        if hasattr(self, "reader"):
            self.reader.join()
            self.connection.close()


def feed(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def identity(name: str, **options: Any) -> Identity:
    return Identity(name, os.urandom(16).hex(), base64.b64encode(os.urandom(32)).decode(), time.time_ns(), **options)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.close()


def test_a_container_from_start_to_exit(guest: Guest) -> None:
    guest.plan("/bin/sh", "-c", "echo out; echo err >&2; cat; exit 3", stdin=True, env={"A": "1,2"})
    assert guest.wait("started")["container_id"]
    assert guest.wait("health")["status"] == "healthy"
    data = os.urandom(300_000)
    ended, out, err = guest.main(stdin=data)
    assert (ended.code, err) == (3, b"err\n")
    assert out == b"out\n" + data
    assert {k: v for k, v in guest.wait("exit").items() if k != "type"} == {"code": 3, "oom": False}


def test_the_images_own_command(guest: Guest) -> None:
    guest.plan()
    guest.wait("started")
    assert guest.main()[1] == b"the image says so\n"


def test_the_images_own_entrypoint_user_directory_and_environment(guest: Guest) -> None:
    guest.plan(image="localhost/own", stdin=True)
    guest.wait("started")
    assert guest.exec("sh", "-c", "pwd; id -un; echo $HOSTNAME")[1] == b"/home/app\napp\n0.0.0.0\n"
    assert guest.main(stdin=b"")[1] == b"/home/app\napp\none two\n"


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        (("three",), {}, b"/home/app\napp\nthree\n"),
        (("three",), {"user": "root", "workdir": "/tmp"}, b"/tmp\nroot\nthree\n"),
        ((), {"entrypoint": ["/bin/echo", "no", "arguments"]}, b"no arguments\n"),
        (("pwd",), {"entrypoint": []}, b"/home/app\n"),
    ],
)
def test_what_a_run_sets_replaces_the_images_own(
    guest: Guest, command: tuple[str, ...], options: dict[str, Any], said: bytes
) -> None:
    guest.plan(*command, image="localhost/own", **options)
    guest.wait("started")
    assert guest.main()[1] == said


def test_a_container_that_a_signal_ends_is_128_and_its_number(guest: Guest) -> None:
    guest.plan("sh", "-c", "f() { f; }; f")  # its stack's end: the one signal of its own that a first process does not survive
    assert {k: v for k, v in guest.wait("exit").items() if k != "type"} == {"code": 139, "oom": False}


def test_a_container_that_is_killed_from_outside_is_137(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    assert guest.exec("sh", "-c", "kill -9 $(busybox pidof sleep)", target="vm")[0].code == 0
    assert {k: v for k, v in guest.wait("exit").items() if k != "type"} == {"code": 137, "oom": False}


def test_options_reach_the_container(guest: Guest) -> None:
    script = 'echo "$A|$FROM_IMAGE"; pwd; id; hostname; grep containers /etc/hosts; cat /etc/resolv.conf; touch /tmp/x && echo ok'
    guest.plan("/bin/sh", "-c", script, env={"A": "x y"}, workdir="/tmp", user="app")
    guest.wait("started")
    lines = guest.main()[1].decode().splitlines()
    assert lines[:4] == ["x y|yes", "/tmp", "uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)", "box"]
    assert lines[-1] == "ok"


def test_entrypoint_and_privileges(guest: Guest) -> None:
    guest.plan(
        "-c", "mknod /tmp/null c 1 3 && echo x > /tmp/null && echo made", entrypoint=["/bin/sh"], privileged=True
    )
    guest.wait("started")
    assert guest.main()[1] == b"made\n"


def test_a_terminal(guest: Guest) -> None:
    guest.plan(
        "/bin/sh",
        "-c",
        "stty size; test -t 1 && echo tty; read line; echo got $line",
        tty=True,
        stdin=True,
        rows=30,
        columns=90,
    )
    guest.wait("started")
    ended, out, _ = guest.main(stdin=b"hello\n")
    assert ended.code == 0
    assert out.endswith(b"got hello\r\n")
    assert out.replace(b"hello\r\n", b"", 1).startswith(b"30 90\r\ntty\r\n")  # the terminal echoes whenever it comes


@pytest.mark.parametrize(
    ("command", "options", "code"),
    [
        (("no-such-program",), {}, 127),
        (("/etc/passwd",), {}, 126),
        (("/bin/sh",), {"user": "nobody"}, 126),
        (("/bin/sh",), {"workdir": "/no/such/directory"}, 126),
        (("/bin/sh",), {"image": "localhost/none"}, 125),
    ],
)
def test_what_cannot_be_started(guest: Guest, command: tuple[str, ...], options: dict[str, str], code: int) -> None:
    guest.plan(*command, **options)
    ended = guest.wait("exit")
    assert ended["code"] == code
    assert ended["message"]


def test_death_by_signal(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    guest.send({"type": "kill", "signal": signal.SIGKILL})
    assert guest.wait("exit")["code"] == 137


def test_stop_sends_the_images_signal_then_kills(guest: Guest) -> None:
    guest.plan("/bin/sh", "-c", "trap 'echo usr1' USR1; trap '' TERM; echo ready; while :; do sleep 0.1; done")
    guest.wait("started")
    seen = bytearray()
    ready = threading.Event()

    def on_output(name: str, data: bytes) -> None:
        seen.extend(data)
        ready.set()

    client = Client(guest.connect, Resume("main"), stdin=None, on_output=on_output)
    result: list[Exit] = []
    thread = threading.Thread(target=lambda: result.append(client.run()))
    thread.start()
    assert ready.wait(60)
    guest.send({"type": "stop", "timeout": 1})
    assert guest.wait("exit")["code"] == 137
    thread.join(60)
    assert (result[0].code, bytes(seen)) == (137, b"ready\nusr1\n")


def test_much_output_arrives_whole_and_in_order(guest: Guest) -> None:
    size = 200 << 20
    guest.plan("/bin/sh", "-c", f"yes 0123456789abcde | head -c {size}; echo end >&2")
    guest.wait("started")
    digest, expected = hashlib.sha256(), hashlib.sha256()
    rest: list[bytes] = []

    def on_output(name: str, data: bytes) -> None:
        if name == "stdout":
            digest.update(data)
        else:
            rest.append(data)

    assert stream(guest.connect, Resume("main"), stdin=None, on_output=on_output).code == 0
    for _ in range(size >> 20):
        expected.update(b"0123456789abcde\n" * (1 << 16))
    assert digest.digest() == expected.digest()
    assert b"".join(rest) == b"end\n"


def test_a_client_that_does_not_read_stops_the_container(guest: Guest) -> None:
    """It may be ahead by pipes, sockets and windows: a few MiB."""
    guest.plan("/bin/sh", "-c", "while :; do echo 0123456789abcde0123456789abcde0123456789abcde0123456789abcdef; done")
    pid = guest.wait("started")["pid"]
    meter = f"/proc/{pid}/io"

    def written() -> int:
        text = guest.exec("/bin/cat", meter, target="vm")[1].decode()
        return int(text.split("wchar: ")[1].split()[0])

    last = -1
    while (now := written()) != last:
        last = now
        select.select([], [], [], 0.5)
    assert 0 < last < 8 << 20


def test_exec(guest: Guest) -> None:
    guest.plan("sleep", "1000", env={"A": "1"}, workdir="/tmp")
    guest.wait("started")
    ended, out, err = guest.exec("/bin/sh", "-c", 'echo "$A $B $FROM_IMAGE"; pwd; echo err >&2; exit 7', env={"B": "2"})
    assert (ended.code, out, err) == (7, b"1 2 yes\n/tmp\n", b"err\n")
    data = os.urandom(1_000_000)
    assert guest.exec("cat", stdin=data)[1] == data
    assert guest.exec("id", user="app")[1] == b"uid=1000(app) gid=1000(app) groups=1000(app),2000(extra)\n"
    assert guest.exec("sh", "-c", "echo $HOME", user="app")[1] == b"/home/app\n"
    assert guest.exec("sh", "-c", "stty size; tty", tty=True, rows=20, columns=70)[1].startswith(b"20 70\r\n/dev/pts/")
    assert guest.exec("sh", "-c", "kill -9 $$")[0].code == 137
    for argv, options, code in (
        (["no-such-program"], {}, 127),
        (["no-such-program"], {"tty": True}, 127),
        (["/etc/passwd"], {}, 126),
        (["true"], {"cwd": "/no/such/directory"}, 127),  # as `podman exec`; `podman run` says 126 of the same
        (["true"], {"cwd": "/no/such/directory", "tty": True}, 127),
        (["true"], {"cwd": "/etc/passwd"}, 126),
        (["true"], {"user": "nobody"}, 125),
    ):
        ended, out, err = guest.exec(*argv, **options)
        assert (ended.code, out, err) == (code, b"", b""), argv
        assert ended.message


def test_exec_in_the_guest(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    assert b"podman" in guest.exec("podman", "--version", target="vm")[1]
    assert guest.exec("podman", "ps", "-q", "--no-trunc", target="vm")[1].strip()


def test_signals_reach_an_exec_and_its_end_reaches_us(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    ready = threading.Event()
    client = Client(
        guest.connect,
        Request(["sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"]),
        stdin=None,
        on_output=lambda name, data: ready.set(),
    )
    result: list[Exit] = []
    thread = threading.Thread(target=lambda: result.append(client.run()))
    thread.start()
    assert ready.wait(60)
    client.signal(signal.SIGTERM)
    thread.join(60)
    assert result[0].code == 5


def test_what_ctrl_c_sends_reaches_all_that_an_exec_runs(guest: Guest) -> None:
    """A shell waits for its command, whatever it is sent."""
    guest.plan("sleep", "1000")
    guest.wait("started")
    ready = threading.Event()
    client = Client(guest.connect, Request(["sh", "-c", "trap 'echo caught' INT; echo ready; sleep 600; exit 6"]), stdin=None,
                    on_output=lambda name, data: ready.set())  # fmt: skip
    result: list[Exit] = []
    thread = threading.Thread(target=lambda: result.append(client.run()))
    thread.start()
    assert ready.wait(60)
    while b"sleep 600" not in guest.exec("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 6[0]0 ' || true")[1]:
        pass
    client.signal(signal.SIGINT)
    thread.join(60)
    assert result[0].code == 6


def test_a_hundred_execs_at_once(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    results: dict[int, tuple[int, bytes]] = {}

    def one(number: int) -> None:
        ended, out, _ = guest.exec("sh", "-c", f"echo {number}; exit {number}")
        results[number] = (ended.code, out)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert results == {number: (number, b"%d\n" % number) for number in range(100)}
    deadline = time.monotonic() + 60  # a client has its exit code before its session is cleared away
    while (left := guest.exec("ls", "/run/fcvm/exec", target="vm")[1]) != b"":
        assert time.monotonic() < deadline, left


def test_exec_without_a_container(guest: Guest) -> None:
    ended = guest.exec("true")[0]
    assert ended.code == 125
    assert "not running" in (ended.message or "")


def test_a_new_identity(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    guest.wait("started")
    before = guest.exec("cat", "/etc/machine-id", target="vm")[1]
    session = Client(guest.connect, Request(["sleep", "1000"]), stdin=None, on_output=lambda *_: None)
    result: list[object] = []

    def body() -> None:
        try:
            result.append(session.run())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    while (
        b"sleep" not in guest.exec("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o 'sleep 1000sleep'")[1]
    ):
        pass
    network = NetworkPlan("10.0.2.100/24", "10.0.2.2", hosts={"other": "1.2.3.4"})
    guest.send({"type": "restored", "identity": identity("clone", network=network, drop_sessions=True).to_json()})
    guest.wait("ready")
    assert guest.exec("sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME")[1] == b"clone\n" * 3
    assert guest.exec("cat", "/etc/machine-id", target="vm")[1] != before
    assert b"clone" in guest.exec("cat", "/etc/hosts")[1]
    thread.join(60)
    assert not thread.is_alive()


def test_volumes(guest: Guest, tmp_path: Path) -> None:
    directory, file = tmp_path / "host", tmp_path / "file"
    directory.mkdir()
    (directory / "one").write_text("1\n")
    file.write_text("single\n")
    servers = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fuse_pipe",
                "serve",
                str(path),
                "--socket",
                str(tmp_path / f"volume-{port}"),
                *options,
            ],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")},
        )
        for port, path, options in ((5000, directory, ()), (5001, file, ("--ro",)))
    ]
    try:
        while not all((tmp_path / f"volume-{port}").exists() for port in (5000, 5001)):
            assert all(server.poll() is None for server in servers)
        script = "cat /data/one /etc/single; echo 2 > /data/two; echo x > /etc/single || echo read-only"
        volumes = [VolumePlan(5000, "/data"), VolumePlan(5001, "/etc/single", read_only=True, file=True)]
        guest.plan("/bin/sh", "-c", script, volumes=volumes)
        guest.wait("started")
        assert guest.main()[1] == b"1\nsingle\nread-only\n"
        assert (directory / "two").read_text() == "2\n"
        assert guest.exec("cat", "/data/two", target="vm")[1] == b"2\n"
    finally:
        for server in servers:
            server.kill()
            server.wait()


def test_warming_up_leaves_nothing(guest: Guest) -> None:
    guest.send({"type": "warm"})
    guest.wait("warmed")
    assert b"cannot" not in (guest.directory / "console").read_bytes()
    assert guest.exec("podman", "ps", "-aq", target="vm")[1] == b""
    assert guest.exec("ls", "/run/fcvm", target="vm")[1].split() == [b"podman.sock"]
    guest.plan("echo", "works")
    guest.wait("started")
    assert guest.main()[1] == b"works\n"


PODMAN = "/proc/$(busybox pidof podman)/status"


def wait_until_stopped(guest: Guest) -> None:
    deadline = time.monotonic() + 60
    while b"T (stopped)" not in (state := guest.exec("sh", "-c", f"grep State {PODMAN}", target="vm")[1]):
        assert time.monotonic() < deadline, state


def test_podman_stands_still_while_nobody_asks(guest: Guest) -> None:
    """And answers when somebody does: `stop` asks for the image's signal (test_stop_sends_the_images_signal_then_kills)."""
    guest.plan("sleep", "1000")
    guest.wait("started")
    guest.wait("health")  # the image was asked about that
    wait_until_stopped(guest)
    guest.send({"type": "stop", "timeout": 0})
    assert guest.wait("exit")["code"] == 137


def test_podman_killed_while_it_stands_still_is_another_one_for_who_asks(guest: Guest) -> None:
    guest.plan("/bin/sh", "-c", "trap 'exit 7' USR1; while :; do sleep 0.1; done")
    guest.wait("started")
    guest.wait("health")
    wait_until_stopped(guest)
    assert guest.exec("sh", "-c", "kill -9 $(busybox pidof podman)", target="vm")[0].code == 0
    guest.send({"type": "stop", "timeout": 60})
    assert guest.wait("exit")["code"] == 7  # by the image's signal


def test_image_health_check(guest: Guest) -> None:
    guest.plan("sh", "-c", "sleep 1; touch /tmp/up; sleep 1000", health=HealthPlan("image"))
    guest.wait("started")
    assert guest.wait("health")["status"] == "healthy"  # it has none


def test_the_host_reconnects(guest: Guest) -> None:
    guest.plan("sleep", "1000")
    started = guest.wait("started")
    guest.wait("health")
    guest.connection.shutdown(socket.SHUT_RDWR)
    guest.reader.join()
    guest.connection.close()
    guest.connection, _ = guest.listener.accept()
    guest.reader = threading.Thread(target=guest._read)
    guest.reader.start()
    state = guest.wait("hello")["state"]
    assert (state["phase"], state["health"], state["pid"]) == ("running", "healthy", started["pid"])
