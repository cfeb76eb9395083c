"""What the fast commands import: docs/architecture.md, "What a start costs". Counted, not timed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench import start
from fcvm import config, process
from fcvm.storage.layout import Layout

HEAVY = {
    "asyncio", "ctypes", "dataclasses", "hashlib", "inspect", "locale", "logging", "pathlib", "random", "rich", "shutil", "subprocess", "tempfile",
    "threading", "tomllib", "traceback", "typing",
}  # fmt: skip
NOT_FOR_EXEC = {"argparse", "collections", "contextlib", "enum", "functools", "json", "re", "signal", "socket", "textwrap", "types", "fcvm.linux"}
NO_CONNECTION = {"fc_agent.channel", "fcvm.agent", "select", "signal", "socket"}

PROBE = """
import sys
from fcvm.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that find a VM, a clone server and a machine that answer at once."""
    layout = Layout(tmp_path_factory.mktemp("base"))
    sources = str(Path(__file__).parents[2] / "src")
    env = {**process.environment(), "FCVM_BASE_DIR": str(layout.base), "FCVM_MACHINE": "never", "PYTHONPATH": sources}
    start.pretend(layout)
    with start.pretended_machine(layout, config.load(env=env)):
        yield env


def imported(env: dict[str, str], *words: str) -> set[str]:
    """The modules that a command ends with."""
    localised = {**env, "LANG": "C.UTF-8"}  # argparse would look for translations then
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], env=localised, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("words", "others"),
    [
        (["--help"], NO_CONNECTION | {"contextlib", "fcvm.config", "json"}),
        (["ls"], NO_CONNECTION | {"textwrap"}),
        (["exec", "vm", "--", "true"], NOT_FOR_EXEC),
        (["snapshot", "run", "--pid", str(os.getpid()), "--exec", "true"], {"textwrap"}),
    ],
)
def test_a_fast_command_imports_nothing_heavy(env: dict[str, str], words: list[str], others: set[str]) -> None:
    assert imported(env, *words) & (HEAVY | others) == set()


def test_a_forwarded_command_needs_nothing_of_a_machine_that_runs_already(env: dict[str, str]) -> None:
    found = imported({**env, "FCVM_MACHINE": "always"}, "ls")
    assert found & (HEAVY - {"hashlib", "pathlib"}) == set()
    assert {name for name in found if name.startswith("fcvm.machine.")} == {f"fcvm.machine.{name}" for name in ("forward", "state", "sync")}


def test_what_runs_until_firecracker_starts_imports_nothing_heavy() -> None:
    """The modules of `podman run` and of a clone without a server, those of both networks included."""
    modules = "fcvm.cli.podman fcvm.images.resolve fcvm.nested.profile fcvm.network.bridged fcvm.network.rootless fcvm.snapshots.direct fcvm.vm.run"
    program = f"import {', '.join(['sys', *modules.split()])}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    needed = {"ctypes", "hashlib", "locale", "pathlib", "subprocess", "threading"}
    assert set(done.stdout.split()) & (HEAVY - needed | {"datetime", "platform", "secrets", "tokenize"}) == set()
