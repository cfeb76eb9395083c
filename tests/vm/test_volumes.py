"""--map with real guests: live in both directions, kept open by snapshots, clones and clones of clones.

The container of ``source`` reads a line every moment from a file of one volume and writes its VM's name and the line into a
file of another one, all through descriptors that it opened once; what it writes into a third one may fail.
"""

import hashlib
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vm.conftest import DEMO, fcvm, ok, running, vm

from fcvm import host
from fcvm.config import load

SCRIPT = """
trap exit TERM
exec 3>>/rw/log 4</ro/lines 5>>/rw/nested/gone
while read line <&4; do
    echo "$(hostname) $line" >&3
    echo $line >&5 || echo "$(hostname) lost" >&3
    sleep 0.3
done
"""

# Kills the children of a process that serve volumes.
KILL = """
for p in /proc/[0-9]*; do
    grep -q "^PPid:[[:space:]]*$1$" $p/status && grep -q fcvm.volumes.server $p/cmdline && kill -9 ${p#/proc/} && echo killed
done 2>/dev/null; true
"""

# Stops them again and again for some seconds.
SLOW = """
for p in /proc/[0-9]*; do
    grep -q "^PPid:[[:space:]]*$1$" $p/status && grep -q fcvm.volumes.server $p/cmdline && pids="$pids ${p#/proc/}"
done 2>/dev/null
for n in 1 2 3 4 5 6 7 8 9 10; do kill -STOP $pids; sleep 0.5; kill -CONT $pids; sleep 0.05; done
"""


def where_vms_are(*command: str) -> bytes:
    """Run a command where the VMs are; its stdout."""
    if host.uses_machine(load({})):
        return ok("machine", "ssh", "--", *command)
    return subprocess.run(command, check=True, capture_output=True).stdout


def wait_for(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        threading.Event().wait(0.1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("volumes")


@pytest.fixture(scope="module")
def source(base: Path) -> Iterator[str]:
    name = f"test-{secrets.token_hex(4)}"
    for directory in ("rw", "ro", "gone"):
        (base / directory).mkdir()
    (base / "ro" / "lines").write_text("".join(f"{n}\n" for n in range(100_000)))
    maps = [f"{base}/rw:/rw,{base}/ro:/ro:ro", f"{base}/gone:/rw/nested"]
    ok("podman", "run", "-d", "--name", name, "--map", maps[0], "-v", maps[1], DEMO, "--", "sh", "-c", SCRIPT)
    yield name
    fcvm("stop", "-t", "0", name)


def lines(base: Path, name: str) -> list[str]:
    """What the container of the VM ``name`` wrote."""
    log = base / "rw" / "log"
    words = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [text for vm_name, text in words if vm_name == name]


def goes_on(base: Path, name: str) -> int:
    """Wait until the container of ``name`` has read and written three more lines; the number of the last."""
    before = len(lines(base, name))
    wait_for(lambda: len(lines(base, name)) >= before + 6, f"{name} to go on")
    return int([line for line in lines(base, name) if line != "lost"][-1])


def begin(base: Path, name: str) -> int:
    """The number of the first line that the container of ``name`` read."""
    return next(int(line) for line in lines(base, name) if line != "lost")


def test_directories_files_and_odd_names(tmp_path: Path) -> None:
    odd = tmp_path / "a b,c:d"
    odd.mkdir()
    (odd / "data").write_text("from the host\n")
    (tmp_path / "single").write_text("a file\n")
    escaped = str(odd).replace(",", r"\,").replace(":", r"\:")
    script = (
        "cat '/x y/data' /etc/single; echo from the guest > '/x y/made'; echo more >> /etc/single;"
        "mv '/x y/made' '/x y/renamed'; mkdir '/x y/d'; ln -s data '/x y/d/link';"
        "touch /ro/no; echo $?; echo no > /ro/data; echo $?; rm -f /ro/data; echo $?; cat /ro/data"
    )
    done = fcvm("podman", "run", "--map", rf"{escaped}:/x y,{escaped}:/ro:ro", "--map", f"{tmp_path}/single:/etc/single",
                DEMO, "--", "sh", "-c", script)  # fmt: skip
    assert done.stdout == b"from the host\na file\n1\n1\n1\nfrom the host\n", done.stderr
    assert done.stderr.count(b"Read-only file system") == 3
    assert (odd / "renamed").read_text() == "from the guest\n"
    assert (odd / "renamed").stat().st_uid == odd.stat().st_uid
    assert (odd / "d" / "link").readlink() == Path("data")
    assert (tmp_path / "single").read_text() == "a file\nmore\n"


def test_errors_come_before_anything_starts(tmp_path: Path) -> None:
    for option, words in (
        (f"{tmp_path}/missing:/x", b"cannot be mapped: No such file"),
        (f"{tmp_path}:x", b"is not absolute"),
        (f"{tmp_path}", b"is not HOST:GUEST"),
    ):
        done = fcvm("podman", "run", "--map", option, DEMO, "--", "true")
        assert done.returncode == 125
        assert words in done.stderr
        assert b"hint:" in done.stderr


def test_live_in_both_directions(source: str, base: Path) -> None:
    goes_on(base, source)
    found = vm(source)
    assert found is not None
    assert found["volumes"] == [
        {"host": f"{base}/rw", "guest": "/rw", "read_only": False},
        {"host": f"{base}/ro", "guest": "/ro", "read_only": True},
        {"host": f"{base}/gone", "guest": "/rw/nested", "read_only": False},
    ]
    assert b"/ro:ro" in ok("ls")
    path = base / "ro" / "news"
    watch = 'until [ "$(cat /ro/news 2>/dev/null)" = "$0" ]; do sleep 0.1; done; echo "saw $0"'
    with running("exec", source, "--", "sh", "-c", watch, "one") as seen:  # its absence was looked at and is cached
        threading.Event().wait(2)
        path.write_text("one\n")
        assert seen.communicate(timeout=120)[0] == b"saw one\n"
    with running("exec", source, "--", "sh", "-c", watch, "two") as seen:
        threading.Event().wait(2)
        path.write_text("two\n")
        assert seen.communicate(timeout=120)[0] == b"saw two\n"
    path.unlink()
    ok("exec", source, "--", "sh", "-c", "while [ -e /ro/news ]; do sleep 0.1; done")
    ok("exec", source, "--", "sh", "-c", "echo synced > /rw/file; chmod 640 /rw/file")
    assert (base / "rw" / "file").read_text() == "synced\n"
    assert (base / "rw" / "file").stat().st_mode & 0o777 == 0o640


def test_a_server_that_is_killed_is_a_pause(source: str, base: Path) -> None:
    found = vm(source)
    assert found is not None
    command = ["sh", "-c", KILL, "sh", str(found["pid"])]
    assert where_vms_are(*command) == b"killed\n"
    before = goes_on(base, source)
    assert goes_on(base, source) > before
    assert "lost" not in lines(base, source)
    assert [int(n) for n in lines(base, source)] == list(range(len(lines(base, source))))


def test_what_a_slow_server_writes_is_what_was_sent(source: str, base: Path) -> None:
    """Firecracker repeats bytes of long pieces that the server is slow to take."""
    pid = str((vm(source) or {})["pid"])
    ok("exec", source, "--", "sh", "-c", "head -c 4m /dev/urandom > /tmp/data")
    with running("exec", source, "--", "sh", "-c", "for n in 1 2 3 4; do cp /tmp/data /rw/copy$n; done; sha256sum /tmp/data") as copying:
        where_vms_are("sh", "-c", SLOW, "sh", pid)
        out, errors = copying.communicate(timeout=300)
        assert copying.returncode == 0, errors
    for number in (1, 2, 3, 4):
        data = (base / "rw" / f"copy{number}").read_bytes()
        assert hashlib.sha256(data).hexdigest() == out.split()[0].decode(), f"copy {number}"


def test_snapshots_and_clones_go_on_with_their_files(source: str, base: Path) -> None:
    tag, second = f"test-{secrets.token_hex(4)}", f"test-{secrets.token_hex(4)}"
    clone, grandchild, pooled = f"{tag}-c", f"{tag}-cc", f"{tag}-p"
    try:
        ok("snapshot", "create", source, "--tag", tag)
        at = goes_on(base, source)  # the source keeps its volumes
        assert "lost" not in lines(base, source)
        (base / "ro" / "lines").rename(base / "ro" / "renamed")
        shutil.rmtree(base / "gone")
        with running("snapshot", "run", "--snapshot", tag, "--name", clone):
            first = goes_on(base, clone)
            assert "lost" in lines(base, clone)
            assert begin(base, clone) <= at
            assert ok("exec", clone, "--", "ls", "/ro") == b"renamed\n"
            gone = fcvm("exec", clone, "--", "ls", "/rw/nested")
            assert gone.returncode != 0
            assert b"Input/output error" in gone.stderr
            assert (vm(clone) or {})["volumes"] == (vm(source) or {})["volumes"]
            ok("snapshot", "create", clone, "--tag", second)
            assert goes_on(base, clone) > first
        with running("snapshot", "run", "--snapshot", second, "--name", grandchild):
            assert goes_on(base, grandchild) > first
            ok("exec", grandchild, "--", "sh", "-c", "echo third > /rw/generation")
            assert (base / "rw" / "generation").read_text() == "third\n"
        with running("snapshot", "serve", "--pool", "1", tag) as server:
            assert server.stdout is not None
            pid = server.stdout.readline().decode().strip()
            with running("snapshot", "run", "--pid", pid, "--name", pooled):
                goes_on(base, pooled)
                assert begin(base, pooled) <= at
    finally:
        for name in (tag, second):
            fcvm("snapshots", "rm", name)
