"""`fcvm machine` and what any forwarded command relies on, through the command line: terminal, streams, signals, death."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest
from conftest import FCVM, TIMEOUT, environment, fcvm, ok, running

from fcvm import config, host

pytestmark = pytest.mark.skipif(not host.uses_machine(config.load()), reason="VMs run on this host itself: there is no machine")


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    ok("machine", "start")


def in_machine(*words: str, input: bytes | None = None) -> bytes:
    return ok("machine", "ssh", "--", *words, input=input)


def test_status() -> None:
    status = json.loads(ok("machine", "status", "--json"))
    assert status["schema"] == 1
    assert status["state"] == "running"
    assert status["cpus"] >= 1
    assert 0 < status["memory_used_mib"] <= status["memory_mib"] * 1.5
    assert 0 < status["disk_used_mib"] < status["disk_mib"]
    os.kill(status["pid"], 0)
    os.kill(status["qemu_pid"], 0)
    assert b"running" in ok("machine", "status")


def test_start_of_a_running_machine_does_nothing() -> None:
    before = json.loads(ok("machine", "status", "--json"))["pid"]
    ok("machine", "start")
    assert json.loads(ok("machine", "status", "--json"))["pid"] == before


def test_no_program_runs_on_the_first_cpu() -> None:
    """Guests go astray there: see docs/machine.md."""
    cpus = json.loads(ok("machine", "status", "--json"))["cpus"]
    show = "if grep -q ^VmSize $status; then grep Cpus_allowed_list $status; fi"  # threads of the kernel have no memory
    allowed = in_machine(f"for status in /proc/[0-9]*/task/*/status; do {show}; done")
    expected = "1" if cpus == 1 else f"1-{cpus}"
    assert {line.split()[-1] for line in allowed.decode().splitlines()} == {expected}


def test_words_and_lines() -> None:
    assert in_machine("printf", "%s|", "a b", "$HOME", "'") == b"a b|$HOME|'|"
    assert in_machine("echo one; echo two") == b"one\ntwo\n"


def test_exit_codes_streams_and_binary_input() -> None:
    data = bytes(range(256)) * 4000
    assert in_machine("cat", input=data) == data
    done = fcvm("machine", "ssh", "--", "echo out; echo err >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, b"out\n", b"err\n")
    assert fcvm("machine", "ssh", "--", "no-such-program", "x").returncode == 127


def test_terminal() -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, True)
    process = subprocess.Popen(
        [*FCVM, "machine", "ssh", "--", "stty size; tty; read line; echo got-$line; exec sleep 1000"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    output = b""

    def until(text: bytes) -> None:
        nonlocal output
        deadline = time.monotonic() + TIMEOUT
        while text not in output:
            assert select.select([ours], [], [], deadline - time.monotonic())[0], output
            output += os.read(ours, 4096)

    try:
        until(b"/dev/pts/")
        os.write(ours, b"hello\r")
        until(b"got-hello")
        os.write(ours, b"\x03")
        assert process.wait(TIMEOUT) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 43)])
def test_signals_reach_the_command(number: signal.Signals, code: int) -> None:
    line = "trap 'exit 42' TERM; trap 'exit 43' INT; echo ready; while :; do sleep 0.1; done"
    with running("machine", "ssh", "--", line) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(TIMEOUT) == code


def test_killed_locally_it_ends_there_too() -> None:
    with running("machine", "ssh", "--", "echo $$; exec sleep 1000") as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
        process.wait()
    program = f"import os, select\ntry: f = os.pidfd_open({pid})\nexcept ProcessLookupError: print(True)\n"
    assert in_machine("python3", "-c", f"{program}else: print(bool(select.select([f], [], [], 60)[0]))") == b"True\n"


def test_files_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from the host")
    assert in_machine("cat", f"/host{tmp_path}/file") == b"from the host"
    in_machine("cp", f"/host{tmp_path}/file", f"/host{tmp_path}/copy")
    assert (tmp_path / "copy").read_text() == "from the host"


def test_errors_of_a_forwarded_command_look_like_ours() -> None:
    done = fcvm("exec", "no-such-vm", "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith(b"error: ")
    assert done.stdout == b""


def test_reader_that_goes_away() -> None:
    script = f"{' '.join(FCVM)} machine ssh -- yes | head -1"
    done = subprocess.run(["sh", "-c", script], capture_output=True, env=environment(), timeout=TIMEOUT, check=False)
    assert done.stdout == b"y\n"
    assert b"Traceback" not in done.stderr


def test_twenty_commands_at_once() -> None:
    processes = [
        subprocess.Popen(
            [*FCVM, "machine", "ssh", "--", f"echo {number}; exit {number}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment(),
        )
        for number in range(20)
    ]
    for number, process in enumerate(processes):
        out, _ = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out) == (number, b"%d\n" % number)
