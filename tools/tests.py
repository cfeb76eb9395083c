#!/usr/bin/env python3
"""Runs the tests, tier by tier: `tools/tests.py unit host vm`; the last line has the counts of each.

The tiers host and vm need root: an ordinary user is asked for it by sudo. A tier in which nothing ran has failed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NEED_ROOT = ("host", "vm")


def main() -> int:
    tiers = sys.argv[1:] or ["unit", "host", "vm"]
    results = {tier: run(tier) for tier in tiers}
    print()
    print(" | ".join(f"{tier}: {counts}" for tier, (_, counts) in results.items()))
    return max(code for code, _ in results.values())


def run(tier: str) -> tuple[int, str]:
    """Run one tier; returns pytest's exit code and its counts as text."""
    print(f"\n=== tests/{tier}", flush=True)
    sudo = ["sudo", "-E"] if tier in NEED_ROOT and os.geteuid() != 0 else []
    command = [*sudo, sys.executable, "-m", "pytest", f"tests/{tier}", "-q"]
    counts = "nothing ran"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            # as in "=== 3 failed, 10 passed in 4.20s ===", with or without the frame
            found = re.search(r"((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s", line)
            counts = found[1] if found else counts
    return process.returncode, counts


if __name__ == "__main__":
    sys.exit(main())
