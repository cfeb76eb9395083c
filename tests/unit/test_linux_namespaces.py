"""fcvm.linux.namespaces: what comes back from the child."""

import os
import resource

import pytest

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
