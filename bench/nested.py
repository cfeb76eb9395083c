"""What each level of nesting costs: the host of the VMs, a VM, a VM in that VM; as ratios to the level before.

    python -m bench.nested [--rounds N | --quick] [--json FILE]

Boot, exec and network of a VM are measured by whoever runs it: the user's host for the first, the first for the second. CPU and disk
are measured where they are used; "host" is where VMs run, so the machine where there is no KVM.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fcvm import config, host

IMAGE = "localhost/fcvm-demo"
MEMORY = 320  # MiB of each VM that is not the outer one
FCVM = [sys.executable, "-m", "fcvm"]

# Both are run by `python3 -c` wherever that is, with JSON as argument, and print JSON.
HERE = """
import json, os, sys, time
path, size = json.loads(sys.argv[1])
path += f"/bench-nested-{os.getpid()}"
def rate(work, amount):
    begin = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begin)
def write():
    with open(path, "wb", buffering=0) as file:
        for _ in range(size):
            file.write(block)
        os.fsync(file.fileno())
def read():
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.read(1 << 20):
            pass
block = os.urandom(1 << 20)
try:
    print(json.dumps({"cpu": rate(lambda: sum(range(1000000)), 1), "write": rate(write, size), "read": rate(read, size)}))
finally:
    os.unlink(path)
"""
BELOW = """
import json, subprocess, sys, time, urllib.request
fcvm, vm, image, memory, url, rounds = json.loads(sys.argv[1])
def seconds(*words):
    begin = time.perf_counter()
    subprocess.run([*fcvm, *words], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begin
def fetch():
    begin = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        size = len(answer.read())
    return size / (1 << 20) / (time.perf_counter() - begin)
run = ("podman", "run", "--no-snapshot", "--cpu", "1", "--mem", memory, image, "--", "true")
boots = [seconds(*run) for _ in range(rounds)]
execs = [seconds("exec", vm, "--", "true") for _ in range(3 * rounds)]
print(json.dumps({"boot": boots, "exec": execs, "network": [fetch() for _ in range(rounds)]}))
"""
SERVE = "head -c 8388608 /dev/zero > /www/big; exec httpd -f -p {port} -h /www"

UNITS = {"boot": "s", "exec": "s", "network": "MB/s", "cpu": "1/s", "write": "MB/s", "read": "MB/s"}


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout


def python(prefix: list[str], program: str, *values: Any) -> dict[str, Any]:
    """Run one of the programs above behind ``prefix``, a command that runs commands at some level."""
    answer: dict[str, Any] = json.loads(output(*prefix, "python3", "-c", program, json.dumps(values)))
    return answer


def median(value: Any) -> float:
    return statistics.median(value) if isinstance(value, list) else float(value)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Each level's medians, by name."""
    settings = config.load()
    in_machine = host.uses_machine(settings)
    outer, inner = f"bench-{os.getpid()}", "inner"
    guest = [*FCVM, "exec", outer, "--vm", "--"]
    run = ["podman", "run", "-d", "--cpu", "1"]
    size = 16 if host.emulated() or in_machine else 256
    output(*FCVM, *run, "--name", outer, "--inception", "--mem", "2g", "-p", "127.0.0.1::8081", "-p", "127.0.0.1::8080",
           IMAGE, "--", "sh", "-c", SERVE.format(port=8081))  # fmt: skip
    try:
        output(*guest, "fcvm", *run, "--name", inner, "--mem", str(MEMORY), "-p", "8080:80",
               IMAGE, "--", "sh", "-c", SERVE.format(port=80))  # fmt: skip
        listed = next(vm for vm in json.loads(output(*FCVM, "ls", "--json")) if vm["name"] == outer)
        ports = {port["guest_port"]: port["host_port"] for port in listed["network"]["ports"]}
        levels: dict[str, Callable[[], dict[str, Any]]] = {
            "host": lambda: python([*FCVM, "machine", "ssh", "--"] if in_machine else [], HERE,
                                   "/mnt/fcvm-btrfs" if in_machine else str(settings.base_dir), size),
            "VM": lambda: {
                **python(guest, HERE, "/scratch", size),
                **python([], BELOW, FCVM, outer, IMAGE, str(MEMORY), f"http://127.0.0.1:{ports[8081]}/big", rounds),
            },
            "VM in VM": lambda: {
                **python([*guest, "fcvm", "exec", inner, "--vm", "--"], HERE, "/scratch", size),
                **python(guest, BELOW, ["fcvm"], inner, IMAGE, str(MEMORY), "http://127.0.0.1:8080/big", rounds),
            },
        }  # fmt: skip
        return {level: {name: median(value) for name, value in take().items()} for level, take in levels.items()}
    finally:
        output(*FCVM, "stop", "-t", "0", outer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_const", dest="rounds", const=1, help="one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.rounds)
    names = list(found)
    print(f"{'':<14}" + "".join(f"{name:>20}" for name in names))
    for quantity, unit in UNITS.items():
        row = f"{quantity + ', ' + unit:<14}"
        before = None
        for level in names:
            value = found[level].get(quantity)
            ratio = f" (x {value / before:.2f})" if value is not None and before else ""
            row += f"{'-' if value is None else f'{value:.2f}{ratio}':>20}"
            before = value
        print(row)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
