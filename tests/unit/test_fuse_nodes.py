"""What a node table knows of the file system that it serves."""

import os
import select
import stat
import threading
from pathlib import Path

import pytest
from fuse_support import error_of

from fuse_pipe import linux, nodes


def opened(path: Path | str) -> int:
    return os.open(path, os.O_PATH | os.O_CLOEXEC)


def test_the_name_of_a_file_system() -> None:
    fd = opened("/proc/self/status")
    assert linux.file_system(fd) == "proc"
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
