"""fcvm.linux.namespaces: what comes back from the child."""

import gc
import os
import resource
import socket
from contextlib import ExitStack

import pytest

from fcvm.errors import HostError
from fcvm.linux import namespaces


def test_descriptors_that_there_is_no_room_for_are_an_error() -> None:
    """The kernel passes on as many as fit, and the last of them would be taken for the namespace."""
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(20)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 10, before[1]))
        held = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Too many open files"):
            namespaces._in_child(lambda: opened)
        assert len(os.listdir("/proc/self/fd")) <= held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for fd in opened:
            os.close(fd)


def sockets() -> list[int]:
    with ExitStack() as undo:
        made = [undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(4)]
        return [sock.detach() for sock in made]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("user", [False, True])
def test_wherever_descriptors_run_out_nothing_is_left(user: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    left: set[str] = set()
    outcomes = []
    for room in range(14):
        gc.collect()  # what other tests have left is closed now, not when there is to be no room
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(highest + 1 - len(os.listdir("/proc/self/fd")))]  # no gaps
        first = os.open(os.devnull, os.O_RDONLY)
        held = os.listdir("/proc/self/fd")
        resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, before[1]))
        try:
            namespace, fds = namespaces.create(sockets, user=user)
            outcomes.append("")
            namespace.close()
        except (OSError, HostError) as error:
            fds = []
            outcomes.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for fd in fds:
                os.close(fd)
            left |= set(os.listdir("/proc/self/fd")) - set(held)
            for fd in [*taken, first]:
                os.close(fd)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
    assert not left
    made = outcomes.index("")
    assert 0 < made < len(outcomes) - 1
    assert not any(outcomes[made:])
    assert all("too many open files" in outcome.lower() for outcome in outcomes[:made])
