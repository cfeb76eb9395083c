"""A real machine from its start to its removal: QEMU, its keeper, sessions, the host's files, ports, kills.

It has a data directory of its own, so a machine that the user runs is not touched.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fcvm import config as settings
from fcvm import setup
from fcvm.agent.session import Exit, Request, stream
from fcvm.errors import FcvmError
from fcvm.linux import sockets
from fcvm.machine import state
from fcvm.machine.machine import Machine
from fcvm.machine.state import Places
from fcvm.setup.assets import Assets
from fcvm.setup.progress import Silent
from fcvm.storage.layout import Layout

ROOT = Path(__file__).parents[2]


def assets() -> Assets:
    """What setup provides; what is missing of it is made."""
    config = settings.load()
    return setup.ensure(config, Layout(config.base_dir), Silent())


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if os.geteuid() != 0:
        pytest.skip("its processes are looked at as root")
    base = tmp_path_factory.mktemp("machine")
    config = settings.load({"base_dir": str(base), "machine_mem": "2g", "machine_disk": "4g"})
    machine = Machine(config, Layout(base))
    try:
        yield machine
    finally:
        machine.remove()


@pytest.fixture
def started(machine: Machine) -> Machine:
    """The machine, running; sessions only, without the images that VMs need."""
    if machine.status().phase != "running":
        with Silent().step("") as step:
            machine._start(assets(), step)
    return machine


def run(machine: Machine, *argv: str, stdin: bytes | None = None, tty: bool = False) -> tuple[Exit, bytes, bytes]:
    """Run a program in the machine to its end."""
    out: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    with contextlib.ExitStack() as stack:
        fd = None
        if stdin is not None:
            read, write = os.pipe()
            stack.callback(os.close, read)
            threading.Thread(target=_feed, args=(write, stdin), daemon=True).start()
            fd = read
        request = Request(list(argv), target="vm", cwd="/", stdin=fd is not None, grace=0, tty=tty)
        ended = stream(
            lambda: sockets.connect(machine.places.session), request, stdin=fd, on_output=lambda n, d: out[n].append(d)
        )
    return ended, b"".join(out["stdout"]), b"".join(out["stderr"])


def _feed(fd: int, data: bytes) -> None:
    with open(fd, "wb") as pipe:
        pipe.write(data)


def shell(machine: Machine, script: str) -> str:
    ended, out, err = run(machine, "sh", "-c", script)
    assert ended.code == 0, (script, ended, out, err)
    return out.decode()


def qemu_processes(places: Places) -> list[int]:
    """Every QEMU that uses this machine's disk, however it came to be."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes()
                if os.fsencode(places.disk) in words and b"-machine" in words:
                    found.append(int(name))
    return found


def wait_for_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([fd], [], [], 60)[0], f"process {pid} is still there"
    os.close(fd)


def test_two_commands_start_one_machine(machine: Machine) -> None:
    found = assets()
    errors: list[BaseException] = []

    def start() -> None:
        try:
            with Silent().step("") as step:
                machine._start(found, step)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert machine.status().phase == "running"
    assert len(qemu_processes(machine.places)) == 1


def test_kvm_is_there(started: Machine) -> None:
    script = "import fcntl,os; d=os.open('/dev/kvm',os.O_RDWR); print(fcntl.ioctl(d,0xAE00), fcntl.ioctl(d,0xAE01,0) > 0)"
    assert run(started, "python3", "-c", script)[1] == b"12 True\n"
    assert "svm" in shell(started, "grep -m1 flags /proc/cpuinfo").split()


def test_data_disk_is_btrfs_of_the_size_asked_for(started: Machine) -> None:
    kind, size = shell(started, "stat -f -c '%T %b %S' /mnt/fcvm-btrfs").split()[0], shell(started, "df -B1 --output=size /mnt/fcvm-btrfs")
    assert kind == "btrfs"
    assert int(size.split()[-1]) == 4 << 30


def test_exit_codes(started: Machine) -> None:
    assert run(started, "sh", "-c", "exit 37")[0].code == 37
    assert run(started, "sh", "-c", "kill -9 $$")[0].code == 137
    assert run(started, "/no/such/program")[0].code == 127


def test_streams_stay_apart_and_exact(started: Machine) -> None:
    data = bytes(range(256)) * 1000
    ended, out, err = run(started, "sh", "-c", "tee /dev/stderr", stdin=data)
    assert (ended.code, out, err) == (0, data, data)


def test_a_hundred_megabytes_each_way(started: Machine) -> None:
    block = os.urandom(1 << 20)
    data = block * 100
    ended, out, _ = run(started, "sha256sum", stdin=data)
    assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()
    ended, out, _ = run(started, "sh", "-c", "head -c 1048576 > /tmp/block; for i in $(seq 100); do cat /tmp/block; done", stdin=block)
    assert ended.code == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


def test_host_files_are_read_and_written(started: Machine, tmp_path: Path) -> None:
    (tmp_path / "from host").write_bytes(b"one")
    assert shell(started, f"cat '/host{tmp_path}/from host'") == "one"
    shell(started, f"echo two > /host{tmp_path}/from-machine; mkdir /host{tmp_path}/d; ln -s d /host{tmp_path}/l")
    assert (tmp_path / "from-machine").read_text() == "two\n"
    assert os.readlink(tmp_path / "l") == "d"
    big = os.urandom(5 << 20)
    (tmp_path / "big").write_bytes(big)
    assert shell(started, f"sha256sum < /host{tmp_path}/big").split()[0] == hashlib.sha256(big).hexdigest()
    shell(started, f"cp /host{tmp_path}/big /host{tmp_path}/copy")
    assert (tmp_path / "copy").read_bytes() == big


def test_changes_on_the_host_are_seen_at_once(started: Machine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for number in range(5):  # same length, other content: neither name nor size gives it away
        file.write_text(f"{number}")
        assert shell(started, f"cat /host{file}") == f"{number}"
    file.unlink()
    assert run(started, "cat", f"/host{file}")[0].code == 1
    (tmp_path / "file").mkdir()
    assert shell(started, f"stat -c %F /host{file}") == "directory\n"


def test_killed_client_ends_the_command(started: Machine) -> None:
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from pathlib import Path; from fcvm.agent.session import Request, stream; from fcvm.linux import sockets\n"
        "request = Request(['sh', '-c', 'echo $$; exec sleep 1000'], target='vm', grace=0)\n"
        "connect = lambda: sockets.connect(Path(sys.argv[2]))\n"
        "stream(connect, request, stdin=None, on_output=lambda n, d: (sys.stdout.buffer.write(d), sys.stdout.flush()))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(ROOT / "src"), str(started.places.session)], stdout=subprocess.PIPE
    ) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert shell(started, f"cat /proc/{pid}/comm") == "sleep\n"
        client.kill()
    # The end is noticed over there in its own time: wait for the process, not for a while.
    wait = f"import os,select; f=os.pidfd_open({pid}); print(bool(select.select([f],[],[],60)[0]))"
    _, out, err = run(started, "python3", "-c", wait)
    assert out == b"True\n" or b"ProcessLookupError" in err


def test_ports_are_published_while_their_owner_lives(started: Machine) -> None:
    script = (
        "import json,socket,sys\n"
        "s=socket.create_server(('0.0.0.0', 8080))\n"
        "c=socket.socket(socket.AF_UNIX); c.connect('/run/fcvm/ports.sock')\n"
        "c.sendall(json.dumps({'ports':[{'protocol':'tcp','host_ip':'127.0.0.1','host_port':0,'port':8080}]}).encode()+b'\\n')\n"
        "print(json.loads(c.makefile().readline())['ports'][0], flush=True)\n"
        "p,_=s.accept(); p.sendall(b'hello from the machine'); p.close(); sys.stdin.read()\n"
    )
    read, write = os.pipe()
    port: list[int] = []
    ready = threading.Event()

    def on_output(name: str, data: bytes) -> None:
        if name == "stdout":
            port.append(int(data))
        ready.set()

    def session() -> None:
        request = Request(["python3", "-c", script], target="vm", stdin=True, grace=0)
        stream(lambda: sockets.connect(started.places.session), request, stdin=read, on_output=on_output)

    thread = threading.Thread(target=session)
    thread.start()
    try:
        assert ready.wait(120)
        assert port, "the program in the machine failed"
        with socket.create_connection(("127.0.0.1", port[0]), timeout=60) as connection:
            assert connection.makefile("rb").read() == b"hello from the machine"
        busy = {"protocol": "tcp", "host_ip": "127.0.0.1", "host_port": port[0], "port": 80}
        assert "is in use by" in json.loads(shell(started, ask_for(busy)))["error"]
        foreign = {"protocol": "tcp", "host_ip": "203.0.113.1", "host_port": 0, "port": 80}
        assert "203.0.113.1" in json.loads(shell(started, ask_for(foreign)))["error"]
    finally:
        os.close(write)
        thread.join()
        os.close(read)
    deadline = time.monotonic() + 60
    while True:  # the keeper is told after the connection has closed; nothing on this side says when
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port[0]), timeout=60).close()
            assert time.monotonic() < deadline, "the port is still published"
            continue
        break


def ask_for(port: dict[str, object]) -> str:
    return f"""python3 -c '
import json, socket
c = socket.socket(socket.AF_UNIX); c.connect("/run/fcvm/ports.sock")
c.sendall(json.dumps({{"ports": [{json.dumps(port)}]}}).encode() + b"\\n"); print(c.makefile().readline())'"""


def test_killed_keeper_takes_everything_with_it_and_nothing_is_lost(started: Machine) -> None:
    shell(started, "echo precious > /mnt/fcvm-btrfs/file; sync")
    now = started.status()
    os.kill(now.pid, signal.SIGKILL)
    for pid in (now.pid, now.qemu_pid):
        wait_for_end(pid)
    assert qemu_processes(started.places) == []
    assert started.status().phase == "stopped"
    with Silent().step("") as step:  # stale sockets and all
        started._start(assets(), step)
    assert shell(started, "cat /mnt/fcvm-btrfs/file") == "precious\n"


def test_killed_qemu_is_reported(started: Machine) -> None:
    now = started.status()
    os.kill(now.qemu_pid, signal.SIGKILL)
    wait_for_end(now.pid)
    after = started.status()
    assert after.phase == "broken"
    assert "SIGKILL" in after.error
    assert list(started.places.runtime.parent.glob(started.places.runtime.name)) == []


def test_stop_ends_processes_and_unmounts(started: Machine) -> None:
    # Without stderr: the shell says there that sleep was terminated, and dies of SIGPIPE if its session went first.
    script = "trap 'echo ended > /mnt/fcvm-btrfs/trace; exit' TERM; echo ready; exec 2> /dev/null; while :; do sleep 0.1; done"
    seen = threading.Event()

    def session() -> None:
        with contextlib.suppress(OSError, FcvmError):
            stream(
                lambda: sockets.connect(started.places.session),
                Request(["setsid", "sh", "-c", script], target="vm", grace=0),
                stdin=None,
                on_output=lambda n, d: seen.set(),
                give_up=lambda error, since: True,
            )

    thread = threading.Thread(target=session)
    thread.start()
    assert seen.wait(120)
    now = started.status()
    assert started.stop()
    thread.join()
    assert not state.alive(started.places)
    assert started.status().phase == "stopped"
    assert qemu_processes(started.places) == []
    wait_for_end(now.qemu_pid)
    assert not started.stop()
    console = started.places.console.read_text()
    assert "unclean" not in console
    with Silent().step("") as step:
        started._start(assets(), step)
    assert shell(started, "cat /mnt/fcvm-btrfs/trace") == "ended\n"


def test_a_start_that_fails_says_why(started: Machine) -> None:
    started.stop()
    with open(started.places.disk, "r+b") as disk:  # a btrfs whose trees are gone
        disk.seek(1 << 20)
        disk.write(os.urandom(60 << 20))
    with pytest.raises(FcvmError) as caught, Silent().step("") as step:
        started._start(assets(), step)
    assert "data disk" in caught.value.message
    assert "fcvm machine rm" in (caught.value.hint or "")
    assert started.status().phase == "broken"
    assert qemu_processes(started.places) == []


def test_remove_leaves_nothing(machine: Machine) -> None:
    places = machine.places
    machine.remove()
    assert not places.directory.exists()
    assert not places.runtime.exists()
    assert qemu_processes(places) == []
    assert machine.status().phase == "stopped"
