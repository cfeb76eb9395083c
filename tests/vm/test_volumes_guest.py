"""--map as a file system for a guest: the same results as its own ext4, real programs, locks, and the host's changes.

One VM for all: ``/volume`` is a directory of the host; the host's git, sqlite3, rsync and GNU tar are copied into the
container, from a volume. Python programs run in the guest OS. What the guest made is compared on the host. Every test is
one script in the guest, with few processes, because under emulation each takes its time.
"""

import ast
import hashlib
import os
import queue
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fuse_tree
import pytest
from fuse_tree import Tree
from vm.conftest import DEMO, fcvm, ok, running, vm, wait

VOLUME = "/run/fcvm/volumes/0"  # in the guest OS
TREE = Path(fuse_tree.__file__).read_text()

PROGRAMS = ("bash", "git", "rsync", "sqlite3", "tar")
IDENTITY = " ".join(f"GIT_{who}_{what}=n@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL"))
SHELL = f"export PATH=/programs:/bin HOME=/nonexistent GIT_EXEC_PATH=/programs LC_ALL=C {IDENTITY}; cd /volume;"


class Guest:
    """A running VM with a volume; ``host`` is the volume's directory on the host."""

    def __init__(self, name: str, host: Path) -> None:
        self.name = name
        self.host = host

    def shell(self, script: str) -> str:
        """Run a shell script in the container, in the volume; each of its commands must succeed."""
        return ok("exec", self.name, "--", "/programs/bash", "-euc", SHELL + script).decode()

    def python(self, program: str) -> str:
        """Run a Python program in the guest OS; it must succeed."""
        return ok("exec", "--vm", self.name, "-i", "--", "python3", "-", input=program.encode()).decode()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    name, volume = f"test-{secrets.token_hex(4)}", tmp_path_factory.mktemp("volume")
    volume.chmod(0o755)  # other users of the guest go through it
    programs = tmp_path_factory.mktemp("programs")
    gather(programs)
    maps = ["--map", f"{volume}:/volume", "--map", f"{programs}:/from:ro"]
    ok("podman", "run", "-d", "--name", name, *maps, DEMO, "--", "sleep", "100000")
    ok("exec", name, "--", "cp", "-a", "/from/.", "/")
    yield Guest(name, volume)
    fcvm("stop", "-t", "0", name)


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """A program's output on the host; it must succeed."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, env=environment, timeout=100, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout.decode()[-2000:]}{done.stderr.decode()[-2000:]}"
    return done.stdout.decode()


def gather(into: Path) -> None:
    """Programs of the host in ``/programs``, and their libraries where they are looked for."""
    for name in PROGRAMS:
        path = shutil.which(name)
        assert path is not None
        files = {path: f"programs/{name}", **{each: each[1:] for each in re.findall(r"(/\S+) \(0x", run("ldd", path))}}
        for source, target in files.items():
            (into / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, into / target)
    (into / "programs" / "git-upload-pack").symlink_to("git")


# ---- the same as a local file system

DIFFERENCES = """
for seed in range({count}):
    tree, plain = Tree(Path("{volume}/tree%d" % seed), alike=True), Tree(Path("/scratch/tree"), alike=True)
    found = difference(tree, plain, [*PLANTED, *chosen(seed, 50)])
    print(repr((found, tree.everything())), flush=True)
    tree.close_all()
    plain.remove()
"""


def test_random_operations_give_what_ext4_gives(guest: Guest) -> None:
    count = 3
    output = guest.python(TREE + DIFFERENCES.format(count=count, volume=VOLUME))
    results = [ast.literal_eval(line) for line in output.splitlines()]
    assert [found for found, _ in results] == [""] * count
    for seed, (_, seen) in enumerate(results):
        assert Tree(guest.host / f"tree{seed}", alike=True).everything() == seen, f"seed {seed}"


MAPPED = f"""
import mmap, os
path = "{VOLUME}/mapped"
with open(path, "wb") as file:
    file.truncate(1 << 20)
child = os.fork()
with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as data:
    half = 1 << 19
    if child == 0:
        data[half:] = b"c" * half
        while data[0] != ord("p"):  # what the parent writes is seen through the map
            pass
        os._exit(0)
    while data[half] != ord("c"):
        pass
    data[:half] = b"p" * half
    assert os.waitpid(child, 0)[1] == 0
    data.flush()
    assert os.pread(file.fileno(), 2, half - 1) == b"pc"
print(os.stat(path).st_size)
"""


def test_shared_memory_maps(guest: Guest) -> None:
    assert guest.python(MAPPED) == f"{1 << 20}\n"
    assert (guest.host / "mapped").read_bytes() == b"p" * (1 << 19) + b"c" * (1 << 19)


# ---- programs


def test_git(guest: Guest) -> None:
    guest.shell("""
        git init -q source; cd source
        for n in 0 1 2 3 4 5 6 7; do echo $n > f$n; done
        git add .; git commit -q -m first
        echo changed > f1; git commit -q -a -m second
        git clone -q . ../clone
    """)
    for name in ("source", "clone"):
        run("git", "fsck", "--strict", cwd=guest.host / name)
        assert run("git", "status", "--porcelain", cwd=guest.host / name) == ""
        assert run("git", "log", "--oneline", cwd=guest.host / name).count("\n") == 2


def test_tar_and_rsync(guest: Guest) -> None:
    sample = guest.host / "sample"
    fuse_tree.plant(sample, files=10)
    guest.shell("""
        tar --xattrs -Scf a.tar -C sample .
        mkdir out; tar --xattrs -xpf a.tar -C out; tar -df a.tar -C out
        rsync -aHAX sample/ synced/
        echo changed > synced/big; > synced/extra
        rsync -aHAX --delete --checksum sample/ synced/
        [ out/hard -ef out/files/0 ]
    """)
    run("tar", "-df", guest.host / "a.tar", "-C", sample)
    for name in ("out", "synced"):
        assert listing(guest.host / name) == listing(sample)
        run("diff", "-r", "--no-dereference", "--exclude=fifo", sample, guest.host / name)
    assert (guest.host / "out" / "sparse").stat().st_blocks * 512 < 1 << 20


def listing(path: Path) -> list[str]:
    """Everything about a tree that two copies of it share."""
    return sorted(run("find", ".", "-printf", "%P %y %m %U %G %s %l %TY%Tm%Td%TT\\n", cwd=path).splitlines())


def test_sqlite(guest: Guest) -> None:
    guest.shell("""
        for mode in delete wal; do
            sqlite3 db "PRAGMA journal_mode=$mode; CREATE TABLE IF NOT EXISTS t(a INTEGER PRIMARY KEY, b TEXT);"
            for who in 1 2; do
                for n in 1 2 3 4 5; do echo "INSERT INTO t(b) VALUES('$mode-$who-$n');"; done |
                    sqlite3 -bail -cmd '.timeout 60000' db &
            done
            for who in 1 2; do wait -n; done
        done
    """)
    assert run("sqlite3", guest.host / "db", "PRAGMA integrity_check; SELECT count(*) FROM t;").split() == ["ok", "20"]


# ---- others that use the same files: the host, and a clone

HOLD = (
    """(echo "BEGIN EXCLUSIVE; SELECT 'held';"; read line; echo 'INSERT INTO t VALUES(1); COMMIT;') | sqlite3 locked"""
)


def test_a_lock_of_the_guest_holds_on_the_host(guest: Guest) -> None:
    database = guest.host / "locked"
    run("sqlite3", database, "CREATE TABLE t(a);")
    with running("exec", guest.name, "-i", "--", "/programs/bash", "-c", SHELL + HOLD, stdin=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        tried = subprocess.run(["sqlite3", database, "INSERT INTO t VALUES(2);"], capture_output=True, check=False)
        assert b"locked" in tried.stderr
        holder.communicate(b"\n", timeout=100)
    assert run("sqlite3", database, "INSERT INTO t VALUES(3); SELECT a FROM t;").split() == ["1", "3"]


# Counts the number in a file up to 100 under a lock, beside others who do so too; prints how many of the steps were its own.
COUNT = """
import fcntl, os, time
number = own = 0
with open("{path}", "r+b", buffering=0) as file:
    while number < 100:
        fcntl.lockf(file, fcntl.LOCK_EX)
        number = int(os.pread(file.fileno(), 8, 0)) + 1
        os.pwrite(file.fileno(), b"%8d" % number, 0)
        fcntl.lockf(file, fcntl.LOCK_UN)
        own += 1
        time.sleep({pause})
print(own)
"""


def test_a_guest_its_clone_and_the_host_count_on_under_a_lock(guest: Guest) -> None:
    tag = f"test-{secrets.token_hex(4)}"
    clone, number = f"{tag}-c", guest.host / "number"
    number.write_bytes(b"%8d" % 0)
    counting = ["--", "python3", "-c", COUNT.format(path=f"{VOLUME}/number", pause=0)]
    try:
        ok("snapshot", "create", guest.name, "--tag", tag)
        with running("snapshot", "run", "--snapshot", tag, "--name", clone):
            wait(lambda: (vm(clone) or {}).get("status") == "running")
            with (
                running("exec", "--vm", guest.name, *counting) as one,
                running("exec", "--vm", clone, *counting) as other,
            ):
                wait(lambda: int(number.read_bytes()) > 0)
                steps = [int(run("python3", "-c", COUNT.format(path=number, pause=0.05)))]
                steps += [int(process.communicate(timeout=100)[0]) for process in (one, other)]
    finally:
        fcvm("snapshots", "rm", tag)
    assert min(steps) > 0
    assert sum(steps) == int(number.read_bytes())


WATCH = f"""
import time
last = None
while True:
    begun = time.monotonic()
    with contextlib.suppress(OSError):  # changed while it is looked at
        if (view := Tree(Path("{VOLUME}/watched")).digest()) != last:
            print(view, time.monotonic() - begun, flush=True)
            last = view
    time.sleep(0.05)
"""
SEEN_WITHIN = 2  # seconds; documented is one, the rest is for the answer
LOOKS = 4  # for so many of its looks at the tree, which take an emulated guest long: one it is in the middle of, and a new one


class Views:
    """What the guest sees of a directory, as it changes, and how long it looks: the lines that ``WATCH`` writes."""

    def __init__(self, root: Path, lines: Iterable[bytes]) -> None:
        self.root = root
        self.seen: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()

    def _read(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            view, look = line.decode().split()
            self.seen.put((view, float(look)))

    def wait(self, seconds: float) -> tuple[float, float]:
        """Wait until the guest sees what there is on the host; the seconds that it took, and those of its look."""
        begun, wanted = time.monotonic(), Tree(self.root).digest()
        while True:
            try:
                view, look = self.seen.get(timeout=max(0, begun + seconds - time.monotonic()))
                if view == wanted:
                    return round(time.monotonic() - begun, 2), round(look, 2)
            except queue.Empty:
                pytest.fail(f"after {seconds:g} s the guest does not see what there is")


def replace(path: Path, content: str) -> None:
    """What editors do."""
    path.with_suffix(".new").write_text(content)
    path.with_suffix(".new").rename(path)


def append(path: Path, content: str) -> None:
    with path.open("a") as file:
        file.write(content)


def retarget(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def test_what_the_host_changes_is_seen_soon(guest: Guest) -> None:
    root = guest.host / "watched"
    root.mkdir()
    for n in range(5):
        (root / f"f{n}").write_text(f"{n}\n")
    changes: dict[str, Callable[[], object]] = {
        "create": lambda: (root / "new").write_text("new"),
        "append": lambda: append(root / "f0", "more"),
        "write over, of the same size": lambda: (root / "f0").write_text("0\nless"),
        "replace": lambda: replace(root / "f1", "replaced"),
        "mode and owner": lambda: ((root / "f1").chmod(0o640), os.chown(root / "f1", 1234, 5678)),
        "rename": lambda: (root / "f2").rename(root / "renamed"),
        "link": lambda: (root / "hard").hardlink_to(root / "renamed"),
        "symlink": lambda: retarget(root / "symlink", "f3"),
        "symlink elsewhere": lambda: retarget(root / "symlink", "f4"),
        "in a new directory": lambda: ((root / "d").mkdir(), (root / "d" / "file").write_text("below")),
        "rename the directory": lambda: (root / "d").rename(root / "e"),
        "remove the tree": lambda: shutil.rmtree(root / "e"),
        "delete": lambda: (root / "renamed").unlink(),
    }
    took: dict[str, tuple[float, float]] = {}
    with running("exec", "--vm", guest.name, "-i", "--", "python3", "-", stdin=subprocess.PIPE) as watch:
        assert watch.stdin is not None
        assert watch.stdout is not None
        watch.stdin.write((TREE + WATCH).encode())
        watch.stdin.close()
        watch.stdin = None
        views = Views(root, watch.stdout)
        views.wait(60)
        for name, change in changes.items():
            change()
            took[name] = views.wait(60)
    assert all(seconds < SEEN_WITHIN + LOOKS * look for seconds, look in took.values()), took


def test_reads_past_the_page_cache_of_any_size(guest: Guest) -> None:
    """Answers longer than what a vsock's buffer holds."""
    data = os.urandom(5 << 20)
    (guest.host / "direct").write_bytes(data)
    program = f"""
import hashlib, mmap, os
buffer = mmap.mmap(-1, {len(data)})
for size in 128 << 10, 1 << 20, len(buffer):
    fd, whole = os.open("{VOLUME}/direct", os.O_RDONLY | os.O_DIRECT), hashlib.sha256()
    while count := os.readv(fd, [memoryview(buffer)[:size]]):
        whole.update(buffer[:count])
    print(whole.hexdigest())
"""
    assert guest.python(program).split() == [hashlib.sha256(data).hexdigest()] * 3


def test_the_kernel_reads_far_ahead(guest: Guest) -> None:
    data = os.urandom(5 << 20)
    (guest.host / "ahead").write_bytes(data)
    program = f"""
import hashlib, os
device = os.stat("{VOLUME}").st_dev
print(open(f"/sys/class/bdi/{{os.major(device)}}:{{os.minor(device)}}/read_ahead_kb").read().strip())
print(hashlib.sha256(open("{VOLUME}/ahead", "rb").read()).hexdigest())
"""
    assert guest.python(program).split() == ["512", hashlib.sha256(data).hexdigest()]
