"""The command's face: help, errors, exit codes."""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_snapshots_store import make

from fcvm import config
from fcvm.cli.context import Context
from fcvm.cli.main import COMMANDS, load, requested
from fcvm.cli.parser import build
from fcvm.errors import NotFoundError
from fcvm.linux import sockets
from fcvm.storage.layout import Layout
from fcvm.vm import rpc, state
from fcvm.vm.state import Record, write

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "FCVM_MACHINE": "never"}


def fcvm(*args: str, base: Path | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | ({"FCVM_BASE_DIR": str(base)} if base else {}) | (env or {})
    return subprocess.run(
        [sys.executable, "-m", "fcvm", *args], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def test_without_a_command_it_lists_all() -> None:
    done = fcvm()
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n    {name} " in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    words = [name, "run", "--help"] if name == "podman" else [name, "--help"]
    done = fcvm(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: fcvm {name}")
    assert "==SUPPRESS==" not in done.stdout


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_says_where_it_runs(name: str) -> None:
    assert load(COMMANDS[name][0]).WHERE in ("here", "vms", "anywhere")


def test_global_options_may_stand_before_the_command() -> None:
    assert requested(["--log", "debug", "ls", "--json"]) == "ls"
    assert requested(["--log=debug", "ls"]) == "ls"
    assert requested(["--version"]) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense"], "nonsense"),
        (["ls", "--nonsense"], "--nonsense"),
        (["podman", "run"], "No image is named"),
        (["podman", "run", "--cpu", "0", "x"], "--cpu"),
        (["podman", "run", "--cpu", "99", "x"], "1 to 32 CPUs"),
        (["podman", "run", "--mem", "1m", "x"], "128 MiB"),
        (["podman", "run", "--mem", "lots", "x"], "--mem"),
        (["podman", "run", "--name", "a b", "x"], "cannot name a VM"),
        (["podman", "run", "--env", "=1", "x"], "--env"),
        (["podman", "run", "--env-file", "/no/such", "x"], "/no/such"),
        (["podman", "run", "--kernel", "/no/such", "x"], "/no/such"),
        (["podman", "run", "--kernel", "/etc/passwd", "x"], "not an uncompressed kernel"),
        (["podman", "run", "--nonsense", "x"], "--nonsense"),
        (["podman", "run", "--label", "=value", "x"], "--label"),
        (["podman", "run", "--stop-timeout", "-1", "x"], "--stop-timeout"),
        (["podman", "run", "--pull", "sometimes", "x"], "--pull"),
        (["podman", "run", "--cmd", "echo 'open", "x"], "--cmd"),
        (["podman", "run", "--scratch-size", "none", "x"], "--scratch-size"),
        (["podman", "run", "--publish", "a:b", "x"], "--publish"),
        (["podman", "run", "--network", "moon", "x"], "moon"),
        (["podman", "run", "--health-check", "localhost", "x"], "--health-check"),
        (["podman", "run", "--health-check", "http://[::1", "x"], "--health-check"),
        (["podman", "run", "--health-check", "http://localhost:80000/", "x"], "--health-check"),
        (["podman", "run", "--health-check", "http:///up", "x"], "--health-check"),
        (["podman", "run", "--cmd", "a", "x", "--", "b"], "given twice"),
        (["podman", "run", "-d", "-i", "x"], "stdin"),
        (["podman", "run", "-d", "--timings", "x"], "--timings"),
        (["podman", "run", "-d", "--log-prefix", "x"], "not shown"),
        (["podman", "run", "--"], "No image is named"),
        (["podman", "run", "--entrypoint", "--", "x"], "--entrypoint"),
        (["podman", "run", "-itX", "x"], "There is no option -X"),
        (["podman", "run", "-itp"], "-p"),
        (["podman", "run", "--rm=maybe", "x"], "--rm is true or false, not 'maybe'"),
        (["podman", "run", "--name", "--rm", "x"], "'--rm' cannot name a VM"),
        (["podman", "run", "--entrypoint", "[1]", "x"], "--entrypoint"),
        (["podman", "run", "--entrypoint", "[" * 50_000, "x"], "--entrypoint"),
        (["snapshot", "run", "--pid", "1", "--count", "99999999999"], "at most"),
        (["snapshot", "run", "--pid", "1", "--count", "2", "--publish", f"{'9' * 5000}-9:80"], "cannot share"),
        (["snapshot", "run", "--pid", "1", "--detach", "--log-prefix"], "not shown"),
        (["snapshot", "run", "--pid", "1", "--count", "2", "--no-log-prefix"], "not shown"),
        (["snapshot", "run", "--snapshot", "a", "--exec", "true", "--log-prefix"], "not shown"),
        (["podman", "run", "--mem", "", "x"], "--mem"),
        (["podman", "run", "--cpu", "", "x"], "--cpu"),
        (["podman", "run", "--stop-timeout", "", "x"], "--stop-timeout"),
        (["podman", "run", "--scratch-size", "", "x"], "--scratch-size"),
        (["podman", "run", "--mem", "infg", "x"], "'infg' is not a size"),
        (["stop", "--all", "a"], "--all is said"),
        (["stop", "--all", "--name", "a"], "--all is said"),
        (["rm", "--all", "a"], "say --all"),
        (["rm"], "say --all"),
        (["machine", "logs", "-n", "0"], "--lines"),
        (["--log", "loud", "ls"], "'loud' is none of"),
        (["exec"], "No VM is named"),
        (["exec", "a"], "No command is given"),
        (["exec", "--", "a"], "No command is given"),
        (["exec", "--pid", "x", "true"], "--pid"),
        (["exec", "--pid", "1", "--name", "a", "true"], "named twice"),
        (["stop"], "No VM is named"),
        (["stop", "-t", "soon", "a"], "--timeout"),
        (["completions", "csh"], "csh"),
    ],
)
def test_wrong_words_are_one_sentence_with_a_hint_and_125(words: list[str], message: str, tmp_path: Path) -> None:
    done = fcvm(*words, base=tmp_path)
    assert done.returncode == 125, done.stderr
    assert done.stdout == ""
    first, hint = done.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert first.endswith(".")
    assert message in first
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rm=false", "--privileged=TRUE", "-d=1"], {"rm": False, "privileged": True, "detach": True}),
        (["--no-rm", "--rm=true", "-t", "--tty=f", "--interactive=0"], {"rm": True, "tty": False, "interactive": False}),
        (["--no-rm=false", "--no-snapshot=false"], {"rm": True, "no_snapshot": False}),
        (["--no-rm=true", "--no-snapshot=true"], {"rm": False, "no_snapshot": True}),
        (["--log-prefix=false"], {"log_prefix": False}),
        (["--cmd", "-v --rm=false", "-e", "-x=--rm"], {"cmd": "-v --rm=false", "env": ["-x=--rm"], "rm": True}),
        (["--entrypoint", "-", "-it", "--"], {"entrypoint": "-", "interactive": True, "tty": True}),
        (["-it", "--tty=false"], {"interactive": True, "tty": False}),
        (["--tty=false", "-it"], {"interactive": True, "tty": True}),
        (["-dt=false"], {"detach": True, "tty": False}),
        (["-dp", "80:80", "--rm=false"], {"detach": True, "publish": ["80:80"], "rm": False}),
        (["-itv", "a:b", "--rm=false"], {"interactive": True, "tty": True, "map": ["a:b"], "rm": False}),
        (["-itva:b", "-u0", "-eA=1", "-w=/x", "-e-x=1"], {"tty": True, "map": ["a:b"], "user": "0", "env": ["A=1", "-x=1"], "workdir": "/x"}),
    ],
)
def test_options_are_spelled_as_for_podman(words: list[str], expected: dict[str, object]) -> None:
    rest = ["image", "--rm=no", "--tty=true", "--cmd", "-v"]
    args = build("podman").parse_args(["podman", "run", *words, *rest])
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.words[-len(rest) :] == rest


@pytest.mark.parametrize("words", [["-it", "-eA=1", "-u0"], ["-ite", "A=1", "-u", "0"], ["-tiu0", "-e=A=1"]])
def test_options_of_exec_may_stand_in_one_word(words: list[str]) -> None:
    rest = ["web", "sh", "-it", "--tty=false"]
    args = build("exec").parse_args(["exec", *words, *rest])
    assert (args.interactive, args.tty, args.env, args.user, args.words) == (True, True, ["A=1"], "0", rest)


def test_the_hint_for_a_wrong_option_is_the_help_of_its_command(tmp_path: Path) -> None:
    assert "hint: fcvm podman run --help" in fcvm("podman", "run", "--nonsense", "x", base=tmp_path).stderr
    assert "hint: fcvm ls --help" in fcvm("ls", "--nonsense", base=tmp_path).stderr


def test_without_setup_it_says_so(tmp_path: Path) -> None:
    done = fcvm("ls", base=tmp_path / "new")
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["NAME", "STATUS"])
    for words in (["exec", "nobody", "true"], ["logs", "nobody"], ["stop", "nobody"], ["rm", "nobody"]):
        done = fcvm(*words, base=tmp_path)
        assert done.returncode == 125
        assert "nobody" in done.stderr
        assert "hint: fcvm ls" in done.stderr


def test_ls_json_of_nothing_is_an_empty_array(tmp_path: Path) -> None:
    assert fcvm("ls", "--json", base=tmp_path).stdout == "[]\n"


def test_a_full_or_forbidden_data_directory_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = fcvm("ls", base=tmp_path / "file")
    assert done.returncode == 125
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["FCVM_CPU", "FCVM_CONFIG"])
def test_what_helps_with_wrong_settings_works_with_them(wrong: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("unknown = 1\n")
    env = {wrong: str(tmp_path / "config.toml")}
    failed = fcvm("ls", base=tmp_path, env=env)
    assert failed.returncode == 125
    assert "hint: fcvm setup --generate-config shows every setting" in failed.stderr
    shown = fcvm("setup", "--generate-config", base=tmp_path, env=env)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, config.generate(), "")
    assert fcvm("completions", "bash", base=tmp_path, env=env).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_shell_code(shell: str) -> None:
    done = fcvm("completions", shell)
    assert done.returncode == 0
    assert "fcvm" in done.stdout


def test_the_shell_gets_commands_and_options() -> None:
    completer = {"_ARGCOMPLETE": "1", "COMP_LINE": "fcvm podman run --ent", "COMP_POINT": "21", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    assert "--entrypoint" in fcvm(env=completer).stdout


@pytest.mark.parametrize(
    ("line", "names"),
    [("fcvm stop w", True), ("fcvm logs w", True), ("fcvm rm w", True), ("fcvm exec w", True), ("fcvm exec web w", False)],
)
def test_the_shell_gets_the_names_of_vms(tmp_path: Path, line: str, names: bool) -> None:
    record = Record("0123456789ab", "web", 1, "running", "healthy", "image", 0.0, 1, 512)
    write(Layout(tmp_path), record)
    completer = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    assert ("web" in fcvm(env=completer, base=tmp_path).stdout) is names


def test_podman_run_says_when_setup_was_not_done(tmp_path: Path) -> None:
    settings = {"FCVM_MACHINE": "always", "FCVM_DEBIAN_SUITE": "none-such"}  # so that what this host has does not fit
    done = fcvm("podman", "run", "x", base=tmp_path, env=settings)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith(f"error: fcvm is not set up in {tmp_path}: ")
    assert done.stderr.endswith("hint: fcvm setup\n")


def test_all_commands_can_be_built_at_once() -> None:
    assert build(all_commands=True).parse_args(["ls", "--json"]).json is True


def test_settings_of_the_environment_are_checked(tmp_path: Path) -> None:
    done = fcvm("ls", base=tmp_path, env={"FCVM_CPU": "many"})
    assert done.returncode == 125
    assert "the setting cpu of the environment" in done.stderr.lower()


def test_a_vm_that_has_just_ended_keeps_nobody_from_stopping_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fcvm.cli import stop

    layout = Layout(tmp_path)
    entries = [state.register(layout, Record(f"{number:012}", name, 1, "running", "healthy", "image", number, 1, 512))
               for number, name in enumerate(("first", "second"))]  # fmt: skip
    asked: list[str] = []

    def call(directory: Path, _request: object) -> None:
        asked.append(directory.name)
        entries[int(directory.name)].close()
        if len(asked) == 1:
            raise NotFoundError("The VM is not running.")

    monkeypatch.setattr(stop.rpc, "call", call)
    args = argparse.Namespace(all=True, timeout=None, words=[], name=None, pid=None)
    assert stop.run(args, Context(config.load({"base_dir": str(tmp_path)}))) == 0
    assert sorted(asked) == [entry.record.id for entry in entries]  # at once
    assert capsys.readouterr().out == "first\nsecond\n"


def test_the_machine_is_not_removed_unasked(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine/disk.img").touch()
    done = fcvm("machine", "rm", base=tmp_path)
    assert (done.returncode, (tmp_path / "machine/disk.img").exists()) == (125, True)
    assert "hint: fcvm machine rm --force" in done.stderr
    assert fcvm("machine", "rm", "--force", base=tmp_path).returncode == 0
    assert not (tmp_path / "machine/disk.img").exists()


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("exec nosuch -- true", 125)])
def test_closed_standard_streams(words: str, code: int, closing: str, tmp_path: Path) -> None:
    command = f'"$0" -m fcvm {words} {closing}'
    env = {**os.environ, "FCVM_BASE_DIR": str(tmp_path), "FCVM_MACHINE": "never"}
    done = subprocess.run(["sh", "-c", command, sys.executable], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr + done.stdout
    if code and closing in ("<&-", ">&-"):
        assert done.stderr.startswith("error: There is no VM named 'nosuch'.")


def test_help_says_nothing_of_what_is_not_there() -> None:
    for words in ((), ("podman",), ("snapshot",), ("snapshots",)):
        assert "None" not in fcvm(*words, "--help").stdout


def test_vms_are_stopped_all_at_once_and_one_that_refuses_keeps_no_other(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    names = ["a", "b", "c"]
    asked = threading.Barrier(len(names))  # passed when all have been asked

    def supervisor(listener: socket.socket, name: str, entry: state.Registration) -> None:
        connection, _ = listener.accept()
        rpc.receive(connection)
        asked.wait(60)
        if name != "b":
            entry.close()
        rpc.answer(connection, rpc.failure(NotFoundError("b is stubborn.")) if name == "b" else {"ok": True})

    with contextlib.ExitStack() as stack:
        for number, name in enumerate(names):
            record = Record(f"{number:012}", name, os.getpid(), "running", "healthy", "image", time.time(), 1, 512)
            entry = stack.enter_context(contextlib.closing(state.register(layout, record)))
            (layout.directory("vms") / record.id).mkdir()
            listener = stack.enter_context(sockets.listen(layout.vms / record.id / rpc.SOCKET))
            threading.Thread(target=supervisor, args=(listener, name, entry), daemon=True).start()
        done = fcvm("stop", "a", "nobody", "b", "c", base=tmp_path)
        assert (done.returncode, done.stdout) == (125, "a\nc\n")
        assert "b is stubborn." in done.stderr
        assert "'nobody'" in done.stderr


def test_what_is_removed_is_not_kept_by_what_is_not_there(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number, name in enumerate(("a", "b")):
        record = Record(f"{number:012}", name, 0, "exited", "stopped", "image", time.time(), 1, 512, keep=True)
        state.register(layout, record).close()
    done = fcvm("rm", "a", "nobody", "b", base=tmp_path)
    assert (done.returncode, done.stdout) == (125, "a\nb\n")
    assert "'nobody'" in done.stderr


def test_removing_snapshots_goes_on_where_there_is_none(tmp_path: Path) -> None:
    for tag in ("a", "c"):
        make(Layout(tmp_path), tag)
    done = fcvm("snapshots", "rm", "a", "missing", "c", "gone", base=tmp_path)
    assert done.returncode == 125
    assert done.stdout == "a\nc\n"
    assert done.stderr.count("error:") == done.stderr.count("hint: fcvm snapshots\n") == 2
    assert "There is no snapshot named 'missing'." in done.stderr
