"""fcvm.linux.leash: the kernel kills what is tied."""

import signal
import subprocess

from fcvm.linux.leash import Leash


def test_a_tied_process_ends_when_the_leash_is_closed() -> None:
    leash = Leash()
    process = subprocess.Popen(["sleep", "600"], pass_fds=(leash.end,))
    leash.tie(process.pid)
    assert process.poll() is None
    leash.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    leash.close()


def test_others_are_not_touched() -> None:
    one, two = Leash(), Leash()
    with (
        subprocess.Popen(["sleep", "600"], pass_fds=(one.end,)) as first,
        subprocess.Popen(["sleep", "600"], pass_fds=(two.end,)) as second,
    ):
        one.tie(first.pid)
        two.tie(second.pid)
        one.close()
        assert first.wait(timeout=60) == -signal.SIGKILL
        assert second.poll() is None
        two.close()
