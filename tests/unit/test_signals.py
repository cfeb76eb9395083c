"""fcvm.signals: handled inside the block, and as before afterwards."""

import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

from fcvm.signals import STOPPING, handled


@pytest.fixture
def nohup() -> Iterator[None]:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGHUP, before)


def test_signals_are_handled_inside_the_block_only() -> None:
    seen: list[int] = []
    before = [signal.getsignal(number) for number in STOPPING]
    with handled(STOPPING, lambda number, _: seen.append(number)):
        for number in STOPPING:
            os.kill(os.getpid(), number)
    assert seen == list(STOPPING)
    assert [signal.getsignal(number) for number in STOPPING] == before


@pytest.mark.usefixtures("nohup")
def test_what_nohup_started_outlives_its_terminal() -> None:
    seen: list[int] = []
    with handled(STOPPING, lambda number, _: seen.append(number)):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_in_another_thread_nothing_is_handled() -> None:
    entered: list[bool] = []

    def body() -> None:
        with handled(STOPPING, lambda *_: None):
            entered.append(signal.getsignal(signal.SIGTERM) == before)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert entered == [True]


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_that_did_not_interrupt_what_we_wait_for_is_handled_all_the_same(again: bool) -> None:
    """As one that comes just before a call blocks; here another thread gets it, which looks the same to the main thread."""
    read, write = os.pipe()
    idle = threading.Event()
    other = threading.Thread(target=idle.wait, daemon=True)
    other.start()
    assert other.ident is not None

    def send(number: int) -> None:
        time.sleep(0.2)  # the main thread waits by then; if not, the test has nothing to show
        signal.pthread_kill(other.ident, number)

    def answer(number: int, frame: object) -> None:
        os.write(write, bytes((number,)))

    with handled(STOPPING, answer), handled((signal.SIGWINCH,), answer):
        for number in (signal.SIGTERM, signal.SIGWINCH, signal.SIGTERM)[: 3 if again else 1]:
            sender = threading.Thread(target=send, args=(number,))
            sender.start()
            assert select.select([read], [], [], 60)[0]
            assert os.read(read, 1) == bytes((number,))
            sender.join()
    idle.set()
    other.join()
    os.close(read)
    os.close(write)


def test_nothing_is_left_of_the_wait_for_signals() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = descriptors(), threads(), signal.getsignal(signal.SIGURG)
    for _ in range(20):
        with handled(STOPPING, lambda *_: None):
            os.kill(os.getpid(), signal.SIGTERM)
    assert descriptors() == before[0]
    assert signal.getsignal(signal.SIGURG) == before[2]
    assert signal.set_wakeup_fd(-1) == -1
    for _ in range(600):
        if threads() <= before[1]:
            break
        time.sleep(0.1)
    assert threads() <= before[1]


def test_the_block_ends_though_a_child_lives_that_was_forked_in_it() -> None:
    with handled(STOPPING, lambda *_: None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 and later warn of forks beside threads
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        began = time.monotonic()
    assert time.monotonic() - began < 50
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
