"""Runs a command in a mount of a new directory, relay and server between them: ``tests/fuse_mounted.py COMMAND...``."""

import subprocess
import sys

import fuse_support


def main() -> int:
    with fuse_support.scratch() as base, fuse_support.mount(base, patience=3 * 3600) as mounted:
        return subprocess.run(sys.argv[1:], cwd=mounted.path, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
