"""`fcvm podman run`: the container's output, input and exit code are its own."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from vm.conftest import DEMO, FCVM, TIMEOUT, environment, fcvm, line, ls, ok, running, vm, wait, where_vms_are

from fcvm import config, host, setup
from fcvm.machine import sync
from fcvm.snapshots import store
from fcvm.storage.layout import Layout


def test_hello() -> None:
    done = fcvm("podman", "run", DEMO, "--", "echo", "hi")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hi\n", b"")


@pytest.mark.parametrize(
    ("command", "code"),
    [("exit 0", 0), ("exit 7", 7), ("f() { f; }; f", 139), ("exit 125", 125)],  # the third: SIGSEGV
)
def test_exit_codes_are_the_containers(command: str, code: int) -> None:
    assert fcvm("podman", "run", DEMO, "--", "sh", "-c", command).returncode == code


def test_a_command_that_does_not_exist_is_127_and_one_that_cannot_run_126() -> None:
    missing = fcvm("podman", "run", DEMO, "--", "/no/such/program")
    assert missing.returncode == 127
    assert b"/no/such/program" in missing.stderr
    not_executable = fcvm("podman", "run", DEMO, "--", "/etc/passwd")
    assert not_executable.returncode == 126


def test_stdout_and_stderr_apart_and_exact() -> None:
    script = r"printf 'out\000\377\n'; printf 'err\001' >&2; exit 3"
    done = fcvm("podman", "run", DEMO, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\0\xff\n", b"err\x01")


def test_binary_stdin_passes_and_ends() -> None:
    data = os.urandom(3_000_000)
    done = fcvm("podman", "run", "-i", DEMO, "--", "sha256sum", input=data)
    assert done.returncode == 0
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_without_interactive_stdin_is_empty() -> None:
    assert ok("podman", "run", DEMO, "--", "wc", "-c", input=b"not for it").split()[0] == b"0"


def test_environment_user_workdir_and_labels(vm_name: str, tmp_path) -> None:
    (tmp_path / "env").write_text("FROM_FILE=file value\n")
    with running(
        "podman", "run", "--name", vm_name, "--env", "A=1,B=2", "--env", "C=x,y", "--env", "PASSED",
        "--env-file", str(tmp_path / "env"), "--user", "1000:1000", "--workdir", "/tmp",
        "--label", "example.com/role=test", "--label", "flag",
        "-i", DEMO, "--", "sh", "-c", 'echo "$A $B $C $FROM_FILE $(id -u) $(id -g) $PWD"; cat',
        stdin=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"1 2 x,y file value 1000 1000 /tmp\n"
        found = vm(vm_name)
        assert found is not None
        assert found["labels"] == {"example.com/role": "test", "flag": ""}
        assert found["status"] == "running"
        assert found["image"] == f"{DEMO}:latest"
        process.stdin.close()
        assert process.wait(60) == 0


def test_cmd_and_entrypoint() -> None:
    assert ok("podman", "run", "--cmd", "echo 'two words' x", DEMO) == b"two words x\n"
    assert ok("podman", "run", "--entrypoint", "echo", DEMO, "--", "from", "entrypoint") == b"from entrypoint\n"
    assert ok("podman", "run", "--entrypoint", '["echo", "-n"]', DEMO, "--", "x") == b"x"


def test_another_kernel(tmp_path: Path) -> None:
    """The one from setup with another word in its banner, which is what /proc/version says."""
    settings = config.load()
    ours = setup.find(settings, Layout(settings.base_dir)).vmlinux.read_bytes()
    word, other = b"(debian-kernel@", b"(not-the-usual@"
    (tmp_path / "vmlinux").write_bytes(ours.replace(word, other))
    usual = ok("podman", "run", DEMO, "--", "cat", "/proc/version")
    options = ["--no-snapshot", "--kernel", str(tmp_path / "vmlinux")]
    assert word in usual
    assert ok("podman", "run", *options, DEMO, "--", "cat", "/proc/version") == usual.replace(word, other)


def test_cpu_and_memory() -> None:
    out = ok("podman", "run", "--cpu", "3", "--mem", "700m", DEMO, "--", "sh", "-c", "nproc; grep MemTotal /proc/meminfo")
    cpus, memory = out.splitlines()
    assert cpus == b"3"
    assert 550_000 < int(memory.split()[1]) < 700 * 1024


def test_privileged_may_make_and_use_devices() -> None:
    script = "mknod /tmp/null c 1 3 && echo x > /tmp/null && echo made"
    assert ok("podman", "run", "--privileged", DEMO, "--", "sh", "-c", script) == b"made\n"
    assert fcvm("podman", "run", "--user", "1000", DEMO, "--", "sh", "-c", script).returncode != 0


BLOCK = 1 << 20
BLOCKS = """
head -c 1048568 /dev/urandom > /tmp/block; n=0
while [ $n -lt %d ]; do printf '%%07d\\n' $n; cat /tmp/block; n=$((n+1)); echo $n > /tmp/written; done
"""


def test_large_output_arrives_complete_and_in_order_however_slowly_it_is_read(vm_name: str) -> None:
    count = int(os.environ.get("FCVM_TEST_OUTPUT_MIB", "16"))  # 1024 for a gibibyte; an emulated guest writes 1 MiB a second
    script = BLOCKS % count
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", script, pipesize=4096) as process:
        assert process.stdout is not None
        first = process.stdout.read(BLOCK)

        def written() -> int:
            return int(ok("exec", vm_name, "--", "sh", "-c", "sleep 2; cat /tmp/written || echo 0"))

        before = -1  # nobody reads now
        while before != (now := written()):
            before = now
        assert now < 8  # blocks that wait somewhere on the way
        content = first[8:]
        assert ok("exec", vm_name, "--", "sha256sum", "/tmp/block").split()[0].decode() == hashlib.sha256(content).hexdigest()
        assert first[:8] == b"0000000\n"
        for number in range(1, count):
            block = process.stdout.read(BLOCK)
            assert block[:8] == b"%07d\n" % number
            assert block[8:] == content, f"block {number}"
        peak = [row for row in Path(f"/proc/{process.pid}/status").read_text().splitlines() if row.startswith("VmHWM")]
        assert int(peak[0].split()[1]) < 64 * 1024  # KiB
        assert process.stdout.read() == b""
        assert process.wait(TIMEOUT) == 0


def test_sigterm_stops_with_the_stop_signal(vm_name: str) -> None:
    script = 'trap "echo got TERM; exit 5" TERM; echo ready; while :; do sleep 0.1; done'
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"got TERM\n"
        assert process.wait(120) == 5
    assert vm(vm_name) is None


def test_a_second_sigint_kills_at_once(vm_name: str) -> None:
    script = 'trap "" TERM INT; echo ready; while :; do sleep 0.1; done'
    with running("podman", "run", "--name", vm_name, "--stop-timeout", "600", DEMO, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 120
        while process.poll() is None:  # two signals at once would be one
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        assert process.returncode == 137
    assert vm(vm_name) is None


def test_the_stop_timeout_kills(vm_name: str) -> None:
    script = 'trap "" TERM; echo ready; while :; do sleep 0.1; done'
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ok("stop", "-t", "1", vm_name)
        assert process.wait(120) == 137


def test_kill_9_of_the_command_ends_the_vm_and_leaves_nothing(vm_name: str) -> None:
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", "echo ready; sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while vm(vm_name) is not None:
        assert time.monotonic() < deadline, "the VM still lives"


def test_detached_then_logs_exec_stop(vm_name: str) -> None:
    script = "echo one; echo two >&2; sleep 600"
    assert ok("podman", "run", "-d", "--name", vm_name, DEMO, "--", "sh", "-c", script) == vm_name.encode() + b"\n"
    assert ok("exec", vm_name, "--", "echo", "inside") == b"inside\n"

    def logs() -> tuple[bytes, bytes]:
        done = fcvm("logs", vm_name)
        return done.stdout, done.stderr

    wait(lambda: logs() == (b"one\n", b"two\n"))  # they come on another way than what an exec prints
    assert ok("stop", "-t", "0", vm_name) == vm_name.encode() + b"\n"
    assert vm(vm_name) is None


def test_a_kept_vm_keeps_its_exit_code_and_logs(vm_name: str) -> None:
    done = fcvm("podman", "run", "--no-rm", "--name", vm_name, DEMO, "--", "sh", "-c", "echo kept; exit 9")
    assert done.returncode == 9
    found = vm(vm_name)
    assert found is not None
    assert (found["status"], found["exit_code"], found["health"]) == ("exited", 9, "stopped")
    assert ok("logs", vm_name) == b"kept\n"
    assert vm_name not in [other["name"] for other in ls()]
    ok("rm", vm_name)
    assert vm(vm_name) is None


def test_names_are_unique(detached, vm_name: str) -> None:
    detached("sleep", "600")
    again = fcvm("podman", "run", "--name", vm_name, DEMO, "--", "true")
    assert again.returncode == 125
    assert f"fcvm stop {vm_name}" in again.stderr.decode()


def test_two_runs_have_no_identity_in_common(detached) -> None:
    """Both start from one boot snapshot."""
    other = detached("sleep", "600")
    look = "ls /var/lib/containers/storage/overlay-containers; cat /etc/machine-id; cat /proc/sys/kernel/random/uuid"
    with running("podman", "run", "--name", f"{other}-2", DEMO, "--", "sh", "-c", "echo up; sleep 600") as process:
        line(process)
        found = [ok("exec", "--vm", name, "--", "sh", "-c", look).decode().split() for name in (other, f"{other}-2")]
        assert [len(one) for one in found] == [3, 3]
        assert not set(found[0]) & set(found[1])


def test_where_faults_are_dear_what_the_first_run_writes_is_noted_for_later_ones() -> None:
    if not host.uses_machine(config.load()):
        pytest.skip("this is done under emulation only")
    for _ in range(3):  # the first may boot, and the next is the one that notes
        assert ok("podman", "run", DEMO, "--", "echo", "hello") == b"hello\n"
    look = f"cat {sync.BASE}/snapshots/boot-*/{store.WRITTEN}"
    noted = subprocess.run(where_vms_are("sh", "-c", look), stdout=subprocess.PIPE, check=True).stdout
    first, _, _ = noted.partition(b"]]")
    assert sum(count for _, count in json.loads(first + b"]]")) > 1000


def test_ls_json_has_every_documented_field(detached, vm_name: str) -> None:
    detached("sleep", "600", options=["--cpu", "1", "--mem", "512"])
    found = vm(vm_name)
    assert found is not None
    assert set(found) == {"schema", "id", "name", "pid", "status", "health", "image", "exit_code", "created_at", "snapshot",
                          "network", "cpu", "memory_mib", "labels", "volumes"}  # fmt: skip
    assert (found["cpu"], found["memory_mib"], found["exit_code"], found["schema"]) == (1, 512, None, 1)
    assert [one["id"] for one in ls("--pid", str(found["pid"]))] == [found["id"]]


def test_health_by_default_is_running(detached, vm_name: str) -> None:
    detached("sleep", "600")
    deadline = time.monotonic() + 120
    while (found := vm(vm_name)) is None or found["health"] != "healthy":
        assert time.monotonic() < deadline, found


def test_a_guest_kernel_panic_ends_the_run_with_its_console(vm_name: str) -> None:
    script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60"
    done = fcvm("podman", "run", "--privileged", "--name", vm_name, DEMO, "--", "sh", "-c", script)
    assert done.returncode == 125
    assert b"panicked" in done.stderr
    assert vm(vm_name) is None


def test_a_terminal() -> None:
    # script(1) gives the command a terminal, as a person's would be
    command = " ".join([*FCVM, "podman", "run", "-it", DEMO, "--", "sh", "-c", "'tty; stty size; test -t 0 && echo yes'"])
    done = subprocess.run(
        ["script", "-qec", f"stty rows 33 cols 77; {command}", "/dev/null"],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert b"/dev/pts/0" in done.stdout or b"/dev/console" in done.stdout
    assert b"33 77" in done.stdout
    assert b"yes" in done.stdout


def test_timings_name_every_stage() -> None:
    done = fcvm("podman", "run", "--timings", "--no-snapshot", DEMO, "--", "sh", "-c", "echo hi; sleep 1")
    assert (done.returncode, done.stdout) == (0, b"hi\n")
    rows = [line.split("  ")[0] for line in done.stderr.decode().splitlines()]
    expected = ["network", "disks", "spawn", "configure", "kernel", "agent", "podman", "first output", "end"]
    assert [row for row in rows if row in expected] == expected


def test_json_survives_the_way() -> None:
    text = json.dumps({"ü": [1, "two\n"], "quote": "'\""})
    assert json.loads(ok("podman", "run", "--env", f"X={text}", DEMO, "--", "sh", "-c", 'printf %s "$X"')) == json.loads(text)
