"""fcvm.signals: handled inside the block, and as before afterwards."""

import os
import signal
import threading
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
