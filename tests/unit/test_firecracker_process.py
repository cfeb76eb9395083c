"""fcvm.firecracker.process with programs that are not Firecracker: nothing of them is left, not even a descriptor."""

import os
import subprocess
import threading
from pathlib import Path

import pytest

from fcvm.errors import FcvmError
from fcvm.firecracker import process
from fcvm.firecracker.process import Firecracker


def refuse(*_: object, **__: object) -> int:
    raise OSError(24, "Too many open files")


@pytest.mark.parametrize("fails", ["program is missing", "program ends", "pidfd_open", "spawn", "thread"])
def test_a_start_that_fails_leaves_nothing(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    binary = Path("/nonexistent" if fails == "program is missing" else "/bin/false")
    if fails == "pidfd_open":
        monkeypatch.setattr(os, "pidfd_open", refuse)
    if fails == "spawn":
        monkeypatch.setattr(process, "spawn", refuse)
    if fails == "thread":
        monkeypatch.setattr(threading.Thread, "start", lambda _self: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    for _ in range(3):
        with pytest.raises((OSError, RuntimeError, FcvmError)):
            Firecracker(binary, tmp_path, "test")
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) < before + 3
    assert "console" not in [thread.name for thread in threading.enumerate()]
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "comm="], capture_output=True, text=True, check=False)
    assert "false" not in children.stdout
