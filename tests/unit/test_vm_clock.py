"""A restored guest's clock, with guests whose messages take given times."""

import random
from types import SimpleNamespace
from typing import Any

import pytest

from fcvm.vm import clock, messages
from fcvm.vm.clock import CLOSE, TRIES, Clock

MS = 1_000_000


class Guest:
    """A guest whose clock is ``off`` nanoseconds wrong; a message to it and back takes what ``delays`` says."""

    def __init__(self, off: int, delays: list[int]) -> None:
        self.time = 1_700_000_000 * 1_000_000_000
        self.off = off
        self.delays = delays
        self.asked: list[dict[str, Any]] = []
        self.pauses: list[int] = []  # nanoseconds between an answer and the question after it
        self.clock = Clock(self.asked.append, lambda: self.time, lambda: self.time / 1e9)

    def settle(self) -> int:
        """Answer all questions; returns how many there were."""
        count = 0
        while self.asked or self.clock.due is not None:
            if self.clock.due is not None:
                assert not self.asked
                self.pauses.append(round(self.clock.due * 1e9) - self.time)
                self.time += self.pauses[-1]
                self.clock.ask()
            message = self.asked.pop()
            self.time += self.delays.pop(0)
            self.off += message["adjust_ns"]
            shown = self.time + self.off
            self.time += self.delays.pop(0)
            self.clock.answered({"type": "clock", "sent_ns": message["sent_ns"], "now_ns": shown})
            count += 1
        return count


def test_where_messages_are_fast_nothing_is_asked() -> None:
    guest = Guest(off=-MS, delays=[])
    sent = guest.time
    guest.time += 2 * MS
    guest.clock.was_set(sent)
    assert guest.settle() == 0


def test_a_late_clock_is_set_right() -> None:
    guest = Guest(off=-155 * MS, delays=[MS] * 20)
    sent = guest.time
    guest.time += 170 * MS
    guest.clock.was_set(sent)
    assert guest.settle() == 2  # one that tells, one that shows that it helped
    assert abs(guest.off) <= MS


def test_it_is_right_in_the_end_though_no_message_is_fast() -> None:
    """Ways of 10 to 40 ms: no single answer tells the time to 10 ms, all of them do."""
    right = 0
    for seed in range(200):
        rng = random.Random(seed)
        guest = Guest(off=-rng.randrange(200 * MS), delays=[rng.randrange(10 * MS, 40 * MS) for _ in range(2 * TRIES)])
        guest.clock.was_set(guest.time - 200 * MS)
        guest.settle()
        assert abs(guest.off) <= 25 * MS
        right += abs(guest.off) <= 10 * MS
    assert right > 190


def test_each_question_waits_longer_than_the_one_before() -> None:
    """They would take the time of what makes them slow."""
    guest = Guest(off=-155 * MS, delays=[40 * MS] * 2 * TRIES)
    guest.clock.was_set(guest.time - 170 * MS)
    guest.settle()
    tens = [round(pause / MS, -1) for pause in guest.pauses]
    assert tens[:8] == [80, 160, 320, 640, 1280, 2560, 5120, 5120]
    assert set(tens[7:]) == {5120}


def test_a_correction_does_not_wait() -> None:
    guest = Guest(off=-155 * MS, delays=[20 * MS] * 2 * TRIES)
    guest.clock.was_set(guest.time - 170 * MS)
    for _ in range(2):
        (message,) = guest.asked
        guest.asked.clear()
        guest.off += message["adjust_ns"]
        guest.time += 20 * MS
        guest.clock.answered({"sent_ns": message["sent_ns"], "now_ns": guest.time + guest.off})
    assert abs(guest.off) <= 20 * MS
    assert guest.clock.due is not None


def test_a_clock_that_others_move_meanwhile_is_followed() -> None:
    guest = Guest(off=-155 * MS, delays=[8 * MS, MS] * TRIES)
    guest.clock.was_set(guest.time - 170 * MS)
    guest.time += 3600 * 1000 * MS  # the host's clock is put forward
    guest.settle()
    assert abs(guest.off) <= CLOSE


def test_it_gives_up() -> None:
    guest = Guest(off=-155 * MS, delays=[40 * MS] * 2 * TRIES)
    guest.clock.was_set(guest.time - clock.CLOSE - 1)
    assert guest.settle() == TRIES
    assert abs(guest.off) <= 40 * MS


@pytest.mark.parametrize(
    "times",
    [
        {},
        {"sent_ns": None, "now_ns": None},
        {"sent_ns": 1},
        {"sent_ns": "1", "now_ns": "2"},
        {"sent_ns": 1.0, "now_ns": float("nan")},
        {"sent_ns": [], "now_ns": {}},
    ],
)
def test_what_is_no_answer_is_ignored(times: dict[str, Any]) -> None:
    guest = Guest(off=-155 * MS, delays=[MS] * 20)
    guest.clock.was_set(guest.time - 170 * MS)
    question = guest.asked[:]
    guest.clock.answered({"type": "clock", **times})
    assert guest.asked == question, "it is not asked again"
    assert guest.settle() == 2, "and the true answer counts"


def test_absurd_times_and_answers_to_nothing_end() -> None:
    guest = Guest(off=0, delays=[])
    guest.clock.answered({"sent_ns": 0, "now_ns": 1 << 200})
    assert guest.asked == []
    guest.clock.was_set(guest.time - 170 * MS)
    guest.clock.answered({"sent_ns": -(1 << 200), "now_ns": 1 << 200})
    assert len(guest.asked) == 1
    for _ in range(3 * TRIES):
        guest.time += 20 * MS
        guest.clock.answered({"sent_ns": guest.asked[-1]["sent_ns"], "now_ns": 1 << 200})
    assert len(guest.asked) <= TRIES
    assert guest.clock.due is None or guest.clock.due < guest.time / 1e9 + 2


def test_a_guest_that_was_long_in_getting_its_plan_is_asked() -> None:
    guest = Guest(off=-250 * MS, delays=[MS] * 20)
    timings = SimpleNamespace(guest=lambda *_: None)
    vm: Any = SimpleNamespace(clock=guest.clock, identified_at=guest.time - 260 * MS, timings=timings)
    for stage in ("modules", "plan", "start"):
        messages.deal(vm, {"type": "stage", "name": stage, "uptime": 1.0})
    assert guest.settle() == 2
    assert abs(guest.off) <= MS
