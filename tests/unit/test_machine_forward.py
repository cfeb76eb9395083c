"""Forwarding a command to the machine: what is needed of setup for it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fcvm import config
from fcvm.agent.session import Exit, Request
from fcvm.config import Config
from fcvm.errors import SetupError
from fcvm.machine import forward, machine, state, sync
from fcvm.machine.state import Places, State
from fcvm.machine.sync import Plan

ENVELOPE = {"args": {"fcvm_command": "ls"}, "settings": {}}


@pytest.fixture
def after_an_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, list[Plan], list[Request]]:
    """A data directory without assets for this fcvm, what is given to its machine, and what is run there."""
    settings = config.load({"base_dir": str(tmp_path / "base")}, env={"FCVM_CONFIG": str(tmp_path / "none.toml")})
    given: list[Plan] = []
    run: list[Request] = []

    def receive(places: Places, wanted: Plan, user: str | None, note: Callable[[str], None]) -> None:
        given.append(wanted)

    def carry_out(places: Places, request: Request) -> Exit:
        run.append(request)
        return Exit(0)

    def missing(*_: object) -> None:
        raise SetupError("fcvm is not set up: the initrd of this version is missing.", hint="fcvm setup")

    monkeypatch.setattr(machine, "sync", receive)
    monkeypatch.setattr(forward, "run", carry_out)
    monkeypatch.setattr(forward, "find", missing)
    return settings, given, run


def test_after_an_upgrade_vms_that_run_are_listed_without_setup(
    after_an_upgrade: tuple[Config, list[Plan], list[Request]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, given, run = after_an_upgrade
    monkeypatch.setattr(state, "read", lambda places: State("running"))
    assert forward.forward(ENVELOPE, settings, needs_assets=False) == 0
    assert [plan.files for plan in given] == [()]
    assert run[0].argv[0] == str(sync.BASE / "code" / sync.code_key())
    assert run[0].env["FCVM_ASSETS"] == os.devnull  # so that nothing is started from what another version has made
    with pytest.raises(SetupError):
        forward.forward(ENVELOPE, settings)


def test_without_a_machine_that_runs_setup_comes_first(after_an_upgrade: tuple[Config, list[Plan], list[Request]]) -> None:
    settings, given, run = after_an_upgrade
    with pytest.raises(SetupError):
        forward.forward(ENVELOPE, settings, needs_assets=False)
    assert given == run == []


@pytest.mark.parametrize(
    ("terminals", "args", "tty", "stdin", "pipes"),
    [
        ((0, 1, 2), {}, True, False, ["stdin"]),  # what is typed is for the shell that runs us, and Ctrl-Z stops us
        ((0, 1, 2), {"tty": True}, True, False, []),
        ((0, 1, 2), {"interactive": True}, True, True, ["stdin"]),
        ((0, 1, 2), {"interactive": True, "tty": True}, True, True, []),
        ((0, 1), {"interactive": True, "tty": True}, True, True, ["stderr"]),
        ((1, 2), {"interactive": True}, True, True, ["stdin"]),
        ((0,), {"interactive": True, "tty": True}, True, True, ["stdout", "stderr"]),
        ((0,), {"interactive": True}, False, True, ["stdin", "stdout", "stderr"]),
        ((), {}, False, False, ["stdin", "stdout", "stderr"]),
    ],
)
def test_a_command_has_the_terminals_that_it_has_here(
    after_an_upgrade: tuple[Config, list[Plan], list[Request]], monkeypatch: pytest.MonkeyPatch,
    terminals: tuple[int, ...], args: dict[str, bool], tty: bool, stdin: bool, pipes: list[str],
) -> None:  # fmt: skip
    settings, _, run = after_an_upgrade
    monkeypatch.setattr(state, "read", lambda places: State("running"))
    monkeypatch.setattr(forward.os, "isatty", terminals.__contains__)
    forward.forward({**ENVELOPE, "args": args}, settings, needs_assets=False)
    assert (run[0].tty, run[0].stdin, run[0].pipes) == (tty, stdin, pipes)


@pytest.mark.parametrize(
    ("tty", "pipes", "terminal"), [(True, [], 0), (True, ["stdin"], 1), (True, ["stdin", "stdout"], 2), (False, [], None)]
)
def test_keys_are_raw_only_where_the_command_has_them_from_a_terminal(
    tty: bool, pipes: list[str], terminal: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session makes its terminal raw if that is its stdin."""
    given: dict[str, object] = {}
    monkeypatch.setattr(forward, "stream", lambda *_, **options: given.update(options))
    forward.run(Places.of(tmp_path), Request([], tty=tty, stdin=True, pipes=pipes))
    assert (given["terminal"], given["stdin"]) == (terminal, 0)
