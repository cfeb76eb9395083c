"""How runs end that do not just exit: by health, stop signals, a full disk, no memory, and with what they depend on killed."""

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from images_support import ARCHITECTURE, archive
from vm.conftest import DEMO, environment, fcvm, line, ok, running, started, vm, wait, where_vms_are

SECOND = 10**9  # Docker's durations are nanoseconds
SERVICE = "localhost/fcvm-test-service:latest"
# A service with a health check that looks for a file, and a stop signal that is not the usual one.
CONFIG = {
    "Env": ["PATH=/bin"],
    "Healthcheck": {"Test": ["CMD", "test", "-e", "/tmp/well"], "Interval": SECOND, "StartPeriod": 600 * SECOND, "Retries": 2},
    "StopSignal": "SIGQUIT",
}
STOPPABLE = 'trap "echo got QUIT; exit 7" QUIT; trap "echo got TERM; exit 8" TERM; echo ready; while :; do sleep 0.1; done'


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import recipes  # of examples/, to which images_support has made the way

    path = tmp_path_factory.mktemp("image") / "service.tar"
    archive.write(path, [archive.layer(recipes.demo_files())], CONFIG, names=[SERVICE], architecture=ARCHITECTURE)
    ok("images", "load", str(path))
    yield SERVICE
    ok("images", "rm", SERVICE)


def wait_for_health(name: str, wanted: str) -> None:
    wait(lambda: (vm(name) or {}).get("health") == wanted)


def rest(process: "subprocess.Popen[bytes]") -> tuple[bytes, str]:
    """What is left of its output, and its stderr, once it has ended."""
    out, err = process.communicate(timeout=120)
    return out, err.decode()


def test_the_images_health_check_and_its_stop_signal(service: str, vm_name: str) -> None:
    with running("podman", "run", "--name", vm_name, service, "--", "sh", "-c", STOPPABLE) as process:
        assert line(process) == b"ready"
        assert (vm(vm_name) or {})["health"] == "starting"
        ok("exec", vm_name, "--", "touch", "/tmp/well")
        wait_for_health(vm_name, "healthy")
        ok("exec", vm_name, "--", "rm", "/tmp/well")
        wait_for_health(vm_name, "unhealthy")
        ok("stop", vm_name)
        assert rest(process) == (b"got QUIT\n", "")
        assert process.returncode == 7


def test_a_health_check_by_url_and_sigterm_is_the_images_stop_signal(service: str, vm_name: str) -> None:
    script = f"httpd -h /www; {STOPPABLE}"
    options = ["--name", vm_name, "--health-check", "http://127.0.0.1:80/"]
    with running("podman", "run", *options, service, "--", "sh", "-c", script) as process:
        assert line(process) == b"ready"
        wait_for_health(vm_name, "healthy")
        ok("exec", vm_name, "--", "killall", "httpd")
        wait_for_health(vm_name, "unhealthy")
        process.send_signal(signal.SIGTERM)
        assert rest(process) == (b"got QUIT\n", "")
        assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_detached_run_that_is_ended_while_it_starts_leaves_nothing(vm_name: str, number: int) -> None:
    # From a boot snapshot it could be over before we see it.
    with running("podman", "run", "-d", "--no-snapshot", "--name", vm_name, DEMO, "--", "sleep", "1000") as process:
        wait(lambda: vm(vm_name))
        process.send_signal(number)
        assert rest(process) == (b"", "")
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        wait(lambda: vm(vm_name) is None)
    assert vm(vm_name) is None


def test_a_full_disk_is_the_containers_to_see_and_is_said_at_the_end(vm_name: str) -> None:
    script = """
        trap "exit 3" TERM
        fallocate -l $(($(df -Pk / | awk 'END { print $4 }') * 1024 - (8 << 20))) /taken
        dd if=/dev/zero of=/rest bs=64k || echo full
        while :; do sleep 0.1; done
    """
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", script) as process:
        assert line(process) == b"full"
        assert ok("exec", vm_name, "--", "sh", "-c", "echo x > /more || echo no room") == b"no room\n"
        assert ok("exec", vm_name, "--vm", "--", "echo", "inside") == b"inside\n"
        ok("stop", vm_name)
        out, err = rest(process)
        assert process.returncode == 3
        assert out == b""
        assert "No space left on device" in err
        assert "warning: The VM's disk is full." in err


def test_a_container_that_is_killed_for_want_of_memory_is_told_of() -> None:
    # The kernel's killer is called by hand: emulated, to fill the memory takes more than a minute.
    script = "echo 1000 >/proc/self/oom_score_adj; echo f >/proc/sysrq-trigger; exec sleep 600"
    done = fcvm("podman", "run", "--privileged", DEMO, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (137, b"")
    first, *console = done.stderr.decode().splitlines()
    assert first.startswith("fcvm: warning: The container was killed because the VM had no memory left.")
    assert any("Out of memory: Killed process" in quoted for quoted in console)


def test_a_firecracker_that_is_killed_ends_the_run_with_its_console(vm_name: str) -> None:
    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", "echo ready; sleep 600") as process:
        assert line(process) == b"ready"
        ok("exec", vm_name, "--vm", "--", "sh", "-c", "echo last words >/dev/console")
        supervisor = str((vm(vm_name) or {})["pid"])
        subprocess.run(where_vms_are("pkill", "-9", "-P", supervisor, "firecracker"), env=environment(), check=True)
        out, err = rest(process)
        assert (process.returncode, out) == (125, b"")
        assert "error: Firecracker was killed by signal 9" in err
        assert "    last words" in err.splitlines()
    assert vm(vm_name) is None


def test_a_vm_in_the_background_that_dies_is_kept_if_it_is_to_be(detached, vm_name: str) -> None:
    detached("sh", "-c", "echo ready; sleep 600", options=["--no-rm"])
    wait(lambda: ok("logs", vm_name) == b"ready\n")
    supervisor = str((vm(vm_name) or {})["pid"])
    subprocess.run(where_vms_are("pkill", "-9", "-P", supervisor, "firecracker"), env=environment(), check=True)
    wait(lambda: (vm(vm_name) or {})["status"] == "exited")
    found = vm(vm_name) or {}
    assert (found["exit_code"], found["health"]) == (125, "stopped")
    assert ok("logs", "-f", vm_name) == b"ready\n"
    last = ok("logs", "--console", vm_name).decode().splitlines()[-1]
    assert last == "fcvm: Firecracker was killed by signal 9 before the container had ended."
    assert ok("rm", vm_name).decode().strip() == vm_name


# Sends the supervisor with the pid argv[1] the signal argv[3] at the moment when Firecracker, paused, has begun to write the
# snapshot argv[2]; says what is in the snapshot then, and in which state the VM is. When stdin has ended, the supervisor goes on.
AT_THAT_MOMENT = r"""
import glob, os, signal, socket, sys
supervisor, tag, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
children = [child for path in glob.glob(f"/proc/{supervisor}/task/*/children") for child in open(path).read().split()]
firecracker = next(child for child in children if open(f"/proc/{child}/comm").read() == "firecracker\n")
vm = os.readlink(f"/proc/{firecracker}/cwd")
snapshot = os.path.realpath(f"{vm}/../../snapshots/{tag}.creating")
print(snapshot, flush=True)
while not os.path.exists(f"{snapshot}/vmstate.bin"):
    pass
os.kill(supervisor, number)
print(*os.listdir(snapshot), flush=True)
if number == signal.SIGSTOP:
    api = socket.socket(socket.AF_UNIX)
    api.connect(f"{vm}/firecracker.sock")
    api.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    print("paused" if b'"Paused"' in api.recv(4096) else "runs", flush=True)
    sys.stdin.read()
    os.kill(supervisor, signal.SIGCONT)
"""


def at_that_moment(name: str, tag: str, number: int, **options: Any) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    supervisor = str((vm(name) or {})["pid"])
    return started(where_vms_are("python3", "-c", AT_THAT_MOMENT, supervisor, tag, str(int(number))), **options)


def test_kills_while_a_snapshot_is_taken(vm_name: str) -> None:
    """Of who has asked for it: the guest goes on. Of the VM's supervisor: the VM is gone, and no half snapshot is left."""
    script = "n=0; while :; do n=$((n+1)); echo $n; echo $n >/tmp/count; sleep 0.2; done"
    tag, lost = f"{vm_name}-asked", f"{vm_name}-lost"

    def tags() -> list[str]:
        return [found["tag"] for found in json.loads(ok("snapshots", "--json"))]

    with running("podman", "run", "--name", vm_name, DEMO, "--", "sh", "-c", script) as process:
        assert line(process) == b"1"
        with at_that_moment(vm_name, tag, signal.SIGSTOP, stdin=subprocess.PIPE) as moment:
            line(moment)
            with running("snapshot", "create", vm_name, "--tag", tag) as create:
                assert b"config.json" not in line(moment).split()
                assert line(moment) == b"paused"
                create.kill()
                create.wait()
            assert tag not in tags()
            moment.communicate(timeout=120)
        now = int(ok("exec", vm_name, "--", "cat", "/tmp/count"))
        for count in range(2, now + 2):  # the last of them shows that it goes on, all of them that nothing is lost
            assert line(process) == b"%d" % count
        wait(lambda: tag in tags())  # who has asked is not needed for it any more
        ok("snapshots", "rm", tag)

        with at_that_moment(vm_name, lost, signal.SIGKILL) as moment:
            place = line(moment).decode()
            with running("snapshot", "create", vm_name, "--tag", lost) as create:
                assert b"config.json" not in line(moment).split()
                out, err = rest(create)
                assert (create.returncode, out) == (125, b"")
                assert f"The VM '{vm_name}' ended meanwhile." in err
        assert process.wait(120) in (137, -signal.SIGKILL)
    assert vm(vm_name) is None
    assert lost not in tags()
    subprocess.run(where_vms_are("test", "!", "-e", place), env=environment(), check=True)
