"""What a command costs before it does anything: `fcvm --help`, `ls` and our side of `exec`, beside a bare interpreter.

    python -m bench.start [--rounds N] [--json FILE]

Target: the interpreter's start plus at most 30 ms. The VM of `exec` is a thread here that answers at once, so what is measured
is the client: finding the VM, connecting, the session's frames, the exit code.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fc_agent import channel as wire
from fcvm.storage.layout import Layout
from fcvm.vm import paths, state

TARGET = 0.030  # seconds beyond the interpreter


def seconds(command: list[str], env: dict[str, str]) -> float:
    """How long ``command`` takes."""
    started = time.perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def pretend(layout: Layout) -> None:
    """Enter a VM named ``vm`` whose guest answers every session with exit code 0."""
    record = state.Record("0123456789ab", "vm", os.getpid(), "running", "healthy", "image", time.time(), 1, 512)
    state.register(layout, record)
    directory = layout.vms / record.id
    directory.mkdir()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / paths.VSOCK))
    listener.listen(16)
    threading.Thread(target=answer, args=(listener,), daemon=True).start()


def answer(listener: socket.socket) -> None:
    """Serve sessions on a vsock device (docs/architecture.md, "Sessions") that are over as soon as they are opened."""
    end = b'{"code": 0}'
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            lines.readline()  # CONNECT
            connection.sendall(b"OK 1\n")
            lines.readline()  # {"open": ...}
            connection.sendall(b'{"session": "1", "received": 0}\n' + bytes([wire.EXIT]) + len(end).to_bytes(4, "big") + end)
            lines.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as base:
        pretend(Layout(Path(base)))
        env = {**os.environ, "FCVM_MACHINE": "never", "FCVM_BASE_DIR": base}
        fcvm = [sys.executable, "-m", "fcvm"]
        commands = {
            "interpreter": [sys.executable, "-c", "pass"],
            "fcvm --help": [*fcvm, "--help"],
            "fcvm ls": [*fcvm, "ls"],
            "fcvm exec": [*fcvm, "exec", "vm", "--", "true"],
        }
        taken: dict[str, list[float]] = {title: [] for title in commands}
        for _ in range(args.rounds):  # in turn, so that all see the same load
            for title, command in commands.items():
                taken[title].append(seconds(command, env))
    least = statistics.median(taken["interpreter"])
    print(f"{'command':<16} {'median ms':>10} {'beyond the interpreter':>24}")
    for title, values in taken.items():
        beyond = statistics.median(values) - least
        print(f"{title:<16} {(beyond + least) * 1e3:10.1f} {beyond * 1e3:21.1f} ms{'  over 30 ms' if beyond > TARGET else ''}")
    if args.json:
        args.json.write_text(json.dumps({"seconds": taken, "target_beyond_interpreter": TARGET}, indent=1) + "\n")


if __name__ == "__main__":
    main()
