"""What the watcher makes of the host's events, whatever other threads do meanwhile."""

import errno
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fuse_pipe import messages as m
from fuse_pipe import watch
from fuse_pipe.nodes import Node
from fuse_pipe.volume import Volume
from fuse_pipe.watch import Watcher

NUMBER = 7  # of the watch of the root


class Taken(dict[Any, Any]):
    """Another thread removes what was just looked for."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().pop(key, default)

    def __contains__(self, key: object) -> bool:
        return super().pop(key, None) is not None


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[Watcher]:
    """A watcher whose thread does not run: the tests do what it does."""
    volume = Volume(str(tmp_path), watch=False)
    made = Watcher(volume)
    root = volume.table.root
    root.watch = NUMBER
    made.watches[NUMBER] = root
    yield made
    for fd in (made.fd, made._stop_read, made._stop_write):
        os.close(fd)
    volume.close()


def root_of(watcher: Watcher) -> Node:
    return watcher.volume.table.root


def event(mask: int, name: bytes = b"") -> bytes:
    padded = name + bytes(-len(name) % 16) if name else b""
    return struct.pack("iIII", NUMBER, mask, 0, len(padded)) + padded


@pytest.mark.parametrize("mask", [watch.IN_IGNORED, watch.IN_CREATE])
def test_a_directory_that_is_forgotten_as_its_event_is_read(watcher: Watcher, mask: int) -> None:
    watcher.watches = Taken(watcher.watches)
    watcher._judge(event(mask, b"f" if mask == watch.IN_CREATE else b""))
    assert not watcher.watches


def test_a_directory_whose_end_is_read_as_it_is_forgotten(watcher: Watcher) -> None:
    watcher.watches = Taken(watcher.watches)
    watcher.remove(root_of(watcher))
    assert not watcher.watches
    assert root_of(watcher).watch is None


def test_an_event_that_is_read_as_it_is_found_not_to_come(watcher: Watcher) -> None:
    watcher._expected = Taken({(NUMBER, b"f"): 1})
    watcher._judge(event(watch.IN_CREATE, b"f"))
    assert not watcher._expected


def test_events_are_counted_while_others_are_expected(watcher: Watcher) -> None:
    """One too many, and a change by the host would be taken for the kernel's own."""
    names = ((root_of(watcher), b"f"),)
    others: list[threading.Thread] = []

    class Overtaken(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            found = super().get(key, default)
            if not others:
                others.append(threading.Thread(target=watcher._judge, args=(event(watch.IN_CREATE, b"f"),)))
                others[0].start()
                others[0].join(1)  # longer than it takes, where nothing holds it up
            return found

    watcher.expect(names, 2)
    watcher._expected = Overtaken(watcher._expected)
    watcher.expect(names)
    others[0].join()
    assert watcher._expected == {(NUMBER, b"f"): 2}


@pytest.mark.parametrize("step", [-3600, 3600])
def test_a_file_is_looked_at_though_the_clock_was_set(watcher: Watcher, step: int) -> None:
    """It was written from the other side an hour from now, or ago."""
    sent: list[bytes] = []
    watcher.notify = taking(sent)
    root = root_of(watcher)
    root.data_at = time.time_ns() + step * 10**9
    watcher._judge(event(watch.IN_ATTRIB))
    assert len(sent) == 1
    root.told = None
    watcher._deferred[root] = None
    watcher._check_deferred()
    assert len(sent) == 2


def test_the_watcher_outlives_what_it_cannot_make_sense_of(watcher: Watcher, caplog: pytest.LogCaptureFixture) -> None:
    sent = threading.Event()
    judge = watcher._judge

    def fail(data: bytes) -> None:
        watcher._judge = judge  # type: ignore[method-assign]
        raise KeyError("nothing of the kind")

    watcher.notify = lambda message: sent.set() is None
    watcher._judge = fail  # type: ignore[method-assign]
    root_of(watcher).watch = None
    watcher.add(root_of(watcher))
    watcher._thread.start()
    try:
        os.utime(watcher.volume.path)
        assert sent.wait(60)
    finally:
        os.write(watcher._stop_write, b"x")
        watcher._thread.join(60)
    assert "nothing of the kind" in caplog.text


def entries(sent: list[bytes]) -> list[tuple[bytes, int]]:
    """Names that the kernel was told to drop, or to ask for again, and the flags that say which."""
    return [
        (message[m.OUT_HEADER.size + m.NOTIFY_INVAL_ENTRY_OUT.size : -1], m.NOTIFY_INVAL_ENTRY_OUT.unpack_from(message, 16)[2])
        for message in sent
        if m.OUT_HEADER.unpack_from(message)[1] == m.NOTIFY_INVAL_ENTRY
    ]


@pytest.fixture
def known(watcher: Watcher, tmp_path: Path) -> list[bytes]:
    """What a kernel was told that knows the directory ``there`` and that there is no ``missing``; what it is told now."""
    sent: list[bytes] = []
    (tmp_path / "there").mkdir()
    table = watcher.volume.table
    table.learn(table.root, b"there", os.stat(tmp_path / "there"))
    table.missing(table.root, b"missing")
    watcher.notify = taking(sent)
    return sent


def taking(sent: list[bytes], takes: bool = True) -> Callable[[bytes], bool]:
    """What takes notifications, or says that it does not."""

    def notify(message: bytes) -> bool:
        sent.append(message)
        return takes

    return notify


def test_what_makes_up_for_lost_notifications_drops_no_names(watcher: Watcher, known: list[bytes]) -> None:
    """With a name that is dropped goes what is mounted there."""
    watcher.volume.flags = m.HAS_EXPIRE_ONLY
    assert len(list(watcher.invalidate_all())) == 4
    assert entries(known) == [(b"there", m.EXPIRE_ONLY), (b"missing", m.EXPIRE_ONLY)]


def test_a_kernel_that_can_only_drop_names_is_told_of_those_that_changed(watcher: Watcher, known: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "missing").touch()
    list(watcher.invalidate_all())
    assert entries(known) == [(b"missing", 0)]


def test_a_name_that_cannot_be_looked_at_is_not_dropped(
    watcher: Watcher, known: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = root_of(watcher)
    node = root.children[b"there"]

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        watcher.check_name(root, b"there")
    assert entries(known) == [(b"there", m.EXPIRE_ONLY)]
    assert root.children[b"there"] is node


def test_what_could_not_be_told_is_told_later(watcher: Watcher, known: list[bytes], tmp_path: Path) -> None:
    root = root_of(watcher)
    (tmp_path / "missing").touch()
    for takes in (False, True):
        watcher.notify = taking(known, takes)
        known.clear()
        watcher.check_name(root, b"missing")
        watcher.check_file(root)
        assert entries(known) == [(b"missing", 0)]
        assert len(known) == 2
        assert (b"missing" in root.children) == (not takes)
    known.clear()
    watcher.check_all()
    assert not entries(known)


def test_what_is_expected_is_counted_while_events_are_lost(watcher: Watcher) -> None:
    others: list[threading.Thread] = []

    class Overtaken(dict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            found = super().get(key, default)
            others.append(threading.Thread(target=watcher._catch_up))
            others[0].start()
            others[0].join(1)  # longer than it takes, where nothing holds it up
            return found

    names = ((root_of(watcher), b"f"),)
    watcher._expected = Overtaken({(NUMBER, b"f"): 2})
    watcher.expect(names)
    others[0].join()
    assert not watcher._expected


def test_a_file_whose_name_is_removed_as_it_is_looked_at(watcher: Watcher) -> None:
    class Unnamed(Node):
        parents: ClassVar[list[Node]] = [root_of(watcher)]

        @property
        def parent(self) -> Node | None:  # type: ignore[override]
            return self.parents.pop() if self.parents else None

        @parent.setter
        def parent(self, parent: Node | None) -> None:
            pass

    watcher.volume.table.by_id[99] = Unnamed(99, stat.S_IFREG, 1, 1)
    watcher.check_all()
    assert not Unnamed.parents
