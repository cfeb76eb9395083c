"""What a node table knows of the file system that it serves."""

import os
import select
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fuse_support import error_of

from fuse_pipe import ahead, linux, nodes
from fuse_pipe.volume import FILE_TIME, NAME_TIME, Volume
from fuse_pipe.watch import Watcher


def opened(path: Path | str) -> int:
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def test_the_name_of_a_file_system() -> None:
    fd = opened("/proc/self/status")
    assert linux.file_system(fd) == "proc"
    major, minor = map(int, linux.device(fd).split(":"))
    assert os.makedev(major, minor) == os.fstat(fd).st_dev
    os.close(fd)


@pytest.mark.parametrize(
    ("release", "kind", "least"),
    [
        ((6, 13), "ext4", 0),
        ((6, 12), "ext4", nodes.TICK_NS),
        ((6, 13), "nfs4", nodes.TICK_NS),
    ],
)
def test_how_old_an_unchanged_file_must_be(
    release: tuple[int, int], kind: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_LINUX", release)
    monkeypatch.setattr(linux, "file_system", lambda fd: kind)
    table = nodes.NodeTable(opened(tmp_path))
    assert table.tick(os.stat(tmp_path)) == least
    assert table.tick(os.stat("/proc")) == nodes.TICK_NS  # another file system below the directory


def test_a_number_that_was_used_again_is_no_way_to_a_device(tmp_path: Path) -> None:
    """A file of another kind under the old name, with the old inode's number (ext4 gives it to the next file)."""
    table = nodes.NodeTable(opened(tmp_path))
    os.mkfifo(tmp_path / "f")
    pipe = os.stat(tmp_path / "f")
    node = table.learn(table.root, b"f", pipe)
    node.kind = stat.S_IFREG
    with pytest.raises(OSError, match="not where it was"):
        table.fd(node)
    with pytest.raises(OSError, match="not where it was"):
        table.stat(node)


def test_directories_that_were_moved_into_each_other_are_not_looked_for_in_circles(tmp_path: Path) -> None:
    """What the kernel was told at different times may be that each of two directories is in the other."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    table = nodes.NodeTable(opened(tmp_path))
    a = table.learn(table.root, b"a", os.stat(tmp_path / "a"))
    b = table.learn(a, b"b", os.stat(tmp_path / "a" / "b"))
    table.fd(b)
    (tmp_path / "a" / "b").rename(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "b" / "a")
    assert table.learn(b, b"a", os.stat(tmp_path / "b" / "a")) is a
    a.fd = b.fd = None  # as when there are too many
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.append(error_of(table.fd, a)), daemon=True)
    thread.start()
    thread.join(20)
    assert errors == ["ESTALE"]


def test_a_device_number_is_looked_up_again_when_something_was_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unmounted below the directory gives its number to the next that is mounted."""
    table = nodes.NodeTable(opened("/"))
    below = table.learn(table.root, b"proc", os.stat("/proc"))
    looked: list[int] = []
    events: list[tuple[int, int]] = []

    class Mounts:
        def poll(self, timeout: float) -> list[tuple[int, int]]:
            assert timeout == 0
            return [events.pop()] if events else []

    def is_now(name: str) -> None:
        monkeypatch.setattr(linux, "file_system", lambda fd: looked.append(fd) or name)
        events.append((0, select.POLLPRI | select.POLLERR))

    monkeypatch.setattr(table, "_mounts", Mounts())
    is_now("tmpfs")
    assert table.raises_events(below)
    assert not table.of_kernel(below)
    assert len(looked) == 1
    is_now("nfs4")
    assert not table.raises_events(below)
    is_now("sysfs")
    assert table.of_kernel(below)
    is_now("nfs4")
    assert table.raises_events(table.root)  # which keeps its number


class Vanishing(nodes.Node):
    """Another thread takes away what was just read: it removes the name, or has too many descriptors."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("fd", "parent", "watch"):
            setattr(self, name, None)
        return value


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Volume]:
    """A volume of a directory ``d`` with a file ``f``."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("content")
    made = Volume(str(tmp_path), watch=False)
    yield made
    made.close()


def vanishing(volume: Volume, path: str, parent: nodes.Node | None = None, opened: bool = False) -> Vanishing:
    info = os.stat(os.path.join(volume.path, path))
    node = Vanishing(100, stat.S_IFMT(info.st_mode), info.st_dev, info.st_ino)
    node.name = os.path.basename(path).encode()
    node.parent, node.watch = parent, 7
    if opened:
        node.fd = nodes.Fd(os.open(os.path.join(volume.path, path), os.O_PATH))
    return node


def test_a_node_is_found_whatever_goes_away_meanwhile(volume: Volume) -> None:
    table = volume.table
    expected = os.stat(os.path.join(volume.path, "d/f")).st_ino
    assert table.stat(vanishing(volume, "d/f", opened=True)).st_ino == expected
    assert table.stat(vanishing(volume, "d/f", vanishing(volume, "d", opened=True))).st_ino == expected
    assert os.fstat(table.fd(vanishing(volume, "d/f", vanishing(volume, "d", opened=True))).n).st_ino == expected
    assert os.fstat(table.fd(vanishing(volume, "d/f", vanishing(volume, "d", table.root))).n).st_ino == expected
    table._held, table._handles = {vanishing(volume, "d/f", table.root, opened=True): None}, True
    table._evict()
    assert not table._held


def test_what_the_kernel_is_told_of_a_node_whatever_goes_away_meanwhile(volume: Volume) -> None:
    file, directory = (os.stat(os.path.join(volume.path, path)) for path in ("d/f", "d"))
    assert volume.file_time(vanishing(volume, "d"), directory) == NAME_TIME
    assert volume.file_time(vanishing(volume, "d/f"), file) == FILE_TIME
    child = vanishing(volume, "d/f", vanishing(volume, "d"))
    child.watch = None
    assert volume.file_time(child, file) == FILE_TIME
    (valid,) = struct.unpack_from("Q", volume.entry(vanishing(volume, "d"), b"f", file), 16)
    assert valid == NAME_TIME
    node = vanishing(volume, "d", opened=True)
    volume.table.by_id[node.id] = node
    worker: Any = SimpleNamespace(nodeid=node.id)
    assert [nodeid for _, nodeid, _ in ahead.of_directory(volume, worker, memoryview(b""), b"")] == [node.id]


def test_the_watcher_looks_at_a_node_whatever_goes_away_meanwhile(volume: Volume) -> None:
    watcher = Watcher(volume)
    file = vanishing(volume, "d/f", opened=True)
    assert watcher._links(file) == 1
    directory = vanishing(volume, "d", opened=True)
    directory.children[b"f"] = file
    assert not watcher.check_name(directory, b"f")
    watcher.expect(((vanishing(volume, "d"), b"f"),))
    assert watcher._expected == {(7, b"f"): 1}
    for fd in (watcher.fd, watcher._stop_read, watcher._stop_write):
        os.close(fd)
