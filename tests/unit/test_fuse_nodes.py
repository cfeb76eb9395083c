"""What a node table knows of the file system that it serves."""

import os
from pathlib import Path

import pytest

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
