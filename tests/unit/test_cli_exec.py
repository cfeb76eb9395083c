"""`fcvm exec`: what is written simply is read without argparse, and asked for before the rest is imported."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import start
from fc_agent import channel as wire
from fcvm import config, host, process
from fcvm.cli import exec as command
from fcvm.cli import main
from fcvm.cli.context import Arguments, Context
from fcvm.cli.parser import build
from fcvm.errors import FcvmError
from fcvm.storage.layout import Layout
from fcvm.vm import paths, state

WORDS = ["web", "sh", "--", "-", "", "--vm", "-it", "-i", "-t", "-ti", "--tty", "--interactive", "--privileged", "--name", "--pid", "-e", "-eA=1", "--env=A=1", "-h", "-c", "x y"]
CONTEXT = Context(config.load({"base_dir": "/nonexistent"}, env={"FCVM_CONFIG": "/nonexistent"}))


def prepared(args: argparse.Namespace | Arguments) -> dict[str, object]:
    """What ``prepare`` makes of them."""
    command.prepare(args, CONTEXT)  # type: ignore[arg-type] # they have the same attributes
    return vars(args)


@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_a_plain_command_line_is_read_as_argparse_reads_it(words: list[str]) -> None:
    argv = ["exec", *words]
    plain = command.plain(argv)
    if plain is not None:
        try:
            found = prepared(plain)
        except FcvmError as error:
            with pytest.raises(type(error), match=error.message):
                prepared(build("exec").parse_args(argv))
        else:
            assert found == prepared(build("exec").parse_args(argv))


@pytest.mark.parametrize(
    ("words", "is_plain"),
    [
        ("web ls -l", True), ("web -- ls -l", True), ("--vm web ls", True), ("-i --privileged web sh -c x", True),
        ("", False), ("web", False), ("web --", False), ("--help", False), ("web --vm -- ls", False), ("web -- -x", False),
        ("-e A=1 web ls", False), ("--name web -- ls", False), ("--vm", False),
    ],
)  # fmt: skip
def test_what_is_plain(words: str, is_plain: bool) -> None:
    assert (command.plain(["exec", *words.split()]) is not None) == is_plain


def test_what_a_command_line_does_not_say_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = Arguments(a=1).nothing


def test_whether_there_is_kvm_is_not_asked_for_a_vm_that_lives_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(host, "uses_machine", lambda _: asked.append(True))
    monkeypatch.setenv("FCVM_BASE_DIR", str(tmp_path))
    layout = Layout(tmp_path)
    assert main.main(["exec", "web", "true"]) == 125  # there is none
    entry = state.register(layout, state.Record(start.ID, "web", os.getpid(), "running", "healthy", "image", 0.0, 1, 512))
    assert len(asked) == 1
    (layout.vms / start.ID).mkdir()
    start.serve(layout.vms / start.ID / paths.VSOCK, start.guest)
    assert main.main(["exec", "web", "true"]) == 0
    assert len(asked) == 1
    monkeypatch.setenv("FCVM_MACHINE", "always")
    assert main.main(["exec", "web", "true"]) == 0
    assert len(asked) == 2  # those in the machine may have the same names
    entry.close()


SOURCES = str(Path(__file__).parents[2] / "src")
PROGRAM = """
import os, signal, sys
sys.path.insert(0, {sources!r})
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "fcvm.agent.session":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from fcvm.cli.main import entry
sys.argv = ["fcvm", "exec", "web", "true"]
entry()
"""


def take_request(connection: socket.socket) -> None:
    """Do Firecracker's part of the connection, and read what the client wants."""
    while not connection.recv(1).endswith(b"\n"):  # CONNECT
        pass
    connection.sendall(b"OK 1\n")
    wire.read_line(connection)


def test_a_signal_that_comes_before_it_can_be_passed_on_is_passed_on(tmp_path: Path) -> None:
    """By then the guest was told to start the process."""
    layout = Layout(tmp_path)
    entry = state.register(layout, state.Record(start.ID, "web", os.getpid(), "running", "healthy", "image", 0.0, 1, 512))
    (layout.vms / start.ID).mkdir()
    heard: list[bytes] = []

    def guest(connection: socket.socket) -> None:
        take_request(connection)
        wire.send_line(connection, {"session": "1", "received": 0})
        heard.append(connection.recv(wire.HEADER.size + 1, socket.MSG_WAITALL))
        end = b'{"code": 77}'
        connection.sendall(wire.HEADER.pack(wire.EXIT, len(end)) + end)
        while connection.recv(65536):
            pass

    start.serve(layout.vms / start.ID / paths.VSOCK, guest)
    env = {**process.environment(), "FCVM_BASE_DIR": str(layout.base), "FCVM_MACHINE": "never"}
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(sources=SOURCES)], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (77, "")
    assert heard == [wire.HEADER.pack(wire.SIGNAL, 1) + bytes((signal.SIGINT,))]
    entry.close()


@pytest.mark.parametrize("waiting", ["import atexit; atexit.register(print, 'last')", "import threading; threading.Timer(0.1, print, ['last']).start()"])
def test_who_waits_for_the_end_is_called(tmp_path: Path, waiting: str) -> None:
    program = f"{waiting}\nimport sys\nfrom fcvm.cli import main\nsys.argv = ['fcvm', 'exec', 'web', 'true']\nmain.entry()"
    env = {**process.environment(), "FCVM_BASE_DIR": str(tmp_path), "FCVM_MACHINE": "never", "PYTHONPATH": SOURCES}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (125, "last\n")  # there is no such VM


def test_a_guest_that_starts_a_process_is_not_interrupted_by_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it has started is acknowledged with what comes next."""
    heard: list[bytes] = []

    def guest(connection: socket.socket) -> None:
        take_request(connection)
        started = b'{"pid": 1}'
        connection.sendall(wire.line({"session": "1", "received": 0}) + wire.HEADER.pack(wire.STARTED, len(started)) + started)
        time.sleep(0.3)  # for what ought not to come
        end = b'{"code": 0}'
        connection.sendall(wire.HEADER.pack(wire.EXIT, len(end)) + end)
        while data := connection.recv(65536):
            heard.append(data)
        ended.set()

    ended = threading.Event()
    monkeypatch.setenv("FCVM_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("FCVM_MACHINE", "never")
    layout = Layout(tmp_path)
    entry = state.register(layout, state.Record(start.ID, "web", os.getpid(), "running", "healthy", "image", 0.0, 1, 512))
    (layout.vms / start.ID).mkdir()
    start.serve(layout.vms / start.ID / paths.VSOCK, guest)
    assert main.main(["exec", "web", "true"]) == 0
    assert ended.wait(60)
    assert b"".join(heard) == wire.HEADER.pack(wire.ACK, wire.COUNT.size) + wire.COUNT.pack(2)
    entry.close()
