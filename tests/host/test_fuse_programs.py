"""Real programs on a mount: git, tar, sqlite3, rsync, cp, find, fio, stress-ng, and the shell's usual tools."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fuse_support
import fuse_tree
import pytest
from fuse_support import Mount


@pytest.fixture(scope="module")
def shared() -> Iterator[Mount]:
    with fuse_support.scratch() as base, fuse_support.mount(base) as mounted:
        yield mounted


@pytest.fixture
def here(shared: Mount, request: pytest.FixtureRequest) -> Path:
    shared.live_on()
    path = shared.path / f"t{abs(hash(request.node.nodeid))}"
    path.mkdir()
    return path


def run(*command: str | Path, cwd: Path | None = None, stdin: bytes = b"") -> str:
    """The program's output; it must succeed."""
    environment = {**os.environ, "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout.decode()[-2000:]}{done.stderr.decode()[-2000:]}"
    return done.stdout.decode()


def listing(path: Path) -> str:
    """Everything about a tree that two copies of it share."""
    return run("find", ".", "-printf", "%P %y %m %U %G %s %l %TY%Tm%Td%TT\\n", cwd=path)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with every kind of file, and Python's sources of one package."""
    path = tmp_path_factory.mktemp("sample") / "tree"
    fuse_tree.plant(path, files=50)
    shutil.copytree(Path(os.__file__).parent / "email", path / "email")
    return path


def test_git(here: Path) -> None:
    source = here / "source"
    source.mkdir()
    run("git", "init", "-q", ".", cwd=source)
    for n in range(50):
        (source / f"d{n % 7}").mkdir(exist_ok=True)
        (source / f"d{n % 7}" / f"f{n}").write_text(f"{n}\n" * n)
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    run("git", "add", ".", cwd=source)
    run("git", *identity, "commit", "-q", "-m", "first", cwd=source)
    for n in range(20):
        (source / f"d{n % 7}" / f"f{n}").write_text("changed\n")
        run("git", *identity, "commit", "-q", "-a", "-m", f"change {n}", cwd=source)
    run("git", "clone", "-q", source, here / "clone")
    assert run("git", "status", "--porcelain", cwd=here / "clone") == ""
    run("git", "gc", "-q", cwd=source)
    run("git", "fsck", "--strict", cwd=source)
    run("git", "checkout", "-q", "-b", "side", "HEAD~10", cwd=source)
    assert run("git", "status", "--porcelain", cwd=source) == ""
    assert run("git", "log", "--oneline", cwd=source).count("\n") == 11
    assert "changed" in run("git", "grep", "changed", cwd=source)


def test_tar_both_ways(here: Path, sample: Path) -> None:
    run("tar", "--xattrs", "-cf", here / "a.tar", "-C", sample, ".")
    (here / "out").mkdir()
    run("tar", "--xattrs", "-xpf", here / "a.tar", "-C", here / "out")
    assert listing(here / "out") == listing(sample)
    run("diff", "-r", "--no-dereference", "--exclude=fifo", sample, here / "out")
    assert os.stat(here / "out" / "hard").st_ino == os.stat(here / "out" / "files" / "0").st_ino
    run("tar", "-df", here / "a.tar", "-C", here / "out")


def test_cp_and_rsync(here: Path, sample: Path) -> None:
    run("cp", "-a", "--sparse=always", sample, here / "copied")
    assert listing(here / "copied") == listing(sample)
    assert (here / "copied" / "sparse").stat().st_blocks * 512 < 1 << 20
    run("cp", "-a", here / "copied", here / "again")
    run("diff", "-r", "--no-dereference", "--exclude=fifo", here / "copied", here / "again")
    run("rsync", "-aHAX", "--delete", f"{sample}/", f"{here / 'synced'}/")
    assert listing(here / "synced") == listing(sample)
    (here / "synced" / "big").write_text("changed")
    (here / "synced" / "extra").touch()
    run("rsync", "-aHAX", "--delete", "--checksum", f"{sample}/", f"{here / 'synced'}/")
    assert run("rsync", "-aHAXni", "--delete", "--checksum", f"{sample}/", f"{here / 'synced'}/") == ""


def test_sqlite(here: Path, shared: Mount) -> None:
    database = here / "db"
    for mode in ("delete", "truncate", "wal"):
        script = f"PRAGMA journal_mode={mode}; CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY, b TEXT);"
        script += "".join(f"INSERT INTO t(b) VALUES('{mode}{n}');" for n in range(100))
        run("sqlite3", database, script)
    assert run("sqlite3", database, "PRAGMA integrity_check; SELECT count(*) FROM t;").split() == ["ok", "300"]
    writers = [
        subprocess.Popen(
            [
                "sqlite3",
                "-cmd",
                ".timeout 60000",
                database,
                "".join(f"INSERT INTO t(b) VALUES('{k}-{n}');" for n in range(50)),
            ]
        )
        for k in range(4)
    ]
    assert [writer.wait(240) for writer in writers] == [0, 0, 0, 0]
    assert run("sqlite3", database, "SELECT count(*) FROM t;").strip() == "500"
    host = shared.host / database.relative_to(shared.path)
    assert run("sqlite3", host, "PRAGMA integrity_check; SELECT count(*) FROM t;").split() == ["ok", "500"]


def test_a_database_that_the_host_writes_too(here: Path, shared: Mount) -> None:
    database = here / "db"
    host = shared.host / database.relative_to(shared.path)
    run("sqlite3", database, "PRAGMA journal_mode=truncate; CREATE TABLE t(a INTEGER PRIMARY KEY, b INTEGER UNIQUE);")
    step = "BEGIN IMMEDIATE; INSERT INTO t(b) SELECT count(*) FROM t; COMMIT;"
    writers = [
        subprocess.Popen(["sqlite3", "-bail", "-cmd", ".timeout 60000", path, step * 40], stdout=subprocess.DEVNULL)
        for path in (database, host, database, host)
    ]
    assert [writer.wait(240) for writer in writers] == [0, 0, 0, 0]
    for path in (database, host):
        found = run("sqlite3", path, "PRAGMA integrity_check; SELECT count(*), max(b) FROM t;")
        assert found.split() == ["ok", "160|159"]


def test_a_database_locked_by_the_host_is_locked(here: Path, shared: Mount) -> None:
    database = here / "db"
    run("sqlite3", database, "CREATE TABLE t(a);")
    host = shared.host / database.relative_to(shared.path)
    holder = subprocess.Popen(["sqlite3", host], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin
    assert holder.stdout
    holder.stdin.write(b"BEGIN EXCLUSIVE; SELECT 'locked';\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == b"locked\n"
    tried = subprocess.run(["sqlite3", database, "INSERT INTO t VALUES(1);"], capture_output=True, check=False)
    assert b"locked" in tried.stderr
    holder.communicate(b"COMMIT;\n")
    run("sqlite3", database, "INSERT INTO t VALUES(1);")


def test_shell_tools(here: Path, sample: Path) -> None:
    shutil.copytree(sample / "email", here / "email")
    assert run("grep", "-rc", "import", here / "email") != ""
    assert run("sh", "-c", "cat email/*.py | wc -l", cwd=here) == run("sh", "-c", "cat email/*.py | wc -l", cwd=sample)
    run("sed", "-i", "s/import/ import/", *(here / "email").glob("*.txt"), here / "email" / "__init__.py")
    shutil.copy(sample / "email" / "__init__.py", here / "email" / "__init__.py")
    run(
        "sh",
        "-c",
        "dd if=/dev/zero of=big bs=1M count=20 conv=fsync status=none && "
        "truncate -s 1G big && cp big copy && cmp big copy",
        cwd=here,
    )
    run("python3", "-m", "compileall", "-q", here / "email")
    run(
        "sh",
        "-c",
        "for i in 1 2 3 4; do (for j in 1 2 3 4 5 6 7 8 9; do mkdir -p a/$i/$j; touch a/$i/$j/f; mv a/$i/$j b$i$j; "
        "done) & done; wait",
        cwd=here,
    )
    assert len(list(here.glob("b*/f"))) == 36
    run("rm", "-rf", here / "a", here / "email")


@pytest.mark.parametrize("job", [
    ("--rw=randrw", "--bs=4k", "--size=8m", "--numjobs=4"),
    ("--rw=write", "--bs=1m", "--size=64m", "--fsync=8"),
    ("--rw=randwrite", "--bs=8k", "--size=8m", "--ioengine=mmap"),
    ("--rw=randwrite", "--bs=16k", "--size=16m", "--direct=1", "--ioengine=libaio", "--iodepth=16"),
])  # fmt: skip
def test_fio(here: Path, job: tuple[str, ...]) -> None:
    run(
        "fio",
        "--name=job",
        f"--directory={here}",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--group_reporting",
        *job,
    )


# stress-ng's file system stressors that a FUSE file system takes part in.
STRESSORS = (
    "access",
    "chdir",
    "chmod",
    "chown",
    "copy-file",
    "dentry",
    "dir",
    "dirdeep",
    "dirmany",
    "dup",
    "fallocate",
    "fcntl",
    "fiemap",
    "file-ioctl",
    "filename",
    "flock",
    "fpunch",
    "fstat",
    "getdent",
    "hdd",
    "inode-flags",
    "io",
    "iomix",
    "link",
    "locka",
    "lockf",
    "lockofd",
    "metamix",
    "mknod",
    "open",
    "rename",
    "seek",
    "sendfile",
    "symlink",
    "touch",
    "utime",
    "unlink",
    "verity",
    "xattr",
)


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng(here: Path, stressor: str) -> None:
    known = run("stress-ng", "--stressors").split()
    if stressor not in known:  # of another version
        return
    run(
        "stress-ng",
        f"--{stressor}",
        "2",
        "--timeout",
        "2",
        "--verify",
        "--temp-path",
        here,
        "--no-rand-seed",
        "--hdd-bytes",
        "8m",
    )
