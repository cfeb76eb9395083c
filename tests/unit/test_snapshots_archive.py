"""fcvm.snapshots.archive: a snapshot survives the way to another host, and a strange archive is refused."""

import filecmp
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO

import pytest
from test_snapshots_store import fill, make

from fcvm import config
from fcvm.cli import snapshots
from fcvm.cli.context import Context
from fcvm.cli.parser import build
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


def fcvm(*words: str, base: Path, stdin: int | IO[bytes] | None = None, stdout: IO[bytes] | None = None) -> str:
    """Run ``fcvm WORDS``, which must succeed; returns its stdout, unless that is given, and both of its messages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FCVM_MACHINE": "never", "FCVM_BASE_DIR": str(base)}
    done = subprocess.run(
        [sys.executable, "-m", "fcvm", *words],
        stdin=stdin,
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.STDOUT if stdout is None else None,
        env=env,
        timeout=120,
        check=False,
    )
    text = (done.stdout or b"").decode()
    assert done.returncode == 0, text
    return text


def test_stdout_and_stdin(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "out"
    with open(file, "wb") as out:
        fcvm("snapshots", "export", "warm", "-", base=layout.base, stdout=out)
    with subprocess.Popen(["cat", file], stdout=subprocess.PIPE) as cat:
        assert fcvm("snapshots", "import", "-", "again", base=layout.base, stdin=cat.stdout) == "again\n"
    assert store.tags(layout) == ["again", "warm"]


def test_pipes(layout: Layout, tmp_path: Path) -> None:
    """As root `fcvm snapshots export TAG /dev/null` would put a file there, if a file were made in the pipe's place."""
    pipe, file = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    with subprocess.Popen(["timeout", "60", "cp", pipe, file]) as copy:
        fcvm("snapshots", "export", "warm", str(pipe), base=layout.base)
    assert copy.returncode == 0
    with subprocess.Popen(["timeout", "60", "cp", file, pipe]) as copy:
        assert fcvm("snapshots", "import", str(pipe), "again", base=layout.base) == "again\n"
    assert copy.returncode == 0
    assert pipe.is_fifo()
    assert store.tags(layout) == ["again", "warm"]
    with pytest.raises(SnapshotError, match="cannot be written: Is a directory"):
        archive.export(layout, "warm", tmp_path)
    with pytest.raises(NotFoundError, match="cannot be read: Is a directory"):
        archive.import_archive(layout, tmp_path, "x")


def test_a_link_stays_one_and_leads_to_the_archive(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for target in ("data/old", "data/new"):
        link = tmp_path / f"link-to-{os.path.basename(target)}"
        link.symlink_to(target)
        (tmp_path / "data/old").write_text("of before")
        fcvm("snapshots", "export", "warm", str(link), base=layout.base)
        assert link.is_symlink()
        assert fcvm("snapshots", "import", str(link), link.name, base=layout.base) == f"{link.name}\n"
    assert sorted(os.listdir(tmp_path / "data")) == ["new", "old"]


def test_a_file_that_is_our_stdout_or_stdin_is_used_as_it_is(layout: Layout, tmp_path: Path) -> None:
    """As /dev/stdout in `fcvm snapshots export TAG /dev/stdout > file`, whose link in /dev would be replaced."""
    file, out, into = tmp_path / "file", tmp_path / "stdout", tmp_path / "stdin"
    out.symlink_to("/proc/self/fd/1")
    into.symlink_to("/proc/self/fd/0")
    file.write_bytes(b"before")
    with open(file, "ab") as stream:
        fcvm("snapshots", "export", "warm", str(out), base=layout.base, stdout=stream)
    assert out.is_symlink()
    with open(file, "rb") as stream:
        assert os.read(stream.fileno(), 6) == b"before"
        assert fcvm("snapshots", "import", str(into), "again", base=layout.base, stdin=stream) == "again\n"


@pytest.mark.parametrize("action", [["export", "warm"], ["import"]])
def test_in_the_machine_a_pipe_is_the_users_all_the_same(layout: Layout, tmp_path: Path, action: list[str]) -> None:
    """There it would lead nowhere: it joins processes of one kernel. So it is opened where the user is."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keep = os.open(pipe, os.O_RDWR)  # so that nobody waits for the other end
    args = build("snapshots").parse_args(
        ["snapshots", *action, str(pipe), *(["again"] if action == ["import"] else [])]
    )
    stream = 0 if action == ["import"] else 1
    before = os.dup(stream)
    try:
        snapshots.prepare(args, Context(config.load({"base_dir": str(layout.base)})))
        assert os.path.samestat(os.fstat(stream), os.stat(pipe))
    finally:
        os.dup2(before, stream)
        os.close(before)
        os.close(keep)
    given = vars(args)
    assert given["file"] == "-"
    assert bool(given.get("interactive")) == (action == ["import"]), "that is what the machine is given our stdin for"


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
