"""`fcvm exec`: commands in the container and in the guest OS."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vm.conftest import DEMO, FCVM, environment, fcvm, ok, running


@pytest.fixture(scope="module")
def box() -> Iterator[str]:
    """One container for all tests here."""
    name = f"test-exec-{os.getpid()}"
    ok("podman", "run", "-d", "--name", name, "--env", "FROM=container", DEMO, "--", "sleep", "3600")
    yield name
    fcvm("stop", "-t", "0", name)


def test_in_the_container_with_its_environment(box: str) -> None:
    assert ok("exec", box, "--", "sh", "-c", 'echo "$FROM $EXTRA"', "x") == b"container \n"
    assert ok("exec", "--env", "EXTRA=1", "--name", box, "--", "sh", "-c", 'echo "$FROM $EXTRA"') == b"container 1\n"


def test_in_the_guest_os(box: str) -> None:
    assert b"Debian" in ok("exec", box, "--vm", "--", "cat", "/etc/os-release")
    assert b"Debian" not in ok("exec", box, "--", "sh", "-c", "cat /etc/os-release; true")


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137), ("kill -INT $$", 130)])
def test_exit_codes(box: str, command: str, code: int) -> None:
    assert fcvm("exec", box, "--", "sh", "-c", command).returncode == code


def test_what_cannot_run(box: str) -> None:
    assert fcvm("exec", box, "--", "/no/such").returncode == 127
    assert fcvm("exec", box, "--", "/etc/passwd").returncode == 126
    gone = fcvm("exec", "nobody", "--", "true")
    assert (gone.returncode, b"fcvm ls" in gone.stderr) == (125, True)


def test_streams_apart_and_exact(box: str) -> None:
    done = fcvm("exec", box, "--", "sh", "-c", r"printf '\000\377'; printf e >&2")
    assert (done.stdout, done.stderr) == (b"\0\xff", b"e")


def test_stdin_passes_and_ends(box: str) -> None:
    data = os.urandom(500_000)
    assert ok("exec", "-i", box, "--", "sha256sum", input=data).split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_user_and_workdir(box: str) -> None:
    assert ok("exec", "-u", "1000", "-w", "/tmp", box, "--", "sh", "-c", "id -u; pwd") == b"1000\n/tmp\n"


def test_signals_reach_the_command(box: str) -> None:
    script = 'trap "echo got; exit 4" TERM; echo ready; while :; do sleep 0.1; done'
    with running("exec", box, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"got\n"
        assert process.wait(120) == 4


def test_a_terminal_and_its_size(box: str) -> None:
    command = " ".join([*FCVM, "exec", "-it", box, "--", "stty", "size"])
    done = subprocess.run(
        ["script", "-qec", f"stty rows 31 cols 99; {command}", "/dev/null"],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert b"31 99" in done.stdout


@pytest.mark.timeout(1000)
def test_many_at_once(box: str) -> None:
    def say(number: int) -> tuple[int, bytes, bytes]:
        done = fcvm("exec", box, "--", "sh", "-c", f"echo out {number}; echo err {number} >&2; exit {number}", timeout=900)
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(say, range(100)))
    assert found == [(number, b"out %d\n" % number, b"err %d\n" % number) for number in range(100)]
