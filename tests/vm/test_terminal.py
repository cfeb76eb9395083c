"""Commands on a terminal, or with only some of their streams on one."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.conftest import DEMO, FCVM, TIMEOUT, environment, ok, vm, wait


class Terminal:
    """A person's terminal."""

    def __init__(self) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(33, 77)
        self.output = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def start(self, *args: str, **streams: object) -> "subprocess.Popen[bytes]":
        """``fcvm ARGS`` with all streams here but those that are given."""
        return subprocess.Popen(
            [*FCVM, *args],
            **{"stdin": self.theirs, "stdout": self.theirs, "stderr": self.theirs, **streams},  # type: ignore[arg-type]
            env=environment({"FCVM_LOG": "warning"}),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(self.theirs, termios.TIOCSCTTY, 0),
        )

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + TIMEOUT
        while text not in self.output:
            assert select.select([self.ours], [], [], max(0, deadline - time.monotonic()))[0], self.output
            self.output += os.read(self.ours, 4096)

    def keys(self, text: bytes) -> None:
        os.write(self.ours, text)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    os.close(terminal.ours)
    os.close(terminal.theirs)


def test_what_is_a_terminal_has_marks_and_what_is_none_is_exact(terminal: Terminal, tmp_path: Path) -> None:
    script = "echo out; echo err >&2; test -t 1 || echo none; echo end"
    with open(tmp_path / "err", "wb") as err:
        process = terminal.start("podman", "run", DEMO, "--", "sh", "-c", script, stderr=err)
    terminal.until(b"[ctr:out] out\r\n[ctr:out] none\r\n[ctr:out] end\r\n")
    assert process.wait(TIMEOUT) == 0
    assert (tmp_path / "err").read_bytes() == b"err\n"
    with open(tmp_path / "out", "wb") as out:
        process = terminal.start("podman", "run", DEMO, "--", "sh", "-c", script, stdout=out)
    terminal.until(b"[ctr:err] err\r\n")
    assert process.wait(TIMEOUT) == 0
    assert (tmp_path / "out").read_bytes() == b"out\nnone\nend\n"


def test_keys_sizes_and_ctrl_c_though_stderr_is_a_file(terminal: Terminal, tmp_path: Path, vm_name: str) -> None:
    script = "trap 'stty size' WINCH; trap 'echo interrupted; exit 5' INT; stty size; read word; echo got $word; while :; do sleep 0.2; done"
    with open(tmp_path / "err", "wb") as err:
        process = terminal.start("podman", "run", "-it", "--name", vm_name, DEMO, "--", "sh", "-c", script, stderr=err)
    terminal.until(b"33 77")
    terminal.keys(b"word\r")
    terminal.until(b"got word")
    terminal.resize(20, 50)
    terminal.until(b"20 50")
    terminal.keys(b"\x03")
    terminal.until(b"interrupted")
    assert process.wait(TIMEOUT) == 5
    assert vm(vm_name) is None


def test_what_is_typed_beside_a_command_without_stdin_is_for_the_next(terminal: Terminal) -> None:
    process = terminal.start("podman", "run", DEMO, "--", "sh", "-c", "echo running; sleep 2")
    terminal.until(b"running")
    terminal.keys(b"next\r")
    assert process.wait(TIMEOUT) == 0
    assert os.read(terminal.theirs, 4096) == b"next\n"


def test_lines_and_their_end_without_a_terminal_in_the_container(terminal: Terminal) -> None:
    process = terminal.start("podman", "run", "-i", DEMO, "--", "cat")
    terminal.keys(b"wrongx\x7f\x15word\r")  # a line is edited here
    terminal.until(b"[ctr:out] word\r\n")
    assert termios.tcgetattr(terminal.theirs)[3] & termios.ICANON
    terminal.keys(b"\x04")
    assert process.wait(TIMEOUT) == 0


def test_keys_and_size_though_all_output_is_in_files(terminal: Terminal, tmp_path: Path) -> None:
    script = "trap 'exit 5' INT; stty size; read word; echo got $word; while :; do sleep 0.2; done"
    with open(tmp_path / "out", "wb") as out, open(tmp_path / "err", "wb") as err:
        process = terminal.start("podman", "run", "-it", DEMO, "--", "sh", "-c", script, stdout=out, stderr=err)
    wait(lambda: b"33 77" in (tmp_path / "out").read_bytes())
    terminal.keys(b"word\r")
    wait(lambda: b"got word" in (tmp_path / "out").read_bytes())
    terminal.keys(b"\x03")
    assert process.wait(TIMEOUT) == 5
    assert (tmp_path / "out").read_bytes() == b"33 77\r\nword\r\ngot word\r\n^C"
    assert (tmp_path / "err").read_bytes() == b""


def test_a_shell_is_interactive_by_itself_and_ctrl_c_ends_what_has_no_stdin(terminal: Terminal, vm_name: str) -> None:
    ok("podman", "run", "-d", "--name", vm_name, DEMO, "--", "sleep", "600")
    process = terminal.start("exec", vm_name, "sh")
    terminal.keys(b"echo $((6*7)); stty size; exit 9\r")
    terminal.until(b"42\r\n33 77")
    assert process.wait(TIMEOUT) == 9
    process = terminal.start("exec", "-t", vm_name, "--", "sh", "-c", "echo running; exec sleep 600")
    terminal.until(b"running")
    terminal.keys(b"\x03")
    assert process.wait(TIMEOUT) == 130
