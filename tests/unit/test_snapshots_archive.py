"""fcvm.snapshots.archive: a snapshot survives the way to another host, and a strange archive is refused."""

import filecmp
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from test_snapshots_store import fill, make

from fcvm.errors import ConflictError, NotFoundError, SnapshotError
from fcvm.process import run
from fcvm.snapshots import archive, store
from fcvm.storage.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "here")
    make(made, "warm")
    return made


def test_there_and_back(layout: Layout, tmp_path: Path) -> None:
    file, there = tmp_path / "warm.tar.zst", Layout(tmp_path / "there")
    store.add(store.find(layout, "warm"), store.WORKING_SET, "[[0, 1]]")
    archive.export(layout, "warm", file)
    assert file.stat().st_size < 100_000
    arrived = archive.import_archive(there, file, "other")
    assert arrived.manifest == store.find(layout, "warm").manifest
    for name in (*store.REQUIRED, store.WORKING_SET):
        assert filecmp.cmp(arrived.path / name, layout.snapshots / "warm" / name, shallow=False), name
    assert arrived.memory.stat().st_blocks * 512 < 1 << 20, "holes must stay holes"
    assert arrived.memory.stat().st_mode & 0o777 == 0o400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "there", "warm.tar.zst"]


def test_nobody_else_can_read_what_a_guest_had_in_memory(layout: Layout, tmp_path: Path) -> None:
    file, there = tmp_path / "warm.tar.zst", Layout(tmp_path / "there")
    before = os.umask(0)
    try:
        with store.creating(layout, "open") as directory:
            assert directory.stat().st_mode & 0o777 == 0o700, "from the first byte on"
            fill(directory)
        store.add(store.find(layout, "open"), store.WORKING_SET, "[[0, 1]]")
        archive.export(layout, "open", file)
        archive.import_archive(there, file, "arrived")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o600
    for directory in (layout.snapshots / "open", there.snapshots / "arrived"):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == dict.fromkeys(
            (*store.REQUIRED, store.WORKING_SET), 0o400
        )


def test_export_to_stdout(layout: Layout, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from fcvm.snapshots import archive; from fcvm.storage.layout import Layout\n"
        "archive.export(Layout(Path(sys.argv[1])), 'warm', None)"
    )
    file = tmp_path / "out"
    with open(file, "wb") as out:
        subprocess.run(
            [sys.executable, "-c", program, layout.base],
            stdout=out,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            check=True,
        )
    archive.import_archive(layout, file, "again")
    assert store.tags(layout) == ["again", "warm"]


def test_a_device_or_pipe_is_written_to_and_not_replaced(layout: Layout, tmp_path: Path) -> None:
    """As root `fcvm snapshots export TAG /dev/null` would put a file there."""
    pipe, file = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    with subprocess.Popen(["cp", pipe, file]):
        archive.export(layout, "warm", pipe)
    assert pipe.is_fifo()
    archive.import_archive(layout, file, "again")
    assert store.tags(layout) == ["again", "warm"]
    with pytest.raises(SnapshotError, match="cannot be written: Is a directory"):
        archive.export(layout, "warm", tmp_path)


def test_what_is_no_archive_is_told(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with pytest.raises(SnapshotError, match="text is not an exported snapshot: it is damaged, or something else"):
        archive.import_archive(layout, tmp_path / "text", "x")


def test_missing_and_taken(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        archive.import_archive(layout, tmp_path / "nothing.tar.zst", "x")
    with pytest.raises(NotFoundError):
        archive.export(layout, "nothing", tmp_path / "nothing.tar.zst")
    archive.export(layout, "warm", tmp_path / "warm.tar.zst")
    with pytest.raises(ConflictError):
        archive.import_archive(layout, tmp_path / "warm.tar.zst", "warm")
    with pytest.raises(SnapshotError, match="cannot be written"):
        archive.export(layout, "warm", tmp_path / "no/such/directory.tar.zst")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "evil", "memory.bin/x"])
def test_strange_member_is_refused(layout: Layout, tmp_path: Path, name: str) -> None:
    file = pack(tmp_path, [(tarfile.TarInfo(name), b"evil")])
    with pytest.raises(SnapshotError, match="not an exported snapshot"):
        archive.import_archive(layout, file, "evil")
    assert store.tags(layout) == ["warm"]
    assert not list(tmp_path.rglob("evil"))


def test_link_in_the_place_of_a_file_is_refused(layout: Layout, tmp_path: Path) -> None:
    link = tarfile.TarInfo("memory.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(SnapshotError, match="not an exported snapshot"):
        archive.import_archive(layout, pack(tmp_path, [(link, b"")]), "evil")


def test_member_twice_is_refused(layout: Layout, tmp_path: Path) -> None:
    file = pack(tmp_path, [(tarfile.TarInfo("memory.bin"), b"one"), (tarfile.TarInfo("memory.bin"), b"two")])
    with pytest.raises(SnapshotError):
        archive.import_archive(layout, file, "evil")


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_truncated_archive_is_refused(layout: Layout, tmp_path: Path, keep: int) -> None:
    file = tmp_path / "warm.tar.zst"
    archive.export(layout, "warm", file)
    os.truncate(file, keep)
    with pytest.raises(SnapshotError):
        archive.import_archive(layout, file, "half")
    assert store.tags(layout) == ["warm"]


def test_archive_without_all_files_is_refused(layout: Layout, tmp_path: Path) -> None:
    content = (layout.snapshots / "warm/config.json").read_bytes()
    file = pack(tmp_path, [(tarfile.TarInfo("config.json"), content)])
    with pytest.raises(SnapshotError, match="incomplete"):
        archive.import_archive(layout, file, "half")


def pack(directory: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """A .tar.zst with these members."""
    plain = directory / "made.tar"
    with tarfile.open(plain, "w") as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    run(["zstd", "--quiet", "--rm", plain])
    return directory / "made.tar.zst"
