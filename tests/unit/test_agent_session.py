"""Sessions end to end: the real server and the real client over Unix sockets, with real processes."""

import contextlib
import fcntl
import hashlib
import os
import random
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fc_agent import process
from fc_agent.session import Server
from fcvm.agent import session, vsock
from fcvm.agent.session import Client, Exit, Request, Resume, stream
from fcvm.errors import AgentError


class Place:
    """A server on a Unix socket, and what a client needs."""

    def __init__(self, path: Path, grace: float | None = 30) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(200)
        self.launched: list[process.LocalProcess] = []
        self.server = Server(self._launch, grace)
        self.thread = threading.Thread(target=self.server.serve, args=(self.listener,), daemon=True)
        self.thread.start()

    def _launch(self, request: object) -> process.LocalProcess:
        started = process.launch(request)  # type: ignore[arg-type]
        self.launched.append(started)
        return started

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        return connection

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()
        for started in self.launched:
            started.kill()
            started.popen.wait()


class Collector:
    def __init__(self) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.changed = threading.Condition()

    def __call__(self, name: str, data: bytes) -> None:
        with self.changed:
            (self.stdout if name == "stdout" else self.stderr).extend(data)
            self.changed.notify_all()

    def wait_for(self, text: bytes) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: text in self.stdout, timeout=60), bytes(self.stdout)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    server = Place(tmp_path / "s")
    yield server
    server.close()


def shell(script: str, **options: object) -> Request:
    return Request(["/bin/sh", "-c", script], target="vm", **options)  # type: ignore[arg-type]


def run(place: Place, request: Request, data: bytes | None = None) -> tuple[Exit, bytes, bytes]:
    output = Collector()
    with contextlib.ExitStack() as stack:
        stdin = None
        if data is not None:
            request.stdin = True
            stdin, feeder = os.pipe()
            thread = threading.Thread(target=feed, args=(feeder, data))
            thread.start()
            stack.callback(thread.join)
            stack.callback(os.close, stdin)
        ended = stream(place.connect, request, stdin=stdin, on_output=output)
    return ended, bytes(output.stdout), bytes(output.stderr)


def feed(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file, contextlib.suppress(BrokenPipeError):
        file.write(data)


def background(client: Client) -> tuple[threading.Thread, list[Exit | BaseException]]:
    result: list[Exit | BaseException] = []

    def body() -> None:
        try:
            result.append(client.run())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    return thread, result


def test_output_and_exit_code(place: Place) -> None:
    ended, out, err = run(place, shell("echo out; echo err >&2; exit 7"))
    assert (ended.code, ended.message, out, err) == (7, None, b"out\n", b"err\n")


def test_environment_and_directory(place: Place, tmp_path: Path) -> None:
    ended, out, _ = run(place, shell('echo "$A,$B"; pwd', env={"A": "1 2", "B": "x=y"}, cwd=str(tmp_path)))
    assert (ended.code, out.decode()) == (0, f"1 2,x=y\n{tmp_path}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_death_by_signal(place: Place, number: int) -> None:
    assert run(place, shell(f"kill -{int(number)} $$"))[0].code == 128 + number


@pytest.mark.parametrize(
    ("argv", "options", "code"),
    [
        (["/no/such/program"], {}, 127),
        (["no-such-program"], {}, 127),
        (["/etc/passwd"], {}, 126),
        (["/"], {}, 126),
        (["true"], {"cwd": "/no/such/directory"}, 126),
        (["true"], {"user": "no-such-user"}, 125),
        (["a\0b"], {}, 125),
    ],
)
def test_what_cannot_be_started(place: Place, argv: list[str], options: dict[str, str], code: int) -> None:
    ended, out, err = run(place, Request(argv, target="vm", **options))  # type: ignore[arg-type]
    assert (ended.code, out, err) == (code, b"", b"")
    assert ended.message


def test_binary_stdin_arrives_and_ends(place: Place) -> None:
    data = random.Random(1).randbytes(5_000_000)
    ended, out, _ = run(place, shell("cat"), data)
    assert ended.code == 0
    assert out == data


def test_empty_stdin_ends(place: Place) -> None:
    assert run(place, shell("wc -c"), b"")[1].strip() == b"0"


def test_without_stdin_the_process_reads_nothing(place: Place) -> None:
    assert run(place, shell("wc -c"))[1].strip() == b"0"


def test_stdin_that_nobody_reads_does_not_keep_the_session(place: Place) -> None:
    assert run(place, shell("exec <&-; echo done; exit 3"), bytes(8_000_000))[0].code == 3


def test_much_output_is_complete_and_in_order(place: Place) -> None:
    count = 64 << 20
    program = f"import sys\nfor i in range({count // 65536}): sys.stdout.buffer.write(bytes([i % 256]) * 65536)"
    digest, expected = hashlib.sha256(), hashlib.sha256()
    for i in range(count // 65536):
        expected.update(bytes([i % 256]) * 65536)
    ended = stream(
        place.connect,
        Request([sys.executable, "-ISE", "-c", program], target="vm"),
        stdin=None,
        on_output=lambda _, data: digest.update(data),
    )
    assert ended.code == 0
    assert digest.digest() == expected.digest()


def test_a_slow_reader_slows_the_writer(place: Place) -> None:
    """The process may be ahead by the window, the pipe and the socket buffers, and by no more."""
    reading = threading.Event()
    seen = {"stdout": bytearray(), "stderr": bytearray()}

    def on_output(name: str, data: bytes) -> None:
        if name == "stdout":
            reading.wait(60)
        seen[name].extend(data)

    program = (
        "import os, sys\nn = 0\nos.set_blocking(1, False)\nimport select\n"
        "while n < 32 << 20:\n"
        "    if not select.select([], [1], [], 2)[1]: break\n"
        "    n += os.write(1, bytes(4096))\n"
        "os.set_blocking(1, True)\nprint(n, file=sys.stderr)"
    )
    client = Client(
        place.connect, Request([sys.executable, "-c", program], target="vm"), stdin=None, on_output=on_output
    )
    thread, result = background(client)
    place_process = wait_until(lambda: place.launched and place.launched[0])
    select.select([place_process.ended], [], [], 60)  # it gave up writing, because nothing moved for two seconds
    reading.set()
    thread.join(60)
    assert isinstance(result[0], Exit)
    written = int(seen["stderr"])
    assert written < 8 << 20
    assert len(seen["stdout"]) == written


def wait_until(condition: Callable[[], object], seconds: float = 60) -> object:
    """For states of the kernel that no descriptor announces."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
    return value


def test_a_signal_overtakes_stdin_that_nobody_reads(place: Place) -> None:
    output = Collector()
    stdin, feeder = os.pipe()
    thread_feed = threading.Thread(target=feed, args=(feeder, bytes(8_000_000)))
    thread_feed.start()
    script = "trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done"
    client = Client(place.connect, shell(script, stdin=True), stdin=stdin, on_output=output)
    thread, result = background(client)
    output.wait_for(b"ready")
    client.signal(signal.SIGUSR1)
    thread.join(60)
    os.close(stdin)
    thread_feed.join()
    assert isinstance(result[0], Exit)
    assert result[0].code == 5
    assert output.stdout == b"ready\ncaught\n"


def test_a_terminal(place: Place) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && stty size && ps -o tty= -p $$ | grep -q pts && echo ok"
    ended, out, _ = run(place, shell(script, tty=True, rows=33, columns=101))
    assert (ended.code, out) == (0, b"33 101\r\nok\r\n")


@pytest.mark.parametrize("with_stdin", [True, False])
def test_a_terminal_is_raw_only_where_its_keys_are_passed_on(place: Place, with_stdin: bool) -> None:
    """Else nobody would see a Ctrl-C."""
    master, line = os.openpty()
    raw: list[bool] = []

    def on_output(name: str, data: bytes) -> None:
        raw.append(not termios.tcgetattr(line)[3] & termios.ICANON)

    request = Request(["echo", "x"], target="vm", tty=True, stdin=with_stdin)
    stream(place.connect, request, stdin=line if with_stdin else None, on_output=on_output, terminal=line)
    os.close(master)
    os.close(line)
    assert set(raw) == {with_stdin}


def test_a_terminal_is_resized(place: Place) -> None:
    output = Collector()
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.05; done"
    client = Client(place.connect, shell(script, tty=True), stdin=None, on_output=output)
    thread, _ = background(client)
    output.wait_for(b"ready")
    client.resize(40, 120)
    thread.join(60)
    assert b"40 120" in output.stdout


def test_keys_on_a_terminal_reach_the_foreground_job(place: Place) -> None:
    output = Collector()
    stdin, keyboard = os.pipe()
    client = Client(
        place.connect, shell("echo ready; exec sleep 1000", tty=True, stdin=True), stdin=stdin, on_output=output
    )
    thread, result = background(client)
    output.wait_for(b"ready")
    comm = Path(f"/proc/{place.launched[0].pid}/comm")
    wait_until(lambda: comm.read_text() == "sleep\n")  # a shell that is just about to exec can lose a SIGINT
    os.write(keyboard, b"\x03")
    thread.join(60)
    os.close(stdin)
    os.close(keyboard)
    assert isinstance(result[0], Exit)
    assert result[0].code == 128 + signal.SIGINT


@pytest.mark.parametrize("text", [b"one\ntwo\n", b"one\ntwo"])
def test_the_end_of_stdin_ends_a_reader_on_a_terminal(place: Place, text: bytes) -> None:
    ended, out, _ = run(place, shell("stty -echo; cat", tty=True), text)
    assert ended.code == 0
    assert out.endswith(b"one\r\ntwo" + (b"\r\n" if text.endswith(b"\n") else b""))


def test_a_grandchild_that_holds_the_pipe_does_not_hold_the_session(place: Place, tmp_path: Path) -> None:
    started = time.monotonic()
    ended, out, _ = run(place, shell(f"sleep 300 & echo $! > {tmp_path}/pid; echo done"))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert (ended.code, out) == (0, b"done\n")
    assert time.monotonic() - started < 60


def test_a_grandchild_that_writes_for_ever_does_not_hold_the_session(place: Place, tmp_path: Path) -> None:
    ended, out, _ = run(place, shell(f"yes & echo $! > {tmp_path}/pid; exit 4"))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert ended.code == 4
    assert set(out) <= set(b"y\n")


def test_a_hundred_sessions_at_once(place: Place) -> None:
    results: dict[int, tuple[int, bytes]] = {}

    def one(index: int) -> None:
        ended, out, _ = run(place, shell(f"cat; exit {index}"), b"%d" % index * 1000)
        results[index] = (ended.code, out)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == {index: (index, b"%d" % index * 1000) for index in range(100)}


def test_without_grace_the_whole_session_dies_with_its_client(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "jobs")
    place = Place(tmp_path / "s", grace=0)
    with contextlib.ExitStack() as stack:
        stack.callback(place.close)
        connection = place.connect()
        script = f"trap '' HUP TERM; sleep 1000 & one=$!; sleep 1000 & echo $one $! >{tmp_path}/jobs; wait"
        session.wire.send_line(connection, {"open": vars(shell(script))})
        session.wire.read_line(connection)
        ends = []
        for pid in (place.launched[0].pid, *map(int, (tmp_path / "jobs").read_text().split())):
            ends.append(os.pidfd_open(pid))
            stack.callback(os.close, ends[-1])
        assert len(ends) == 3
        connection.close()
        for end in ends:
            assert select.select([end], [], [], 60)[0]


def test_an_abandoned_session_is_hung_up_then_killed(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", grace=0.1)
    try:
        connection = place.connect()
        script = f"trap 'echo hup > {tmp_path}/hup' HUP; echo begun; while :; do sleep 0.05; done"
        session.wire.send_line(connection, {"open": vars(shell(script))})
        answer, rest = session.wire.read_line(connection)
        while b"begun" not in rest:
            rest += connection.recv(1000)
        connection.close()
        assert select.select([place.launched[0].ended], [], [], 60)[0]
        assert (tmp_path / "hup").read_text() == "hup\n"
        wait_until(lambda: is_gone(place, str(answer["session"])))
    finally:
        place.close()


def test_sessions_of_another_vm_are_killed_at_once(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", grace=None)
    try:
        connection = place.connect()
        script = f"trap 'echo hup > {tmp_path}/hup' HUP; echo begun; while :; do sleep 0.05; done"
        session.wire.send_line(connection, {"open": vars(shell(script))})
        answer, rest = session.wire.read_line(connection)
        while b"begun" not in rest:
            rest += connection.recv(1000)
        place.server.abandon()
        assert place.launched[0].popen.wait(60) == -signal.SIGKILL
        assert not (tmp_path / "hup").exists(), "none of it has run on"
        wait_until(lambda: is_gone(place, str(answer["session"])))
        connection.close()
    finally:
        place.close()


def is_gone(place: Place, identifier: str) -> bool:
    with contextlib.suppress(AgentError):  # it was just about to end
        return stream(place.connect, Resume(identifier), stdin=None, on_output=Collector()).code == 125
    return False


def test_output_that_breaks_hangs_the_process_up(place: Place) -> None:
    def on_output(name: str, data: bytes) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        stream(place.connect, shell("yes"), stdin=None, on_output=on_output)
    assert select.select([place.launched[0].ended], [], [], 60)[0]


def test_hang_up(place: Place) -> None:
    output = Collector()
    client = Client(place.connect, shell("trap 'echo bye; exit 9' HUP; echo ready; while :; do sleep 0.05; done"),
                    stdin=None, on_output=output)  # fmt: skip
    thread, result = background(client)
    output.wait_for(b"ready")
    client.hang_up()
    thread.join(60)
    assert isinstance(result[0], Exit)
    assert (result[0].code, bytes(output.stdout)) == (9, b"ready\nbye\n")


def test_a_signal_after_the_end_is_written_nowhere(place: Place, tmp_path: Path) -> None:
    client = Client(place.connect, shell("exit 3"), stdin=None, on_output=Collector())
    wake = client._wake
    assert client.run().code == 3
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    os.dup2(other, wake)
    client.signal(signal.SIGTERM)
    for fd in {other, wake}:
        os.close(fd)
    assert (tmp_path / "other").read_bytes() == b""


def test_an_adopted_session_waits_for_its_client_and_goes_on_with_the_next(place: Place) -> None:
    """What a clone's supervisor does: it was never told what the source's had seen."""
    request = session_request(["/bin/sh", "-c", "echo one; read x; echo two; exit 6"], stdin=True)
    place.server.adopt("main", process.launch(request))
    connection = place.connect()
    session.wire.send_line(connection, {"resume": "main", "received": None})
    answer, rest = session.wire.read_line(connection)
    first = session.Channel(sent=answer["received"], received=answer["from"])
    first.attach(connection, peer_received=answer["received"], rest=rest)
    read_until(first, b"one\n")
    first.consume(first.received)
    first.send(session.wire.STDIN, b"\n")
    first.flush()
    read_until(first, b"two\n")
    connection.close()  # "two" was seen but never acknowledged: its successor gets it
    output = Collector()
    ended = stream(place.connect, Resume("main"), stdin=None, on_output=output)
    assert (ended.code, bytes(output.stdout)) == (6, b"two\n")


def read_until(channel: session.Channel, text: bytes) -> None:
    seen = b""
    while text not in seen:
        seen += b"".join(payload for kind, payload in channel.receive() if kind == session.wire.STDOUT)
        if text not in seen:
            select.select([channel.socket], [], [])


def session_request(argv: list[str], **options: object) -> object:
    from fc_agent.session import Request as Asked

    return Asked(target="vm", argv=argv, **options)  # type: ignore[arg-type]


def test_whoever_takes_over_a_session_asks_again_when_the_connection_breaks(place: Place) -> None:
    """As the first one to a guest may that was just restored: nothing is started by asking twice."""
    place.server.adopt("main", place._launch(session_request(["/bin/echo", "hello"])))
    attempts: list[socket.socket] = []

    def connect() -> socket.socket:
        attempts.append(place.connect())
        if len(attempts) == 1:
            attempts[0].shutdown(socket.SHUT_RDWR)
        return attempts[-1]

    output = Collector()
    assert stream(connect, Resume("main"), stdin=None, on_output=output).code == 0
    assert output.stdout == b"hello\n"
    attempts.clear()
    with pytest.raises(AgentError, match="did not answer"):  # but that of a process may have started it
        stream(connect, shell("true"), stdin=None, on_output=output)


def test_an_unknown_session(place: Place) -> None:
    ended = stream(place.connect, Resume("nothing"), stdin=None, on_output=Collector())
    assert ended.code == 125
    assert "nothing" in (ended.message or "")


@pytest.mark.parametrize("line", [b"nonsense\n", b"{}\n", b'{"open": 3}\n', b'{"open": {"argv": "ls"}}\n', b"",
                                  b'{"open": {"argv": ["ls"], "rows": -1}}\n', b'{"resume": "x", "received": -1}\n'])  # fmt: skip
def test_a_bad_client_does_not_harm_the_server(place: Place, line: bytes) -> None:
    connection = place.connect()
    connection.sendall(line)
    connection.shutdown(socket.SHUT_WR)
    assert b'"session"' not in connection.recv(1000)
    connection.close()
    assert run(place, shell("echo fine"))[1] == b"fine\n"


def test_a_server_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        stream(lambda: (_ for _ in ()).throw(FileNotFoundError()), shell("true"), stdin=None, on_output=Collector())  # type: ignore[arg-type,return-value]


def test_a_server_that_talks_nonsense_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b'{"session": "x", "received": 0}\n' + b"\xff" * 100)
    with theirs, pytest.raises(AgentError, match="protocol"):
        stream(lambda: ours, shell("true"), stdin=None, on_output=Collector())


def test_a_server_that_is_slow_to_start_the_process_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcvm.agent.session.OPENING_TIME", 0.05)  # what is enough to find a session again
    ours, theirs = socket.socketpair()
    payload = b'{"code": 3}'

    def answer() -> None:
        theirs.recv(1000)
        assert not select.select([theirs], [], [], 0.3)[0]  # it waits
        theirs.sendall(b'{"session": "x", "received": 0}\n' + struct.pack(">BI", 8, len(payload)) + payload)

    thread = threading.Thread(target=answer)
    thread.start()
    with theirs:
        assert stream(lambda: ours, shell("true"), stdin=None, on_output=Collector()).code == 3
        thread.join()


class Cutter:
    """A relay between client and server that cuts every connection after a random number of bytes."""

    def __init__(self, place: Place, seed: int, cuts: int) -> None:
        self.place = place
        self.random = random.Random(seed)
        self.cuts = cuts
        self.made = 0
        self.threads: list[threading.Thread] = []

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        server = self.place.connect()
        self.made += 1
        budget = (
            self.random.choice([300, 5_000, 60_000, 700_000]) + self.random.randrange(1000)
            if self.made <= self.cuts
            else None
        )
        thread = threading.Thread(target=self._relay, args=(theirs, server, budget))
        thread.start()
        self.threads.append(thread)
        return ours

    def _relay(self, left: socket.socket, right: socket.socket, budget: int | None) -> None:
        opening = 2  # one line each way goes through whole, or the client could not know its session
        with left, right:
            try:
                while budget is None or budget > 0:
                    for source in select.select([left, right], [], [])[0]:
                        limit = 65536 if opening or budget is None else min(65536, budget)
                        data = source.recv(limit)
                        if not data:
                            return
                        (right if source is left else left).sendall(data)
                        if opening and data.endswith(b"\n"):
                            opening -= 1
                        elif budget is not None:
                            budget -= len(data)
            except OSError:
                return


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_lost_or_repeated_when_connections_break(place: Place, seed: int) -> None:
    cutter = Cutter(place, seed, cuts=25)
    data = random.Random(seed).randbytes(2_000_000)
    output = Collector()
    stdin, feeder = os.pipe()
    thread = threading.Thread(target=feed, args=(feeder, data))
    thread.start()
    ended = stream(cutter.connect, shell("cat; echo end >&2; exit 3", stdin=True), stdin=stdin, on_output=output)
    thread.join()
    os.close(stdin)
    for relay in cutter.threads:
        relay.join()
    assert cutter.made > 3
    assert (ended.code, bytes(output.stderr)) == (3, b"end\n")
    assert output.stdout == data


def test_a_client_gives_up_when_the_server_does_not_come_back(place: Place) -> None:
    cutter = Cutter(place, 1, cuts=1)
    attempts: list[float] = []

    def connect() -> socket.socket:
        if cutter.made:
            raise AgentError("no answer")
        return cutter.connect()

    def give_up(error: BaseException, since: float) -> bool:
        attempts.append(since)
        return len(attempts) == 3

    with pytest.raises(AgentError, match="lost"):
        stream(connect, shell("yes"), stdin=None, on_output=Collector(), give_up=give_up)
    cutter.threads[0].join()


@pytest.mark.parametrize("attempt", range(3))
def test_a_signal_is_forwarded_even_while_our_output_is_blocked(tmp_path: Path, place: Place, attempt: int) -> None:
    """The client prints into a pipe that nobody reads; SIGTERM must still reach the process."""
    program = (
        "import sys, socket, signal\n"
        "from fcvm.agent.session import *\n"
        "def connect():\n"
        "    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); return s\n"
        "e = stream(connect, Request(['/bin/sh', '-c', sys.argv[2]], target='vm'), stdin=None,\n"
        "           on_output=to_descriptors(1, 2), signals=FORWARDED)\n"
        "sys.exit(e.code)\n"
    )
    read, write = os.pipe()
    script = f"trap 'echo got > {tmp_path}/got; kill $!; exit 3' TERM; yes & wait"
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", program, str(place.path), script],
                         {**os.environ, "PYTHONPATH": ":".join(sys.path)},
                         file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)])  # fmt: skip
    os.close(write)
    assert len(os.read(read, 10)) == 10
    wait_until(lambda: _unread(read) >= 4096 and _state(pid) == "S")
    os.kill(pid, signal.SIGTERM)
    wait_until((tmp_path / "got").exists)
    while os.read(read, 65536):
        pass
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


def _unread(pipe: int) -> int:
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Cut:
    """Connections to a place of which the first is cut in a way that the client does not see: by a snapshot."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.cut = threading.Event()
        self.carriers: list[threading.Thread] = []
        self.kept: list[socket.socket] = []

    def connect(self) -> socket.socket:
        real = self.place.connect()
        if self.kept:
            return real
        ours, theirs = socket.socketpair()
        self.kept += [theirs, real]
        self.carriers = [threading.Thread(target=self._carry, args=ways) for ways in ((real, theirs), (theirs, real))]
        for carrier in self.carriers:
            carrier.start()
        return ours

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        while not self.cut.is_set():
            if select.select([source], [], [], 0.01)[0]:
                target.sendall(source.recv(65536))

    def now(self) -> None:
        """Cut it."""
        self.cut.set()
        for carrier in self.carriers:
            carrier.join()
        self.kept[1].close()


@pytest.mark.parametrize("patient", [False, True], ids=["at once", "after a silence"])
def test_a_reset_that_only_the_other_side_has_seen(place: Place, tmp_path: Path, patient: bool) -> None:
    device, output, way = tmp_path / "vsock.sock", Collector(), Cut(place)
    device.touch()
    resets = vsock.Resets(device)
    request = shell("echo ready; read line; for i in 1 2 3; do echo $i; done", stdin=True)
    stdin, feeder = os.pipe()
    client = Client(way.connect, request, stdin=stdin, on_output=output, resets=resets)
    thread, result = background(client)
    output.wait_for(b"ready")
    if patient:
        wait_until(lambda: resets.fd is not None)
    way.now()
    os.write(feeder, b"go on\n")  # lost in the old connection, unless it is sent again
    vsock.announce_reset(device)
    thread.join(60)
    os.close(feeder)
    os.close(stdin)
    way.kept[0].close()
    assert isinstance(result[0], Exit)
    assert output.stdout == b"ready\n1\n2\n3\n"
