"""What a command costs before it does anything: `fcvm --help`, `fcvm ls`, beside a bare interpreter.

    python -m bench.start

Target: the interpreter's start plus at most 30 ms.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 21


def seconds(command: list[str], env: dict[str, str]) -> float:
    """How long ``command`` takes."""
    started = time.perf_counter()
    subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as base:
        env = {**os.environ, "FCVM_MACHINE": "never", "FCVM_BASE_DIR": base}
        commands = {
            "interpreter": [sys.executable, "-c", "pass"],
            "fcvm --help": [sys.executable, "-m", "fcvm", "--help"],
            "fcvm ls": [sys.executable, "-m", "fcvm", "ls"],
        }
        taken: dict[str, list[float]] = {title: [] for title in commands}
        for _ in range(ROUNDS):  # in turn, so that all see the same load
            for title, command in commands.items():
                taken[title].append(seconds(command, env))
    least = statistics.median(taken["interpreter"])
    print(f"{'command':<16} {'median ms':>10} {'beyond the interpreter':>24}")
    for title, values in taken.items():
        median = statistics.median(values)
        print(f"{title:<16} {median * 1e3:10.1f} {(median - least) * 1e3:21.1f} ms")


if __name__ == "__main__":
    main()
