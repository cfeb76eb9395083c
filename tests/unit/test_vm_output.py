"""The container's output: log, prefixes, following."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fcvm.storage.rotating import RotatingFile
from fcvm.vm import output as module
from fcvm.vm.output import CLOSED, LOG, Marks, Output, follow_log, read_log


def streams(records) -> tuple[bytes, bytes]:
    out, err = b"", b""
    for _, stream, data in records:
        if stream == "stdout":
            out += data
        else:
            err += data
    return out, err


def test_the_log_is_exact_and_keeps_streams_apart(tmp_path: Path) -> None:
    output = Output(tmp_path / LOG, 1 << 20, show=False, prefix=False)
    blob = bytes(range(256)) * 100
    output.write("stdout", blob)
    output.write("stderr", b"no newline")
    output.write("stdout", b"\n\n")
    output.close()
    assert streams(read_log(tmp_path)) == (blob + b"\n\n", b"no newline")


def test_the_log_keeps_the_newest_within_its_limit(tmp_path: Path) -> None:
    output = Output(tmp_path / LOG, 10_000, show=False, prefix=False)
    for number in range(1000):
        output.write("stdout", b"%04d" % number + b"x" * 96)
    output.close()
    out, _ = streams(read_log(tmp_path))
    assert out.endswith(b"0999" + b"x" * 96)
    assert 9_000 <= len(out) <= 20_000
    assert len(out) % 100 == 0


FULL_DISK = """
import resource, sys
from pathlib import Path
from fcvm.vm.output import Output, read_log
output = Output(Path(sys.argv[1]) / "container.log", 1 << 20, show=False, prefix=False)
output.write("stdout", b"before ")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
output.write("stdout", b"x" * 10_000)  # the disk takes a part of it
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
output.write("stdout", b"after")
print(b"".join(data for _, _, data in read_log(Path(sys.argv[1]))).decode())
"""


def test_what_a_full_disk_loses_of_the_log_garbles_nothing_else(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "before after\n"


def test_a_log_that_cannot_be_rotated_goes_on_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RotatingFile(tmp_path / "log", 10)
    log.write(b"12345678")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        log.write(b"lost")
    log.write(b"90")
    log.write(b"next")
    log.close()
    assert [(tmp_path / name).read_bytes() for name in ("log.1", "log")] == [b"1234567890", b"next"]


def refuse(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_prefixes_begin_every_line_once(tmp_path: Path, capfd) -> None:
    output = Output(tmp_path / LOG, 1 << 20, show=True, prefix=True)
    for data in (b"one\ntw", b"o\n", b"\n", b"three"):
        output.write("stdout", data)
    output.write("stderr", b"bad\n")
    output.close()
    out, err = capfd.readouterr()
    assert out == "[ctr:out] one\n[ctr:out] two\n[ctr:out] \n[ctr:out] three\n"
    assert err == "[ctr:err] bad\n"


def test_a_line_that_is_left_open_ends_where_it_began(tmp_path: Path, capfd) -> None:
    output = Output(tmp_path / LOG, 1 << 20, show=True, prefix=True)
    output.write("stdout", b"out\n")
    output.write("stderr", b"err")
    output.close()
    assert capfd.readouterr() == ("[ctr:out] out\n", "[ctr:err] err\n")


def test_a_reader_that_stands_still_does_not_keep_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor ends the output when it waits no longer; a line left open behind a mark made it wait all the same."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    monkeypatch.setitem(module._NUMBER, "stdout", write)
    output = Output(tmp_path / LOG, 1 << 20, show=True, prefix=True)
    output.write("stdout", b"begun")
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    closing = threading.Thread(target=output.close, daemon=True)
    closing.start()
    closing.join(30)
    assert not closing.is_alive()
    os.close(read)
    os.close(write)


def test_what_is_no_terminal_is_exact_though_the_other_is_one(tmp_path: Path) -> None:
    master, line = os.openpty()
    with open(tmp_path / "file", "wb") as file:
        for fds, streams in (((line, file.fileno()), ["stdout"]), ((file.fileno(), line), ["stderr"]), ((line, line), ["stdout", "stderr"])):
            assert Marks(None, fds).streams == streams
            assert Marks(False, fds).streams == []
            assert Marks(True, fds).streams == ["stdout", "stderr"]
        marks = Marks(None, (line, file.fileno()))
        assert (marks.put("stdout", b"x\n"), marks.put("stderr", b"\0\n")) == (b"[ctr:out] x\n", b"\0\n")
    os.close(master)
    os.close(line)


def test_streams_on_one_terminal_share_no_line(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.samestat", lambda *_: True)
    output = Output(tmp_path / LOG, 1 << 20, show=True, prefix=True)
    output.write("stdout", b"half")
    output.write("stderr", b"whole\n")
    output.write("stdout", b" a line\n")
    output.close()
    out, err = capfd.readouterr()
    assert out == "[ctr:out] half[ctr:out]  a line\n"
    assert err == "\n[ctr:err] whole\n"


def test_following_ends_with_the_container_and_survives_rotation(tmp_path: Path) -> None:
    output = Output(tmp_path / LOG, 1 << 20, show=False, prefix=False)
    output.write("stdout", b"before\n")
    seen: list[bytes] = []
    first = threading.Event()

    def follow() -> None:
        for _, _, data in follow_log(tmp_path):
            seen.append(data)
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(60)
    output.write("stdout", b"after\n")
    output.write("stdout", b"x" * (1 << 20))  # rotates
    output.write("stdout", b"end\n")
    output.close()
    (tmp_path / CLOSED).touch()
    thread.join(60)
    assert not thread.is_alive()
    assert b"".join(seen) == b"before\nafter\n" + b"x" * (1 << 20) + b"end\n"


def test_a_log_is_followed_from_before_its_beginning(tmp_path: Path) -> None:
    seen: list[bytes] = []
    thread = threading.Thread(target=lambda: seen.extend(data for _, _, data in follow_log(tmp_path)))
    thread.start()
    output = Output(tmp_path / LOG, 1 << 20, show=False, prefix=False)
    output.write("stdout", b"first")
    output.close()
    (tmp_path / CLOSED).touch()
    thread.join(60)
    assert not thread.is_alive()
    assert seen == [b"first"]


def test_a_log_that_never_came_ends_with_its_vm(tmp_path: Path) -> None:
    (tmp_path / CLOSED).touch()
    assert list(follow_log(tmp_path)) == []


def test_what_is_written_while_a_follower_looks_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Output(tmp_path / LOG, 1 << 10, show=False, prefix=False)
    log.write("stdout", b"one ")
    look, looks = module._inode, iter(range(1000))

    def inode(path: Path) -> int | None:
        found = look(path)
        if next(looks) == 0:  # between our look at the file's name and that at the end
            for data in (b"two " * 256, b"three"):  # each is a file of its own
                log.write("stdout", data)
            log.close()
            (tmp_path / CLOSED).touch()
        return found

    monkeypatch.setattr(module, "_inode", inode)
    assert b"".join(data for _, _, data in follow_log(tmp_path)) == b"one " + b"two " * 256 + b"three"


def test_a_reader_that_goes_away_is_told_of_once_and_the_log_goes_on(tmp_path: Path) -> None:
    read, write = os.pipe()
    saved = os.dup(1)
    output = Output(tmp_path / LOG, 1 << 20, show=True, prefix=False)
    try:
        os.dup2(write, 1)
        os.close(write)
        os.close(read)
        with pytest.raises(BrokenPipeError):
            output.write("stdout", b"lost")
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    assert output.closed
    output.write("stdout", b" and kept")
    output.close()
    assert streams(read_log(tmp_path))[0] == b"lost and kept"


def test_a_stdout_that_does_not_block_gets_everything() -> None:
    """Whoever shares it may have made it so: node does."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    data = bytes(range(256)) * 4096
    thread = threading.Thread(target=module.write_all, args=(write, data))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += os.read(read, 1 << 16)
    thread.join(60)
    assert got == data
    os.close(read)
    os.close(write)
