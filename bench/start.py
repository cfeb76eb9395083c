"""What a command costs before it does anything, beside a bare interpreter: the client's side of it.

    python -m bench.start [--rounds N | --quick] [--json FILE]

Target, for `--help`, `ls` and `exec`: the interpreter's start plus at most 30 ms. The installed ``fcvm`` is run as a user runs it, its modules compiled. What
it talks to is a thread here that answers at once: the guest of `exec`, the clone server of `snapshot run` and the machine of a
forwarded command, so what is measured is our side: finding the other, connecting, the session's frames, the exit code.
"""

import argparse
import contextlib
import fcntl
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fc_agent import channel as wire
from fcvm import config, process, setup
from fcvm.linux import sockets
from fcvm.machine import sync
from fcvm.machine.state import Places
from fcvm.setup import index
from fcvm.snapshots import servers
from fcvm.storage.layout import Layout
from fcvm.vm import paths, state

TARGET = 30.0  # ms beyond the interpreter
ID = "0123456789ab"
BOUND = ("fcvm --help", "fcvm ls", "fcvm exec")
FCVM = str(Path(sys.executable).with_name("fcvm"))


def seconds(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """How long ``command`` takes, and how much CPU."""
    used, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    taken, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def medians(values: list[tuple[float, float]]) -> tuple[float, float]:
    """Those of the two columns, in ms."""
    return statistics.median(wall for wall, _ in values) * 1e3, statistics.median(cpu for _, cpu in values) * 1e3


def serve(path: Path, answer: Callable[[socket.socket], None]) -> None:
    """Have every connection to ``path`` answered by a thread."""
    listener = sockets.listen(path)

    def run() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                answer(connection)

    threading.Thread(target=run, daemon=True).start()


def session(connection: socket.socket) -> None:
    """A session (docs/architecture.md, "Sessions") that is over as soon as it is opened."""
    end = b'{"code": 0}'
    wire.read_line(connection)
    wire.send_line(connection, {"session": "1", "received": 0})
    connection.sendall(bytes([wire.EXIT]) + len(end).to_bytes(4, "big") + end)
    while connection.recv(65536):
        pass


def guest(connection: socket.socket) -> None:
    """One through Firecracker's vsock device."""
    while not connection.recv(1).endswith(b"\n"):  # CONNECT
        pass
    connection.sendall(b"OK 1\n")
    session(connection)


def clone_server(connection: socket.socket) -> None:
    """A clone that is there already."""
    servers.receive(connection)
    servers.send(connection, {"started": {"id": ID, "name": "vm"}})
    connection.recv(65536)


def pretend(layout: Layout) -> None:
    """Enter a VM named ``vm`` and a clone server with our pid."""
    state.register(layout, state.Record(ID, "vm", os.getpid(), "running", "healthy", "image", time.time(), 1, 512))
    (layout.vms / ID).mkdir()
    serve(layout.vms / ID / paths.VSOCK, guest)
    directory = layout.directory("servers") / str(os.getpid())
    directory.mkdir()
    serve(directory / servers.SOCKET, clone_server)


@contextlib.contextmanager
def pretended_machine(layout: Layout, settings: config.Config) -> Iterator[None]:
    """Fill ``layout`` with what setup makes, empty, and have a machine that runs and has all of it."""
    image = index.Image("i", "k", "6.12", "b", settings.debian_suite)
    vmm = layout.bin / "firecracker"
    for path in ("guest/i/root.img", "kernels/k/vmlinux", "kernels/k/vmlinuz", index.initrd(layout.base, "k", "b"), vmm):
        (layout.base / path).parent.mkdir(parents=True, exist_ok=True)
        (layout.base / path).touch()
    found = os.stat(vmm)
    index.image_pointer(settings, layout.base).write_text(index.to_json(image))
    choice = index.Firecracker(str(vmm), "1", found.st_size, found.st_mtime_ns, False)
    (layout.bin / "firecracker.json").write_text(index.to_json(choice))
    places = Places.of(layout.base)
    places.make()
    fcntl.flock(os.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC), fcntl.LOCK_EX)
    (places.runtime / "synced").write_text(sync.plan(setup.find(settings, layout), layout.base).key)
    serve(places.session, session)
    try:
        yield
    finally:
        shutil.rmtree(places.runtime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_const", dest="rounds", const=5, help="five rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        layout = Layout(Path(directory) / "base")
        env = {
            **process.environment(),
            "FCVM_MACHINE": "never",
            "FCVM_BASE_DIR": str(layout.base),
            "PYTHONPYCACHEPREFIX": f"{directory}/compiled",  # modules are compiled, as a user's are, wherever this runs
        }
        commands = {
            "interpreter": ([sys.executable, "-c", "pass"], env),
            "fcvm --help": ([FCVM, "--help"], env),
            "fcvm ls": ([FCVM, "ls"], env),
            "fcvm exec": ([FCVM, "exec", "vm", "--", "true"], env),
            "fcvm snapshot run --exec": ([FCVM, "snapshot", "run", "--pid", str(os.getpid()), "--exec", "true"], env),
            "fcvm ls, forwarded": ([FCVM, "ls"], {**env, "FCVM_MACHINE": "always"}),
        }
        taken: dict[str, list[tuple[float, float]]] = {title: [] for title in commands}
        pretend(layout)
        with pretended_machine(layout, config.load(env=env)):
            for command in commands.values():
                seconds(*command)  # compiles
            for _ in range(args.rounds):  # in turn, so that all see the same load
                for title, command in commands.items():
                    taken[title].append(seconds(*command))
    least, least_cpu = medians(taken["interpreter"])
    print(f"{'command':<26} {'median, ms':>10} {'beyond the interpreter':>24} {'CPU, ms':>9} {'beyond':>8}")
    results = {}
    for title, values in taken.items():
        wall, cpu = medians(values)
        bound = title in BOUND
        results[title] = {"ms": wall, "beyond_ms": wall - least, "cpu_beyond_ms": cpu - least_cpu, "target": bound}
        late = f"  over {TARGET:g} ms" if bound and wall - least > TARGET else ""
        print(f"{title:<26} {wall:10.1f} {wall - least:24.1f} {cpu:9.1f} {cpu - least_cpu:8.1f}{late}")
    if args.json:
        args.json.write_text(json.dumps({"commands": results, "target_beyond_ms": TARGET}, indent=1) + "\n")


if __name__ == "__main__":
    main()
