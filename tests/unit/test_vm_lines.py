"""The log as lines: `fcvm logs --tail`, `--since`, `--timestamps`."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli_main import fcvm

from fcvm.cli.values import moment
from fcvm.errors import UsageError
from fcvm.storage.layout import Layout
from fcvm.vm import lines, output, state

HOUR = 3600 * 10**9


def test_the_newest_lines_of_both_streams() -> None:
    log = [(10, "stdout", b"a\nb\nc"), (11, "stderr", b"oh\n"), (12, "stdout", b"c\nd")]
    for count, out, err in (
        (0, b"", b""),
        (1, b"d", b""),  # begun in the middle of a chunk
        (2, b"c\nd", b"oh\n"),
        (3, b"cc\nd", b"oh\n"),  # the line that was open when the other stream wrote is whole
        (5, b"a\nb\ncc\nd", b"oh\n"),
        (50, b"a\nb\ncc\nd", b"oh\n"),
    ):
        shown = list(lines.since(lines.newest(log, count), log))
        assert b"".join(data for _, stream, data in shown if stream == "stdout") == out, count
        assert b"".join(data for _, stream, data in shown if stream == "stderr") == err, count


@given(st.lists(st.lists(st.sampled_from([b"x", b"\n", b"\r", b"yy"]), min_size=1).map(b"".join)), st.integers(0, 12))
def test_the_newest_lines_of_one_stream_are_those_of_tail(chunks: list[bytes], count: int) -> None:
    log = [(number + 1, "stdout", data) for number, data in enumerate(chunks)]
    whole = b"".join(chunks)
    wanted = b"".join(lines.pieces(whole)[-count:] if count else [])
    assert b"".join(data for *_, data in lines.since(lines.newest(log, count), log)) == wanted


def test_a_clock_that_was_set_back_hides_nothing() -> None:
    log = [(10, "stdout", b"a\n"), (20, "stdout", b"b\n"), (5, "stdout", b"c\n")]
    assert [data for *_, data in lines.since((15, 0), log)] == [b"b\n", b"c\n"]


def test_every_line_has_the_time_of_its_beginning() -> None:
    log = [(1_000_000_001, "stdout", b"one\ntw"), (2_500_000_000, "stderr", b"!\n"), (3_000_000_000, "stdout", b"o\n\n")]
    assert [data for *_, data in lines.stamped(log)] == [
        b"1970-01-01T00:00:01.000000001Z one\n1970-01-01T00:00:01.000000001Z tw",
        b"1970-01-01T00:00:02.500000000Z !\n",
        b"o\n1970-01-01T00:00:03.000000000Z \n",
    ]


def test_moments() -> None:
    ago = time.time_ns() - moment("1h30m", "--since")
    assert abs(ago - 1.5 * HOUR) < 60 * 10**9
    assert moment("2026-01-31T12:00:00.5+01:00", "--since") == 1769857200_500_000_000
    for text in ("", "soon", "10", "2026-13-01", "m", "1m1h"):
        with pytest.raises(UsageError):
            moment(text, "--since")


def test_the_command(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "base")
    vm = layout.directory("vms") / "0123456789ab"
    vm.mkdir()
    record = state.Record(vm.name, "web", 0, "exited", "stopped", "image", time.time(), 1, 512, keep=True)
    state.register(layout, record).close()
    old, new = time.time_ns() - 2 * HOUR, time.time_ns() - HOUR
    (vm / output.LOG).write_bytes(output.packed(old, "stdout", b"old\n") + output.packed(new, "stderr", b"new\n"))
    (vm / output.CLOSED).touch()
    for words, out, err in (
        ([], "old\n", "new\n"),
        (["--tail", "1"], "", "new\n"),
        (["--tail", "1", "-f"], "", "new\n"),
        (["--since", "90m"], "", "new\n"),
        (["--since", "1h", "--tail", "5"], "", ""),
        (["--since", "3h", "--tail", "1"], "", "new\n"),
    ):
        done = fcvm("logs", *words, "web", base=layout.base)
        assert (done.returncode, done.stdout, done.stderr) == (0, out, err), words
    stamped = fcvm("logs", "-t", "--tail", "1", "web", base=layout.base).stderr
    assert stamped.startswith(time.strftime("%Y-%m-%dT", time.gmtime(new // 10**9)))
    assert stamped.endswith("Z new\n")
    for words, message in ((["--tail", "-1"], "--tail"), (["--since", "x"], "is no time"), (["--console", "-f"], "whole")):
        done = fcvm("logs", "web", *words, base=layout.base)
        assert (done.returncode, done.stdout) == (125, "")
        assert message in done.stderr
