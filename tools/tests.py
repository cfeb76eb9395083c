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
TESTS_FAILED = 1  # of pytest's exit codes


def main() -> int:
    tiers = sys.argv[1:] or ["unit", "host", "vm"]
    results = {tier: run(tier) for tier in tiers}
    print()
    print(" | ".join(f"{tier}: {counts}" for tier, (_, counts) in results.items()))
    return max(code for code, _ in results.values())


def run(tier: str) -> tuple[int, str]:
    """Run one tier; returns pytest's exit code and its counts as text.

    What failed is run once more by itself: emulated guests beside other work on two cores now and then take longer than
    any limit that would still find a hang. A test that fails twice has failed, and every second try is counted.
    """
    code, counts = pytest(tier)
    if code == TESTS_FAILED:
        print(f"\n=== tests/{tier}, once more what failed", flush=True)
        code, again = pytest(tier, "--last-failed", "--last-failed-no-failures=none")
        counts += f"; of these at the second try: {again}"
    return code, counts


def pytest(tier: str, *options: str) -> tuple[int, str]:
    """One run of pytest: its exit code and its counts."""
    print(f"\n=== tests/{tier}", flush=True)
    sudo = ["sudo", "-E"] if tier in NEED_ROOT and os.geteuid() != 0 else []
    command = [*sudo, sys.executable, "-m", "pytest", f"tests/{tier}", "-q", "--durations=12", *options]
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
