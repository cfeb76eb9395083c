"""An ordinary user, for tests that run as root."""

import os
import pwd
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
PYTHON = "/usr/bin/python3"  # the one of a virtual environment may be under a home that others cannot enter


@pytest.fixture
def user() -> Iterator[pwd.struct_passwd]:
    """An ordinary user, who is there for one test."""
    name = f"fcvm-{secrets.token_hex(4)}"
    subprocess.run(["useradd", "--create-home", name], check=True)
    try:
        yield pwd.getpwnam(name)
    finally:
        subprocess.run(["userdel", "--remove", name], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture
def as_user(user: pwd.struct_passwd) -> Run:
    """Runs a command as that user, with nothing of root's environment but what ``env`` says."""

    def run(*words: str, env: dict[str, str] | None = None, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        own = {"HOME": user.pw_dir, "USER": user.pw_name, "PATH": os.environ["PATH"]}
        return subprocess.run(
            words,
            env={**own, "PYTHONPATH": str(Path(__file__).parents[1] / "src"), **(env or {})},
            cwd=user.pw_dir,
            user=user.pw_uid,
            group=user.pw_gid,
            extra_groups=[],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
