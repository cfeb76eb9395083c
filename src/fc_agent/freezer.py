"""Lets nothing but the agent run while a snapshot is taken, so that in a clone nothing runs before that is itself.

A clone goes on with the random numbers of the VM that its snapshot is of. Firecracker tells the kernel (VMGenID), but by an
interrupt, and vCPUs run before that is dealt with; so does the new identity come by a message. Therefore every control
group except the agent's own is frozen before the pause and thawed afterwards: in the source at once, in a clone
when it has its identity (Linux, admin-guide/cgroup-v2.rst, "cgroup.freeze"). Whatever is killed meanwhile never runs.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

from fc_agent import linux

ROOT = "/sys/fs/cgroup"
OURS = "/proc/self/cgroup"  # cgroups(7)
OWN = "init"  # the agent's, and of Podman's service, which does nothing unasked
SESSIONS = "sessions"  # of programs that `exec --vm` runs
LIMIT = 5.0  # seconds until everything stands still; what waits for a device stops only then
LOOK = 0.001  # seconds between two looks at what nothing tells of

_changed = threading.Condition()
_frozen = False
_starting = 0
_expected: set[Callable[[], bool]] = set()


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """A program is started inside the block, which waits while everything is frozen: crun refuses to work then."""
    global _starting
    with _changed:
        _changed.wait_for(lambda: not _frozen)
        _starting += 1
    try:
        yield
    finally:
        with _changed:
            _starting -= 1
            _changed.notify_all()


def expect(begun: Callable[[], bool]) -> None:
    """Inside ``starting``, for a start that takes longer: nothing is frozen before ``begun`` says True, or ``forget``."""
    with _changed:
        _expected.add(begun)


def forget(begun: Callable[[], bool]) -> None:
    """It need not be expected any more."""
    with _changed:
        _expected.discard(begun)


def adopt(pid: int) -> None:
    """Move a program that was just started out of our own control group; what it starts is in its new one as well."""
    with contextlib.suppress(OSError):  # it has ended
        os.makedirs(f"{ROOT}/{SESSIONS}", exist_ok=True)
        linux.write(f"{ROOT}/{SESSIONS}/cgroup.procs", str(pid))


def freeze() -> bool:
    """Stop everything but us; returns whether all of it stands still. Starting programs has to wait for ``thaw``."""
    global _frozen
    deadline = time.monotonic() + LIMIT
    with _changed:
        _frozen = True
        _changed.wait_for(lambda: not _starting, LIMIT)
        expected = set(_expected)
    if not _wait(lambda: all(begun() for begun in expected), deadline):
        return False
    groups = _groups()
    for group in groups:
        _set(group, "1")
    return _wait(lambda: all(map(_stands_still, groups)), deadline)


def thaw() -> None:
    """Let everything run again; it may run already."""
    global _frozen
    for group in _groups():
        _set(group, "0")
    with _changed:
        _frozen = False
        _changed.notify_all()


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK)
    return True


def _groups() -> list[str]:
    """Those to be frozen: none where the system is not ours, which is so in tests only."""
    with open(OURS) as file:
        if file.read() != f"0::/{OWN}\n":
            return []
    return [entry.path for entry in os.scandir(ROOT) if entry.is_dir() and entry.name != OWN]


def _set(group: str, value: str) -> None:
    with contextlib.suppress(OSError):  # it is gone
        linux.write(f"{group}/cgroup.freeze", value)


def _stands_still(group: str) -> bool:
    try:
        with open(f"{group}/cgroup.events") as file:
            return "frozen 1" in file.read()
    except OSError:
        return True
