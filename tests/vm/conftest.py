"""Real guests, through the command as a user runs it: directly on a host with KVM, in the machine elsewhere.

Every test names its VMs by ``vm_name`` and leaves none behind; the session checks that at its end.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fcvm import config, host

ROOT = Path(__file__).parents[2]
FCVM = [sys.executable, "-m", "fcvm"]
TIMEOUT = 300  # seconds for one command; under emulation beside other work a cold start takes up to a minute
DEMO = "localhost/fcvm-demo"


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1", **(extra or {})}


def fcvm(
    *args: str, input: bytes | None = None, env: dict[str, str] | None = None, timeout: float = TIMEOUT
) -> subprocess.CompletedProcess[bytes]:
    """Run ``fcvm ARGS`` to its end; stdin is empty unless ``input`` is given."""
    return subprocess.run(
        [*FCVM, *args],
        input=b"" if input is None else input,
        capture_output=True,
        env=environment(env),
        timeout=timeout,
        check=False,
    )


def ok(*args: str, **options: Any) -> bytes:
    """Run ``fcvm ARGS``, which must succeed, and return its stdout."""
    done = fcvm(*args, **options)
    assert done.returncode == 0, f"fcvm {' '.join(args)}: {done.returncode}\n{done.stdout!r}\n{done.stderr.decode()}"
    return done.stdout


def ls(*args: str) -> list[dict[str, Any]]:
    """``fcvm ls --json``."""
    found: list[dict[str, Any]] = json.loads(ok("ls", "--json", *args))
    return found


def vm(name: str) -> dict[str, Any] | None:
    """What ``ls --all`` says of one VM; None if there is none of this name."""
    return next((found for found in ls("--all") if found["name"] == name), None)


def where_vms_are(*command: str) -> list[str]:
    """The words that run ``command`` where the VMs are."""
    return [*FCVM, "machine", "ssh", "--", *command] if host.uses_machine(config.load()) else list(command)


def wait(condition: Callable[[], object]) -> None:
    """Until it is true; what it looks at has nothing that could be waited for."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line that it prints; what it said on stderr if there is none."""
    assert process.stdout is not None
    text = process.stdout.readline()
    if not text:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read().decode())
    return text.strip()


def running(*args: str, **options: Any) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """A ``fcvm ARGS`` in the background; ended at the end if it still runs."""
    return started([*FCVM, *args], **options)


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A command in the background, with stdin empty unless ``options`` say otherwise; ended at the end if it still runs."""
    with subprocess.Popen(
        command,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        **options,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.communicate(timeout=TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()


@pytest.fixture
def vm_name() -> Iterator[str]:
    """A name for one VM of this test, which is stopped and removed at the end whatever happened."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    found = vm(name)
    if found is not None:
        fcvm("stop", "-t", "0", name)
        fcvm("rm", name)


@pytest.fixture
def detached(vm_name: str) -> Callable[..., str]:
    """Start a container in the background: ``detached("sleep", "600", options=["--cpu", "1"])``; returns the VM's name."""

    def start(*command: str, options: Sequence[str] = (), image: str = DEMO) -> str:
        ok("podman", "run", "-d", "--name", vm_name, *options, image, "--", *command)
        return vm_name

    return start


@pytest.fixture(scope="session", autouse=True)
def demo_image() -> Iterator[None]:
    """The demo image under its name; and at the end of all tests none of their VMs is left."""
    subprocess.run([sys.executable, str(ROOT / "examples/build"), "demo"], check=True, env=environment(), timeout=TIMEOUT)
    ok("ls")  # starts the machine, where there is one, so that no test's stderr tells of it
    yield
    left = [found["name"] for found in ls("--all") if found["name"].startswith("test-")]
    assert left == []
