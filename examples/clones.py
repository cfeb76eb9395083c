"""What the demonstrations of clones share: a snapshot of a healthy nginx, and a clone server for it.

They use nothing but fcvm's commands, so they work with and without a machine in between.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FCVM = [sys.executable, "-m", "fcvm"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
IMAGE = "localhost/fcvm-nginx"
PATIENCE = 600.0  # seconds; under emulation on a busy host everything takes its time


def fcvm(*words: str) -> str:
    """What ``fcvm WORDS`` prints; raises CalledProcessError."""
    command = [*FCVM, *words]
    return subprocess.run(
        command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def vms() -> list[dict[str, Any]]:
    """``fcvm ls --json``."""
    found: list[dict[str, Any]] = json.loads(fcvm("ls", "--json"))
    return found


@contextlib.contextmanager
def running(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """``fcvm WORDS`` in the background, ended by SIGTERM."""
    with subprocess.Popen(
        [*FCVM, *words], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()


def line(process: "subprocess.Popen[str]") -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    text = process.stdout.readline()
    if not text:
        raise RuntimeError(f"{process.args} ended with {process.wait()}")
    return text.strip()


@contextlib.contextmanager
def snapshot(tag: str | None, mem: str) -> Iterator[str]:
    """The snapshot ``tag``; None: one of an nginx that answers, removed at the end."""
    if tag is not None:
        yield tag
        return
    subprocess.run(
        [sys.executable, str(ROOT / "examples/build"), "nginx"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True
    )
    name = f"demo-{secrets.token_hex(4)}"
    fcvm("podman", "run", "-d", "--name", name, "--mem", mem, IMAGE)
    try:
        deadline = time.monotonic() + PATIENCE
        while next(vm["health"] for vm in vms() if vm["name"] == name) != "healthy":
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not healthy")
            time.sleep(0.5)
        fcvm("snapshot", "create", name, "--tag", name)
    finally:
        fcvm("stop", name)
    try:
        yield name
    finally:
        fcvm("snapshots", "rm", name)


@contextlib.contextmanager
def server(tag: str, ready: int) -> Iterator[str]:
    """A clone server that keeps ``ready`` clones loaded; its pid."""
    with running("snapshot", "serve", tag, "--pool", str(ready)) as process:
        yield line(process)


@contextlib.contextmanager
def fleet(pid: str, count: int, *options: str) -> Iterator[list[str]]:
    """``count`` clones in one call; their names, once they run."""
    name = f"demo-{secrets.token_hex(4)}"
    with running("snapshot", "run", "--pid", pid, "--count", str(count), "--name", name, *options) as process:
        yield [line(process) for _ in range(count)]


def fetch(url: str) -> str:
    """The page at ``url``; asked again while nobody answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return str(answer.read().decode())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


WHERE_VMS_ARE = """
import glob, re
def field(path, name):
    return int(re.search(name + r":\\s+(\\d+) kB", open(path).read())[1])
sizes = []
for comm in glob.glob("/proc/[0-9]*/comm"):
    try:
        if open(comm).read() == "firecracker\\n":
            sizes.append(field(comm.replace("comm", "smaps_rollup"), "Pss"))
    except (OSError, TypeError):
        pass
print(len(sizes), sum(sizes), field("/proc/meminfo", "MemAvailable"))
"""


def memory() -> tuple[int, int, int]:
    """Of the host that the VMs run on: Firecrackers, the sum of their proportional set sizes, MemAvailable; in KiB.

    The proportional set size (proc_pid_smaps(5)) counts a page that N processes share as 1/N of a page in each.
    """
    in_machine = json.loads(fcvm("machine", "status", "--json"))["state"] == "running"
    if in_machine:  # no KVM here
        answer = fcvm("machine", "ssh", "--", "python3", "-c", WHERE_VMS_ARE)
    else:
        answer = subprocess.run(
            [sys.executable, "-c", WHERE_VMS_ARE], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    count, pss, available = map(int, answer.split())
    return count, pss, available
