"""Forwarded commands as forks of a warm interpreter: the machine's launcher, run here."""

import contextlib
import errno
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fc_agent import machine_commands
from fc_agent.machine_commands import Commands
from fc_agent.session import Server
from fcvm.agent.session import Client, Exit, Request, stream
from fcvm.machine import zygote

SOURCES = Path(__file__).parents[2] / "src"

# A stand-in for fcvm's commands, beside the real zygote: what it prints and how it ends is the test's to say.
REMOTE = '''
import os, sys, signal
def main(argv):
    import json
    exec(json.loads(argv[0]), {"argv": argv, "os": os, "sys": sys, "signal": signal})
    return 0
'''


class Place:
    def __init__(self, directory: Path) -> None:
        self.code = directory / "code"
        (self.code / "fcvm/cli").mkdir(parents=True)
        (self.code / "fcvm/machine").mkdir()
        for name in ("__init__", "config", "log", "errors", "hostpath", "cli/__init__", "cli/context", "cli/main", "machine/__init__"):
            (self.code / f"fcvm/{name}.py").touch()
        (self.code / "fcvm/machine/zygote.py").write_text((SOURCES / "fcvm/machine/zygote.py").read_text())
        (self.code / "fcvm/cli/remote.py").write_text(REMOTE)
        self.path = directory / "s"
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.commands = Commands()
        self.server = Server(self.commands, 0)
        threading.Thread(target=self.server.serve, args=(self.listener,), daemon=True).start()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        return connection

    def request(self, script: str, **options: object) -> Request:
        return Request([str(self.code), json.dumps(script)], target="fcvm", cwd="/", **options)  # type: ignore[arg-type]

    def run(self, script: str, stdin: int | None = None, **options: object) -> tuple[Exit, bytes, bytes]:
        out: dict[str, bytes] = {"stdout": b"", "stderr": b""}

        def on_output(name: str, data: bytes) -> None:
            out[name] += data

        request = self.request(script, stdin=stdin is not None, **options)
        ended = stream(self.connect, request, stdin=stdin, on_output=on_output)
        return ended, out["stdout"], out["stderr"]

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        zygote = self.commands._zygote
        if zygote is not None:
            zygote._socket.close()
            zygote._process.kill()
            zygote._process.wait()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(machine_commands, "PYTHON", sys.executable)
    place = Place(tmp_path)
    yield place
    place.close()


def test_output_and_exit_code(place: Place) -> None:
    ended, out, err = place.run("print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (ended.code, out, err) == (7, b"out\n", b"err\n")
    assert place.run("pass")[0].code == 0
    assert place.run("os.kill(os.getpid(), 9)")[0].code == 137
    assert place.run("os._exit(255)")[0].code == 255


def test_commands_are_forks_of_one_interpreter(place: Place) -> None:
    parents = {place.run("print(os.getppid())")[1] for _ in range(3)}
    assert len(parents) == 1
    pids = {place.run("print(os.getpid())")[1] for _ in range(3)}
    assert len(pids) == 3


def test_a_traceback_is_shown_and_counts_as_failure_of_fcvm(place: Place) -> None:
    ended, _, err = place.run("1/0")
    assert ended.code == 125
    assert b"ZeroDivisionError" in err


def test_stdin_binary_and_its_end(place: Place) -> None:
    data = bytes(range(256)) * 4096
    read, write = os.pipe()

    def feed() -> None:
        with open(write, "wb") as pipe:
            pipe.write(data)

    thread = threading.Thread(target=feed)
    thread.start()
    ended, out, _ = place.run("sys.stdout.buffer.write(sys.stdin.buffer.read())", stdin=read)
    thread.join()
    os.close(read)
    assert (ended.code, out) == (0, data)


def test_without_stdin_it_is_empty(place: Place) -> None:
    assert place.run("print(repr(sys.stdin.read()))")[1] == b"''\n"


def test_environment_directory_and_session(place: Place, tmp_path: Path) -> None:
    script = "print(os.environ['NAME'], os.environ.get('LEAK'), os.getcwd(), os.getsid(0) == os.getpid())"
    request = Request([str(place.code), json.dumps(script)], target="fcvm", cwd=str(tmp_path), env={"NAME": "value"})
    os.environ["LEAK"] = "leaked"
    out: list[bytes] = []
    try:
        assert stream(place.connect, request, stdin=None, on_output=lambda n, d: out.append(d)).code == 0
    finally:
        del os.environ["LEAK"]
    assert b"".join(out).split() == [b"value", b"None", bytes(tmp_path), b"True"]


def test_no_descriptor_leaks_into_a_command(place: Place) -> None:
    place.run("pass")
    out = place.run("print(sorted(map(int, os.listdir('/proc/self/fd'))))")[1]
    # 0, 1, 2, the directory that is listed, and the pipe by which the interpreter learns what was imported
    assert len(json.loads(out)) == 5


def test_terminal(place: Place) -> None:
    script = "print(os.isatty(0), os.isatty(1), os.isatty(2), os.get_terminal_size(), os.tcgetpgrp(0) == os.getpgrp())"
    ended, out, err = place.run(script, tty=True, rows=33, columns=99)
    assert ended.code == 0
    assert out == b"True True True os.terminal_size(columns=99, lines=33) True\n"
    assert err == b""


def test_interrupt_raises_keyboard_interrupt(place: Place) -> None:
    script = (
        "import time\n"
        "try:\n    print('ready', flush=True); time.sleep(1000)\nexcept KeyboardInterrupt:\n    print('interrupted'); sys.exit(3)"
    )
    out: list[bytes] = []
    client: Client

    def on_output(name: str, data: bytes) -> None:
        out.append(data)
        if data == b"ready\n":
            client.signal(signal.SIGINT)

    client = Client(place.connect, place.request(script), stdin=None, on_output=on_output)
    assert client.run().code == 3
    assert b"".join(out) == b"ready\ninterrupted\n"


def test_a_client_that_dies_takes_its_command_along(place: Place) -> None:
    from fc_agent.channel import read_line, send_line

    request = place.request("print(os.getpid(), flush=True); signal.pause()")
    connection = place.connect()
    send_line(connection, {"open": vars(request)})
    _, rest = read_line(connection)
    while b"\n" not in rest.partition(b"{")[2].partition(b"}")[2]:  # behind the STARTED frame comes the pid
        rest += connection.recv(4096)
    pid = int(rest[rest.rindex(b"}") + 6 :])
    pidfd = os.pidfd_open(pid)
    connection.close()
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_a_killed_interpreter_is_replaced(place: Place) -> None:
    parent = int(place.run("print(os.getppid())")[1])
    os.kill(parent, signal.SIGKILL)
    assert place.commands._zygote is not None
    place.commands._zygote._process.wait()
    ended, out, _ = place.run("print(os.getppid())")
    assert ended.code == 0
    assert int(out) != parent


def test_new_code_gets_a_new_interpreter(place: Place, tmp_path: Path) -> None:
    assert place.run("pass")[0].code == 0
    before = place.commands._zygote
    assert before is not None
    newer = tmp_path / "newer"
    newer.symlink_to(place.code)
    place.code = newer
    assert place.run("pass")[0].code == 0
    assert place.commands._zygote is not before
    assert before._process.wait(60) == 0, "the older one ends when nobody needs it"


def test_what_a_command_imports_is_there_for_the_next(place: Place) -> None:
    script = "print('sched' in sys.modules); import sched"
    assert place.run(script)[1] == b"False\n"
    assert place.run(script)[1] == b"True\n"


def test_many_at_once(place: Place) -> None:
    results: list[int] = []

    def one(number: int) -> None:
        results.append(place.run(f"sys.exit({number})")[0].code)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(30))


def test_large_request(place: Place) -> None:
    script = "print(len(argv[0]))" + "#" * 1_000_000
    assert int(place.run(script)[1]) > 1_000_000


def test_missing_code_is_refused(place: Place) -> None:
    ended = stream(place.connect, Request(["/no/where"], target="fcvm"), stdin=None, on_output=lambda n, d: None)
    assert ended.code == 125
    assert ended.message is not None
    assert "/no/where" in ended.message


def test_other_targets_are_programs(place: Place) -> None:
    out: list[bytes] = []
    request = Request(["echo", "hello"], target="vm", cwd="/")
    with contextlib.ExitStack():
        assert stream(place.connect, request, stdin=None, on_output=lambda n, d: out.append(d)).code == 0
    assert b"".join(out) == b"hello\n"


def test_no_room_for_a_process_is_waited_out(monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([OSError(errno.EAGAIN, "no"), OSError(errno.ENOMEM, "no"), 77, *[OSError(errno.EAGAIN, "no")] * 99])

    def fork() -> int:
        result = next(results)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(zygote, "FORK_PAUSE", 0)
    monkeypatch.setattr(os, "fork", fork)
    assert zygote.fork() == 77
    with pytest.raises(OSError, match="no"):
        zygote.fork()


@pytest.mark.parametrize("pipes", [["stderr"], ["stdin"], ["stdout"], ["stdin", "stderr"], ["stdin", "stdout"], ["stdout", "stderr"]])
def test_what_is_no_terminal_here_is_none_there(place: Place, pipes: list[str]) -> None:
    script = """
print(*(name for fd, name in enumerate(("stdin", "stdout", "stderr")) if not os.isatty(fd)))
print("shown", file=sys.stderr)
if not os.isatty(0):
    print(sys.stdin.read())
os.open("/dev/tty", os.O_RDWR)
"""
    read, write = os.pipe()
    os.write(write, b"input")
    os.close(write)
    ended, out, err = place.run(script, stdin=read if "stdin" in pipes else None, tty=True, pipes=pipes)
    os.close(read)
    assert ended.code == 0, err
    assert b"\r" not in out + err, "the user's terminal is not raw"
    expected = " ".join(pipes).encode() + b"\n" + (b"input\n" if "stdin" in pipes else b"")
    if "stdout" in pipes or "stderr" in pipes:
        assert (out, err) == (expected, b"shown\n")
    else:
        assert sorted(out.splitlines()) == sorted([*expected.splitlines(), b"shown"])


def test_keys_for_a_command_whose_output_is_elsewhere(place: Place) -> None:
    """As in `run -it IMAGE sh >out 2>err`: their echo is not output."""
    read, write = os.pipe()
    os.write(write, b"keys\n")
    script = "print(os.isatty(0), os.isatty(1), os.get_terminal_size(0), sys.stdin.readline())"
    ended, out, err = place.run(script, stdin=read, tty=True, pipes=["stdout", "stderr"], rows=33, columns=99)
    os.close(read)
    os.close(write)
    assert (ended.code, err) == (0, b"")
    assert out == b"True False os.terminal_size(columns=99, lines=33) keys\n\n"
