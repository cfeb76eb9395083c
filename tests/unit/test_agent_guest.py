"""Parts of the guest agent that need no guest: users of a container, health, conmon's socket, the control channel."""

import http.server
import json
import os
import queue
import select
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import pytest

from fc_agent import agent, container, exec, health, linux, network
from fc_agent.attach import Attached
from fc_agent.channel import STDERR, STDOUT
from fc_agent.control import Control
from fc_agent.failures import explain
from fc_agent.podman import PodmanError
from fc_agent.protocol import ContainerPlan, HealthPlan, Identity, NetworkPlan, VolumePlan
from fc_agent.session import LaunchError, Request, Server
from fc_agent.structs import replace
from fcvm.linux import namespaces, rtnetlink, tap


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\n+broken line\napp:x:1000:1001::/home/app:\nodd:x:x:1::/:\n7:x:70:70::/seven:\n"
    )
    (tmp_path / "etc/group").write_text("root:x:0:\nstaff:x:50:app,other\nwheel:x:10:app\nbad\n")
    return tmp_path


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        ("root", 0, 0, [0], "/root"),
        ("app", 1000, 1001, [10, 50, 1001], "/home/app"),
        ("1000", 1000, 1001, [10, 50, 1001], "/home/app"),
        ("app:staff", 1000, 50, [50], "/home/app"),
        ("app:77", 1000, 77, [77], "/home/app"),
        ("4242", 4242, 0, [0], "/"),
        ("4242:43", 4242, 43, [43], "/"),
        ("7", 70, 70, [70], "/seven"),
    ],
)
def test_a_user_is_the_containers(root: Path, user: str, uid: int, gid: int, groups: list[int], home: str) -> None:
    assert exec.find_user(str(root), user) == ({"uid": uid, "gid": gid, "additionalGids": groups}, home)


@pytest.mark.parametrize("user", ["nobody", "app:nogroup", "odd"])
def test_an_unknown_user(root: Path, user: str) -> None:
    with pytest.raises(LaunchError):
        exec.find_user(str(root), user)


def test_a_link_in_the_container_does_not_lead_out_of_it(root: Path) -> None:
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("/../../../../../../../../etc/hostname-of-the-container")
    (root / "etc/hostname-of-the-container").write_text("in:x:5:5::/in:\n")
    assert exec.find_user(str(root), "in")[0]["uid"] == 5
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to(f"{root}/etc/group")
    with pytest.raises(LaunchError):
        exec.find_user(str(root), "root")


def test_a_fifo_in_the_container_does_not_hold_us(root: Path) -> None:
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(LaunchError):
        exec.find_user(str(root), "app")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("crun: executable file `x` not found in $PATH: No such file or directory: OCI runtime attempted ...", 127),
        (
            "crun: the path `/etc/passwd` exists but it is not executable: Operation not permitted: OCI permission denied",
            126,
        ),
        ("something else", 126),
    ],
)
def test_start_codes(message: str, code: int) -> None:
    assert container.start_code(message) == code


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("RTMIN", 34), ("RTMAX-3", 61), ("SIGINT", 2)),
        *(("TERM-1", 15), ("nonsense", 15), ("RTMIN+x", 15), ("RTMAX+1", 15), ("0", 15), ("65", 15)),
    ],
)
def test_signal_numbers(name: str, number: int) -> None:
    assert container.signal_number(name) == number


@pytest.mark.parametrize(("code", "who"), [(137, "The container"), (0, "A process of the container")])
def test_who_was_killed_for_want_of_memory(code: int, who: str) -> None:
    assert container.why(code, True) == f"{who} was killed because the VM had no memory left."


@pytest.mark.parametrize(
    ("free", "blocks", "inodes", "said"),
    [
        (0, 987, 64, "The VM's disk is full."),  # of 1 MiB, the smallest
        (900, 987, 0, "The VM's disk is full."),
        (2000, 2580293, 655000, "The VM's disk is full."),
        (9_762_592, 10_321_172, 655_295, None),
    ],
)
def test_a_full_disk_is_blamed_for_a_bad_end(free: int, blocks: int, inodes: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(f_bavail=free, f_blocks=blocks, f_favail=inodes)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)
    assert container.why(1, False) == said
    assert container.why(0, False) is None


def test_specification_leaves_the_images_own_alone() -> None:
    spec = container.specification(ContainerPlan("image"), [])
    assert not {"entrypoint", "command", "user", "work_dir"} & set(spec)
    spec = container.specification(ContainerPlan("image", entrypoint=["/bin/x"]), [VolumePlan(5000, "/data", True)])
    assert (spec["entrypoint"], spec["command"]) == (["/bin/x"], [])
    assert spec["mounts"][-1]["Destination"] == "/data"
    assert "ro" in spec["mounts"][-1]["Options"]


@pytest.mark.parametrize(
    ("test", "command"),
    [
        (["CMD", "true", "x"], ["true", "x"]),
        (["CMD-SHELL", "a b || exit 1"], ["/bin/sh", "-c", "a b || exit 1"]),
        (["NONE"], None),
        ([], None),
        (None, None),
    ],
)
def test_health_commands(test: object, command: object) -> None:
    assert health.health_command(test) == command


class Answer(http.server.BaseHTTPRequestHandler):
    status = 500

    def do_GET(self) -> None:
        self.send_response(type(self).status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/health"
    server.shutdown()
    thread.join()
    server.server_close()


class Plain:
    """As much of a container as an HTTP check looks at."""

    def __init__(self, plan: HealthPlan) -> None:
        self.plan = ContainerPlan("image", health=plan)


def test_health_over_http_follows_the_service(web: str) -> None:
    reports: list[str] = []
    changed = threading.Condition()

    def report(status: str, detail: str) -> None:
        with changed:
            reports.append(status)
            changed.notify_all()

    def wait_for(expected: list[str]) -> None:
        with changed:
            assert changed.wait_for(lambda: reports == expected, 30), reports

    Answer.status = 500
    plan = HealthPlan("http", web, interval=0.02, retries=2, timeout=5, start_period=0.2)
    monitor = health.Monitor(Plain(plan), report)  # type: ignore[arg-type]
    monitor.start()
    wait_for(["starting", "unhealthy"])
    Answer.status = 302
    wait_for(["starting", "unhealthy", "healthy"])
    Answer.status = 404
    wait_for(["starting", "unhealthy", "healthy", "unhealthy"])
    monitor.stop()


def test_a_url_that_is_none_is_not_healthy_and_does_not_end_the_checks() -> None:
    assert not health.http_check("http://[::1")(5)[0]


def test_health_is_not_known_until_podman_tells_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HTTP_INTERVAL", 0.01)
    answers: list[PodmanError | dict[str, object]] = [PodmanError("It is gone."), {}]

    class Asked(Plain):
        def image(self) -> dict[str, object]:
            answer = answers.pop(0)
            if isinstance(answer, PodmanError):
                raise answer
            return answer

    reports: queue.Queue[tuple[str, str]] = queue.Queue()
    monitor = health.Monitor(Asked(HealthPlan("image")), lambda *report: reports.put(report))  # type: ignore[arg-type]
    monitor.start()
    assert reports.get(timeout=30) == ("starting", "the image's health check is not known: It is gone.")
    assert reports.get(timeout=30) == ("healthy", "")


def test_http_check_of_nothing() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        well, detail = health.http_check(f"http://127.0.0.1:{unused.getsockname()[1]}/")(5)
    assert not well
    assert "refused" in detail


@pytest.fixture
def conmon(tmp_path: Path) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "attach"))
    listener.listen(1)
    os.mkfifo(tmp_path / "ctl")
    yield listener
    listener.close()


def test_attached_streams(conmon: socket.socket, tmp_path: Path) -> None:
    attached = Attached(str(tmp_path), os.getpid(), tty=False, stdin=True)
    monitor, _ = conmon.accept()
    with monitor:
        (read,) = attached.outputs.values()
        assert read() == []
        for packet in (b"\x02one ", b"\x02two", b"\x03err", b"\x02three"):
            monitor.send(packet)
        assert read() == [(STDOUT, b"one two"), (STDERR, b"err"), (STDOUT, b"three")]
        assert attached.write(memoryview(b"x" * 100_000)) == 1 << 15
        assert monitor.recv(1 << 16) == b"x" * (1 << 15)
        attached.close_stdin()
        assert monitor.recv(1 << 16) == b""
        monitor.send(b"\x02last")
    assert read() == [(STDOUT, b"last")]
    assert read() is None
    attached.finish(3, None)
    assert select.select([attached.ended], [], [], 0)[0]
    assert attached.exit() == (3, None)
    attached.close()


def test_attached_terminal(conmon: socket.socket, tmp_path: Path) -> None:
    control = os.open(tmp_path / "ctl", os.O_RDONLY | os.O_NONBLOCK)
    attached = Attached(str(tmp_path), os.getpid(), tty=True, stdin=True)
    monitor, _ = conmon.accept()
    with monitor:
        attached.resize(40, 2000)
        assert os.read(control, 100) == b"1 40 1000\n"
        attached.write(memoryview(b"line\n"))
        attached.close_stdin()
        assert (monitor.recv(100), monitor.recv(100)) == (b"line\n", b"\x04")
    attached.close()
    os.close(control)


def test_without_stdin_the_container_reads_its_end(conmon: socket.socket, tmp_path: Path) -> None:
    attached = Attached(str(tmp_path), os.getpid(), tty=False, stdin=False)
    monitor, _ = conmon.accept()
    with monitor:
        assert monitor.recv(10) == b""
    attached.close()


def test_control_tells_its_whole_state_on_every_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "c")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)

    def connect() -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            raise
        return connection

    control = Control(connect)
    control.stage("early")
    got: list[dict[str, object]] = []
    seen = threading.Semaphore(0)

    def body() -> None:
        for message in control.messages():
            got.append(message)
            seen.release()
            if message.get("type") == "end":
                return

    thread = threading.Thread(target=body)
    thread.start()
    listener.listen(1)  # only now: the guest has to try again
    first, _ = listener.accept()
    with first, first.makefile("r") as lines:
        assert json.loads(lines.readline())["state"]["phase"] == "waiting"
        assert json.loads(lines.readline())["name"] == "early"
        first.sendall(b'{"type":"plan"}\nnonsense\n{"type":"st')
        assert seen.acquire(timeout=30)
        control.tell({"type": "started"}, phase="running")
        assert json.loads(lines.readline())["type"] == "started"
    second, _ = listener.accept()
    with second, second.makefile("r") as lines:
        assert json.loads(lines.readline())["state"]["phase"] == "running"
        second.sendall(b'{"type":"end"}\n')
        thread.join(30)
    assert [message["type"] for message in got] == ["plan", "end"]
    listener.close()


def test_uptime_grows() -> None:
    assert 0 < linux.uptime() <= linux.uptime()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            "crun: executable file `x` not found in $PATH: No such file or directory: OCI runtime attempted to invoke a command "
            "that was not found",
            "There is no program x in the container.",
        ),
        ("executable file `/no/such` not found: No such file or directory", "There is no program /no/such in the container."),
        (
            "crun: the path `/etc/passwd` exists but it is not executable: Operation not permitted: OCI permission denied",
            "/etc/passwd in the container is not executable.",
        ),
        ('workdir "/nope" does not exist on container a5fb5a24', "There is no directory /nope in the container."),
        ("chdir to `/nope`: No such file or directory", "There is no directory /nope in the container."),
        ("unable to find user nobodyx: no matching entries in passwd file", "There is no user nobodyx in the container."),
        ("crun: something odd: OCI runtime error", "Something odd."),
    ],
)
def test_what_podman_says_in_one_sentence(said: str, meant: str) -> None:
    assert explain(said) == meant


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("executable file `x` not found in $PATH: No such file or directory", 127),
        ("chdir to `/nope`: No such file or directory", 127),
        ("chdir to `/etc/passwd`: Not a directory", 126),
        ("the path `/etc/passwd` exists but it is not executable: Operation not permitted", 126),
    ],
)
def test_a_failed_exec_has_podmans_exit_code(said: str, code: int) -> None:
    assert exec.runtime_code(said) == code


def test_a_program_that_cannot_be_started_leaves_no_files(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lie in the guest's memory for ever."""
    directory = tmp_path / "exec"
    monkeypatch.setattr(exec, "DIRECTORY", str(directory))
    monkeypatch.setattr(exec, "CRUN", "/nonexistent")
    (tmp_path / "config.json").write_text(json.dumps({"process": {"user": {"uid": 0}}}))
    running = SimpleNamespace(directory=str(tmp_path), pid=os.getpid(), id="container", hostname="vm")
    for request in (Request(argv=["x"], user="nosuchuser"), Request(argv=["x"]), Request(argv=["x"], tty=True)):
        with pytest.raises(LaunchError):
            exec.launch(running, request)  # type: ignore[arg-type]
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize(
    ("made_with", "set_by_run", "said"),
    [("source", None, "clone"), ("0.0.0.0", None, "0.0.0.0"), ("source", "source", "source"), (None, None, None)],
)
def test_a_command_has_the_hostname_that_the_container_would_have(
    made_with: str | None, set_by_run: str | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Podman adds the VM's name where neither the image nor the run sets HOSTNAME; a clone has another name."""
    monkeypatch.setattr(socket, "gethostname", lambda: "clone")
    env = [f"HOSTNAME={made_with}"] if made_with else []
    (tmp_path / "config.json").write_text(json.dumps({"process": {"user": {"uid": 0}, "env": env}}))
    plan = ContainerPlan("image", env={"HOSTNAME": set_by_run} if set_by_run else {})
    running = SimpleNamespace(directory=str(tmp_path), plan=plan, hostname="source")
    value = exec.process(running, Request(argv=["x"]))  # type: ignore[arg-type]
    assert value["env"] == ([f"HOSTNAME={said}"] if said else [])


def test_sessions_are_served_on_when_there_were_too_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        serving = threading.Thread(target=Server(lambda _request: pytest.fail("nothing is started"), 0).serve, args=(listener,))
        serving.start()

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        client.settimeout(60)
        client.connect(str(tmp_path / "s"))
        assert client.recv(1) == b""
        assert serving.is_alive()
        listener.shutdown(socket.SHUT_RDWR)
        serving.join()


def test_an_identity_that_comes_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host was not sure whether we had it; what runs by now would lose its connections."""
    taken: list[str] = []
    monkeypatch.setattr(agent.identity, "take", lambda new, network, restored: taken.append(new.machine_id))
    monkeypatch.setattr(agent.freezer, "thaw", lambda: None)
    guest = agent.Agent(SimpleNamespace(), listen=socket.socket)  # type: ignore[arg-type]
    for machine_id in ("a" * 32, "a" * 32, "b" * 32):
        guest._on_restored(Identity("name", machine_id, "AAAA", 0, None, True))
    assert taken == ["a" * 32, "b" * 32]
    guest._listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_clone_keeps_no_way_out_that_its_network_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has no IPv6, programs are to be told at once, not after a connection's timeout."""
    monkeypatch.setattr(network, "present", lambda: True)
    source = NetworkPlan("10.0.2.100/24", "10.0.2.2", address6="fd66:6376:6d00::100/64", gateway6="fd66:6376:6d00::2")

    def ways_out() -> list[bool]:
        namespaces.unshare(namespaces.CLONE_NEWNET)
        tap.create(network.INTERFACE)
        found = []
        with rtnetlink.open_socket() as route:
            for plan in (source, replace(source, gateway6=None), replace(source, gateway6=None), source):
                network.configure(plan)
                found += [rtnetlink.match(route, ip_address(ip)) is not None for ip in ("192.0.2.1", "2001:db8::1")]
                assert rtnetlink.match(route, ip_address("fd66:6376:6d00::2")), "its neighbours stay"
        return found

    assert namespaces.in_thread(ways_out) == [True, True, True, False, True, False, True, True]
