"""`fcvm exec` as a user types it, beside an interpreter's start and `crun exec`, in the same run.

    python -m bench.exec [--rounds N | --quick] [--json FILE]

Runs where the user is; both parts of the floor are timed where the VM is: in the machine, if there is no KVM. A command is
forwarded to there, and is a fork of an interpreter that has fcvm imported (fcvm/machine/zygote.py).
What an interpreter takes to start here is shown beside it. Target: at most 1.5 times the floor.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

from bench.common import FCVM, INTERPRETER, beside, now, show, summary
from bench.guests import COMMAND, CRUN
from fcvm import config, host

START = """
import subprocess, sys, time
start = time.perf_counter()
subprocess.run([sys.executable, "-c", "pass"], check=True)
print(time.perf_counter() - start)
"""


def timed(words: list[str]) -> float:
    """Seconds that a command takes."""
    start = now()
    subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return now() - start


def printed(*words: str) -> float:
    """Seconds that a command prints."""
    return float(subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_const", dest="rounds", const=4, help="four rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    args = parser.parse_args()
    there = [*FCVM, "machine", "ssh", "--"] if host.uses_machine(config.load()) else []
    name = f"bench-{os.getpid()}"
    here: list[float] = []
    python: list[float] = []
    crun: list[float] = []
    ours: list[float] = []
    subprocess.run([*FCVM, "podman", "run", "-d", "--name", name, "localhost/fcvm-demo", "--", "sleep", "86400"], check=True)
    try:
        for number in range(args.rounds + 1):
            ours.append(timed([*FCVM, "exec", name, "--", *COMMAND]))
            here.append(timed(INTERPRETER))
            python.append(printed(*there, "python3", "-c", START))
            crun.append(printed(*FCVM, "exec", "--vm", name, "--", "python3", "-c", CRUN, *COMMAND))
            if number == 0:  # what is imported for the first time
                for values in (ours, here, python, crun):
                    values.clear()
    finally:
        subprocess.run([*FCVM, "stop", "-t", "0", name], stdout=subprocess.DEVNULL, check=True)
    result = {
        "exec": {
            **beside([a + b for a, b in zip(python, crun, strict=True)], ours),
            "interpreter": summary(python),
            "crun": summary(crun),
            "interpreter here": summary(here),
        }
    }
    show("exec, as typed", result["exec"])
    for part in ("interpreter", "crun", "interpreter here"):
        print(f"  {part:<38} {result['exec'][part]['ms']:9.3f} ms")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
