"""Paths of the user's host, wherever this code runs.

A command that was forwarded to the machine is given the paths that the user typed. There the host's files are mounted
below ``FCVM_HOST_ROOT``; on the host itself the variable is not set and a path is what it is.
"""

import os
from pathlib import Path

HOST_ROOT = "FCVM_HOST_ROOT"
HOST_ADDRESS = "FCVM_HOST_ADDRESS"  # the host's own address, as it was when the command began


def in_machine() -> bool:
    """Whether this is a command that was forwarded to the machine."""
    return HOST_ROOT in os.environ


def resolve(path: str | Path) -> Path:
    """Where ``path``, absolute on the user's host, is found by this process."""
    root = os.environ.get(HOST_ROOT)
    path = Path(path)
    if not root or not path.is_absolute():
        return path
    return Path(root) / path.relative_to("/")


def original(path: str | Path) -> Path:
    """The user's own name for a path that ``resolve`` has made, for messages."""
    root = os.environ.get(HOST_ROOT)
    path = Path(path)
    if not root or not path.is_relative_to(root):
        return path
    return Path("/") / path.relative_to(root)
