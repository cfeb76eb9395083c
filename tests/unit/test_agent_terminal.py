"""The user's terminal: raw while a session runs, restored whatever ends it; and connections through Firecracker's vsock device."""

import contextlib
import os
import select
import signal
import socket
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fcvm.agent import terminal, vsock
from fcvm.errors import AgentError


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    master, line = os.openpty()
    yield master, line
    os.close(master)
    os.close(line)


def is_raw(line: int) -> bool:
    return not termios.tcgetattr(line)[tty.LFLAG] & termios.ICANON


def test_raw_and_back(pty: tuple[int, int]) -> None:
    before = termios.tcgetattr(pty[1])
    with terminal.raw(pty[1]):
        assert is_raw(pty[1])
    assert termios.tcgetattr(pty[1]) == before


def test_an_exception_restores(pty: tuple[int, int]) -> None:
    with pytest.raises(ZeroDivisionError), terminal.raw(pty[1]):
        raise ZeroDivisionError
    assert not is_raw(pty[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_deadly_signal_restores(pty: tuple[int, int], number: int) -> None:
    program = "import sys, signal\nfrom fcvm.agent import terminal\nwith terminal.raw(0):\n print('raw', flush=True)\n signal.pause()"
    read, write = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program],
        {**os.environ, "PYTHONPATH": ":".join(sys.path)},
        file_actions=[(os.POSIX_SPAWN_DUP2, pty[1], 0), (os.POSIX_SPAWN_DUP2, write, 1)],
    )
    os.close(write)
    assert os.read(read, 10).startswith(b"raw")
    assert is_raw(pty[1])
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
    assert not is_raw(pty[1])
    os.close(read)


def test_what_is_no_terminal_is_left_alone(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file, terminal.raw(file.fileno()):
        assert terminal.size(file.fileno()) == (24, 80)


def test_size(pty: tuple[int, int]) -> None:
    termios.tcsetwinsize(pty[1], (33, 111))
    assert terminal.size(pty[1]) == (33, 111)


def test_a_session_on_a_real_terminal(tmp_path: Path) -> None:
    """Keys, sizes and Ctrl-C of a user's terminal reach the remote one; afterwards it is as before."""
    program = """
import os, socket, sys, threading
from fc_agent import process, session as server
from fcvm.agent.session import FORWARDED, Request, stream, to_descriptors
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()
threading.Thread(target=server.serve, args=(listener,), kwargs=dict(launcher=process.launch, default_grace=0), daemon=True).start()
def connect():
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); return s
script = "stty size; trap 'stty size' WINCH; trap 'echo interrupted; exit 7' INT; echo ready; while :; do sleep 0.05; done"
request = Request(["/bin/sh", "-c", script], target="vm", tty=True, stdin=True)
e = stream(connect, request, stdin=0, on_output=to_descriptors(1, 2), terminal=0, signals=FORWARDED)
sys.exit(e.code)
"""
    pid, master = os.forkpty()
    if pid == 0:
        os.environ["PYTHONPATH"] = ":".join(sys.path)
        os.execv(sys.executable, [sys.executable, "-c", program, str(tmp_path / "s")])
    seen = bytearray()

    def until(text: bytes) -> None:
        while text not in seen:
            assert select.select([master], [], [], 60)[0], bytes(seen)
            seen.extend(os.read(master, 4096))

    until(b"ready")
    assert is_raw(master)
    termios.tcsetwinsize(master, (44, 99))
    os.kill(pid, signal.SIGWINCH)
    until(b"44 99")
    os.write(master, b"\x03")
    until(b"interrupted")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    os.close(master)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A vsock device whose connections are answered by a function each."""
    path = tmp_path / "vsock.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    threads = []

    def start(*answers: Callable[[socket.socket], None]) -> Path:
        def body() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    answer(connection)

        threads.append(threading.Thread(target=body))
        threads[0].start()
        return path

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def test_vsock_connects(device: Callable[..., Path]) -> None:
    def answer(connection: socket.socket) -> None:
        assert connection.recv(100) == b"CONNECT 4998\n"
        connection.sendall(b"OK 1073741824\nhello")

    with contextlib.closing(vsock.connect(device(answer), 4998, 30)) as connection:
        assert connection.gettimeout() is None
        assert connection.recv(100) == b"hello"


def test_vsock_with_nobody_listening(device: Callable[..., Path]) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(100)

    with pytest.raises(AgentError, match="Nobody listens"):
        vsock.connect(device(answer), 4998, 30)


def test_vsock_of_a_guest_that_accepts_too_late_is_asked_again(
    device: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Firecracker closes a connection that a busy guest has not accepted within two seconds."""
    monkeypatch.setattr(vsock, "REQUEST_TIME", 0.1)

    def late(connection: socket.socket) -> None:
        connection.recv(100)
        threading.Event().wait(0.1)

    def answer(connection: socket.socket) -> None:
        assert connection.recv(100) == b"CONNECT 4998\n"
        connection.sendall(b"OK 1073741824\n")

    vsock.connect(device(late, late, answer), 4998, 30).close()


def test_vsock_that_never_answers(device: Callable[..., Path]) -> None:
    done = threading.Event()
    path = device(lambda connection: bool(done.wait(60)))  # type: ignore[arg-type,return-value]
    with pytest.raises(AgentError, match="did not answer"):
        vsock.connect(path, 4998, 0.1)
    done.set()


def test_vsock_that_talks_nonsense(device: Callable[..., Path]) -> None:
    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(b"x" * 1000)

    with pytest.raises(AgentError):
        vsock.connect(device(answer), 4998, 30)


def test_vsock_of_a_vm_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        vsock.connect(tmp_path / "none", 4998, 1)
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(stale))
    with pytest.raises(ConnectionRefusedError):
        vsock.connect(stale, 4998, 1)


def test_vsock_at_a_long_path(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    with pytest.raises(FileNotFoundError):
        vsock.connect(directory / "vsock.sock", 4998, 1)
