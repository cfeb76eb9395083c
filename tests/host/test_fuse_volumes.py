"""What a mounted volume does beyond plain files: locks, extended attributes, holes, coherence, read-only, big
things.
"""

import ctypes
import errno
import fcntl
import mmap
import multiprocessing
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fuse_support
import pytest
from fuse_support import Mount, error_of
from fuse_tree import as_user

from fuse_pipe import linux
from fuse_pipe.nodes import NodeTable

O_TMPFILE = os.O_TMPFILE
MS_BIND = 4096


@pytest.fixture(scope="module")
def shared() -> Iterator[Mount]:
    with fuse_support.scratch() as base, fuse_support.mount(base) as mounted:
        yield mounted


# What has no watch is believed for long: what is seen nevertheless was pushed, however slow this host is.
ONLY_PUSHED = """
import sys
from fuse_pipe import volume
from fuse_pipe.server import Server, listening
volume.UNWATCHED_TIME = 600
with listening(sys.argv[2]) as listener:
    Server(sys.argv[1]).accept(listener)
"""


@pytest.fixture(scope="module")
def pushed() -> Iterator[Mount]:
    with fuse_support.scratch() as base:
        mounted = Mount(base)
        try:
            mounted.start(program=ONLY_PUSHED)
            yield mounted
        finally:
            mounted.stop()


# Keeps little for a relay that takes nothing, and says next to the socket when it dropped something and made up for it.
FEW_KEPT = """
import pathlib
import sys
from fuse_pipe import session, watch
from fuse_pipe.server import Server, listening
here = pathlib.Path(sys.argv[2])
notify, invalidate_all = session.Session._notify, watch.Watcher.invalidate_all
def noted(self, message):
    sent = notify(self, message)
    if self._unnotified:
        here.with_name("dropped").touch()
    return sent
def to_the_end(self):
    yield from invalidate_all(self)
    here.with_name("made up").touch()
session.KEPT_MESSAGES = 128
session.Session._notify, watch.Watcher.invalidate_all = noted, to_the_end
with listening(sys.argv[2]) as listener:
    Server(sys.argv[1]).accept(listener)
"""


@pytest.fixture
def here(shared: Mount, request: pytest.FixtureRequest) -> Path:
    shared.live_on()
    path = shared.path / f"t{abs(hash(request.node.nodeid))}"
    path.mkdir()
    return path


def on_host(shared: Mount, path: Path) -> Path:
    return shared.host / path.relative_to(shared.path)


def fresh(mounted: Mount, name: str) -> Path:
    """A new directory in a mount, for a test."""
    mounted.live_on()
    path = mounted.path / name
    path.mkdir()
    return path


def eventually(condition: Callable[[], object]) -> None:
    """For what the kernel is told of by a notification: it comes at once, but not before the call returns."""
    fuse_support.wait_for(condition, "the change", 20)


# ---- locks


def child_holding(path: Path, lock: Callable[[int], None]) -> tuple[int, int]:
    """A process that opens ``path``, locks it, says so, and holds the lock until its pipe is closed."""
    ready_read, ready_write = os.pipe()
    stop_read, stop_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(stop_write)
            fd = os.open(path, os.O_RDWR)
            lock(fd)
            os.write(ready_write, b"x")
            os.read(stop_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(stop_read)
    assert os.read(ready_read, 1) == b"x"
    os.close(ready_read)
    return child, stop_write


def end(child: int, pipe: int) -> None:
    os.close(pipe)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["record", "flock"])
@pytest.mark.parametrize(("holder", "other"), [("guest", "guest"), ("guest", "host"), ("host", "guest")])
def test_locks_exclude(shared: Mount, here: Path, kind: str, holder: str, other: str) -> None:
    lock = fcntl.lockf if kind == "record" else fcntl.flock
    (here / "f").write_bytes(bytes(100))
    paths = {"guest": here / "f", "host": on_host(shared, here / "f")}
    child, pipe = child_holding(paths[holder], lambda fd: lock(fd, fcntl.LOCK_EX))
    with paths[other].open("r+b") as file:
        assert error_of(lock, file, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")
        assert error_of(lock, file, fcntl.LOCK_SH | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")
        waiting = threading.Thread(target=lambda: lock(file, fcntl.LOCK_EX), daemon=True)
        waiting.start()
        end(child, pipe)
        waiting.join(60)
        assert not waiting.is_alive()
        lock(file, fcntl.LOCK_UN)


def test_record_locks_by_range(shared: Mount, here: Path) -> None:
    (here / "f").write_bytes(bytes(100))
    child, pipe = child_holding(here / "f", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 10, 20))
    for path in (here / "f", on_host(shared, here / "f")):
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 30)
            assert error_of(fcntl.lockf, file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 29) in ("EAGAIN", "EACCES")
    with (here / "f").open("r+b") as file:  # F_GETLK names the holder
        request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, request))
        assert (kind, start, length, pid) == (fcntl.F_WRLCK, 20, 10, child)
    end(child, pipe)


def test_record_locks_go_with_any_close(shared: Mount, here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"x")
    with path.open("r+b") as first:
        fcntl.lockf(first, fcntl.LOCK_EX)
        with on_host(shared, path).open("r+b") as host:
            assert error_of(fcntl.lockf, host, fcntl.LOCK_EX | fcntl.LOCK_NB) in ("EAGAIN", "EACCES")
            path.open().close()
            fcntl.lockf(host, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("kind", ["record", "ranges", "flock"])
def test_who_gets_a_lock_sees_what_was_written_under_it(shared: Mount, here: Path, kind: str) -> None:
    """Processes of the guest and of the host count two numbers in a file up, in turn: no step is lost."""
    path = here / "numbers"
    path.write_bytes(bytes(2 * 4096))

    def count(path: Path) -> None:
        with path.open("r+b", buffering=0) as file:
            for n in range(200):
                at = n % 2 * 4096
                lock = {
                    "record": lambda how: fcntl.lockf(file, how),
                    "ranges": lambda how, at=at: fcntl.lockf(file, how, 8, at),
                    "flock": lambda how: fcntl.flock(file, how),
                }[kind]
                lock(fcntl.LOCK_EX)
                (number,) = struct.unpack("Q", os.pread(file.fileno(), 8, at))
                os.pwrite(file.fileno(), struct.pack("Q", number + 1), at)
                os.pread(file.fileno(), 8, at)  # is cached, with the attributes, when others write next
                lock(fcntl.LOCK_UN)

    start = multiprocessing.get_context("fork").Process
    counting = [start(target=count, args=(each,)) for each in (path, on_host(shared, path)) * 2]
    for process in counting:
        process.start()
    for process in counting:
        process.join()
    numbers = on_host(shared, path).read_bytes()
    assert [struct.unpack_from("Q", numbers, at)[0] for at in (0, 4096)] == [400, 400]


def test_waiting_for_a_lock_is_interrupted(here: Path) -> None:
    (here / "f").write_bytes(b"x")
    for lock in (fcntl.lockf, fcntl.flock):
        child, pipe = child_holding(here / "f", lambda fd, lock=lock: lock(fd, fcntl.LOCK_EX))
        reader, writer = os.pipe()
        waiter = os.fork()
        if waiter == 0:
            try:
                signal.signal(signal.SIGALRM, lambda *_: os._exit(7))
                with (here / "f").open("r+b") as file:
                    os.write(writer, b"x")
                    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
                    lock(file, fcntl.LOCK_EX)
            finally:
                os._exit(1)
        os.read(reader, 1)
        assert os.waitstatus_to_exitcode(os.waitpid(waiter, 0)[1]) == 7
        os.close(reader)
        os.close(writer)
        end(child, pipe)
        with (here / "f").open("r+b") as file:  # the interrupted wait left nothing behind
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_killed_waiter_and_killed_holder(here: Path) -> None:
    (here / "f").write_bytes(b"x")
    child, pipe = child_holding(here / "f", lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX))
    waiter = os.fork()
    if waiter == 0:
        with (here / "f").open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
        os._exit(0)
    os.kill(waiter, signal.SIGKILL)
    os.waitpid(waiter, 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pipe)
    with (here / "f").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)


def test_open_file_description_locks(shared: Mount, here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"x")
    first, second = os.open(path, os.O_RDWR), os.open(path, os.O_RDWR)
    linux.ofd_lock(first, linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 0)
    assert error_of(linux.ofd_lock, second, linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 0) in ("EAGAIN", "EACCES")
    os.close(first)
    eventually(lambda: not error_of(linux.ofd_lock, second, linux.F_OFD_SETLK, fcntl.F_WRLCK, 0, 0))
    os.close(second)


# ---- extended attributes and ACLs


def test_extended_attributes(shared: Mount, here: Path) -> None:
    for path in (here, here / "f"):
        if path != here:
            path.touch()
        os.setxattr(path, "user.one", b"1")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.big", b"x" * 3000)
        assert os.getxattr(on_host(shared, path), "user.one") == b"1"
        assert os.getxattr(path, "user.big") == b"x" * 3000
        assert os.getxattr(path, "user.empty") == b""
        assert sorted(name for name in os.listxattr(path) if name.startswith("user")) == [
            "user.big",
            "user.empty",
            "user.one",
        ]
        assert error_of(os.setxattr, path, "user.one", b"2", os.XATTR_CREATE) == "EEXIST"
        assert error_of(os.setxattr, path, "user.none", b"2", os.XATTR_REPLACE) == "ENODATA"
        os.removexattr(path, "user.one")
        assert error_of(os.getxattr, path, "user.one") == "ENODATA"
        assert error_of(os.removexattr, path, "user.one") == "ENODATA"
    (here / "l").symlink_to("f")
    os.setxattr(here / "l", "trusted.link", b"of the link", follow_symlinks=False)
    assert os.getxattr(on_host(shared, here / "l"), "trusted.link", follow_symlinks=False) == b"of the link"
    assert error_of(os.getxattr, here / "f", "trusted.link") == "ENODATA"
    os.setxattr(here / "f", "trusted.hidden", b"x")
    assert "trusted.hidden" in os.listxattr(here / "f")
    assert "trusted.hidden" not in as_user(os.listxattr, here / "f", uid=1, gid=1)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """``struct posix_acl_xattr``: version 2, then (tag, permissions, id) each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, perm, id & 0xFFFFFFFF) for tag, perm, id in entries)


def test_access_control_lists(here: Path) -> None:
    path = here / "f"
    path.write_text("x")
    path.chmod(0o600)
    here.chmod(0o755)
    path.parent.parent.chmod(0o755)
    value = acl((1, 6, -1), (2, 4, 1234), (4, 0, -1), (16, 4, -1), (32, 0, -1))
    os.setxattr(path, "system.posix_acl_access", value)
    assert os.getxattr(path, "system.posix_acl_access") == value
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert as_user(lambda: path.read_text(), uid=1234, gid=1234) == "x"
    assert error_of(as_user, lambda: path.read_text(), uid=1235, gid=1235) == "EACCES"
    default = acl((1, 7, -1), (2, 7, 1234), (4, 5, -1), (16, 7, -1), (32, 5, -1))
    os.setxattr(here, "system.posix_acl_default", default)
    as_user(lambda: (here / "made").touch(), umask=0o077)  # the default ACL replaces the umask
    assert stat.S_IMODE((here / "made").stat().st_mode) == 0o664
    as_user(lambda: (here / "made.d").mkdir(), umask=0o077)
    assert os.getxattr(here / "made.d", "system.posix_acl_default") == default


def test_file_capabilities_go_with_a_write(here: Path) -> None:
    path = here / "f"
    path.write_text("x")
    os.setxattr(path, "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0))
    assert os.getxattr(path, "security.capability")
    with path.open("a") as file:
        file.write("y")
    assert error_of(os.getxattr, path, "security.capability") == "ENODATA"


# ---- data


def test_holes(here: Path) -> None:
    with (here / "f").open("w+b") as file:
        fd = file.fileno()
        os.ftruncate(fd, 10 << 20)
        os.pwrite(fd, b"x" * 4096, 5 << 20)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 5 << 20
        assert os.lseek(fd, 5 << 20, os.SEEK_HOLE) == (5 << 20) + 4096
        assert error_of(os.lseek, fd, 6 << 20, os.SEEK_DATA) == "ENXIO"
        linux.fallocate(fd, 0, 1 << 20, 1 << 20)
        blocks = os.fstat(fd).st_blocks
        linux.fallocate(fd, 3, 1 << 20, 1 << 20)  # punch a hole, keep the size
        assert os.fstat(fd).st_blocks < blocks
        linux.fallocate(fd, 1, 0, 1 << 20)  # keep the size
        linux.fallocate(fd, 16, 5 << 20, 4096)  # zero a range
        assert os.pread(fd, 10, 5 << 20) == bytes(10)
        assert os.fstat(fd).st_size == 10 << 20


def test_copy_file_range(shared: Mount, here: Path) -> None:
    data = os.urandom(3_000_000)
    (here / "a").write_bytes(data)
    with (here / "a").open("rb") as source, (here / "b").open("wb") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 1_000_000, 500_000, 100) == 1_000_000
    assert (here / "b").read_bytes() == bytes(100) + data[500_000:1_500_000]
    assert on_host(shared, here / "b").read_bytes() == (here / "b").read_bytes()


def test_files_without_a_name(shared: Mount, here: Path) -> None:
    fd = os.open(here, O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"nameless")
    assert os.fstat(fd).st_nlink == 0
    assert list(here.iterdir()) == []
    descriptors = os.open("/proc/self/fd", os.O_RDONLY)  # with it, link follows the magic link
    os.link(str(fd), here / "named", src_dir_fd=descriptors)
    assert (here / "named").read_bytes() == b"nameless"
    assert stat.S_IMODE(on_host(shared, here / "named").stat().st_mode) == 0o640
    os.close(fd)
    fd = os.open(here, O_TMPFILE | os.O_EXCL | os.O_RDWR)
    assert error_of(os.link, str(fd), here / "never", src_dir_fd=descriptors) == "ENOENT"
    os.close(descriptors)
    os.close(fd)


def test_memory_maps(shared: Mount, here: Path) -> None:
    (here / "f").write_bytes(bytes(100_000))
    with (here / "f").open("r+b") as file:
        with mmap.mmap(file.fileno(), 100_000) as memory:
            memory[50_000:50_005] = b"hello"
            assert os.pread(file.fileno(), 5, 50_000) == b"hello"
            memory.flush()
        assert on_host(shared, here / "f").read_bytes()[50_000:50_005] == b"hello"
    with (here / "f").open("a+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0:3] = b"abc"  # through a file opened to append: must not append
        memory.flush()
    assert on_host(shared, here / "f").stat().st_size == 100_000
    assert on_host(shared, here / "f").read_bytes()[:3] == b"abc"


def test_private_map_of_a_program(here: Path) -> None:
    program = here / "true"
    program.write_bytes(Path("/bin/true").read_bytes())
    program.chmod(0o755)
    assert os.spawnv(os.P_WAIT, program, ["true"]) == 0


def test_direct_io(here: Path) -> None:
    fd = os.open(here / "f", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, 1 << 16) as buffer:
        buffer[:5] = b"hello"
        assert os.pwritev(fd, [buffer], 0) == 1 << 16
        buffer[:5] = b"other"
        assert os.preadv(fd, [buffer], 0) == 1 << 16
        assert buffer[:5] == b"hello"
    os.close(fd)


def test_the_kernel_reads_far_ahead(here: Path) -> None:
    device = os.stat(here).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert setting.read_text() == "512\n", "what the relay asks for, and the server's answer to INIT allows"
    data = os.urandom(3 << 20)
    (here / "f").write_bytes(data)
    with (here / "f").open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert b"".join(iter(lambda: file.read(100_000), b"")) == data


def test_beyond_four_gigabytes(shared: Mount, here: Path) -> None:
    with (here / "f").open("w+b") as file:
        os.pwrite(file.fileno(), b"end", (1 << 33) + 5)
        os.fsync(file.fileno())
        os.fdatasync(file.fileno())
        assert os.fstat(file.fileno()).st_size == (1 << 33) + 8
        assert os.pread(file.fileno(), 10, (1 << 33) + 5) == b"end"
    with on_host(shared, here / "f").open("rb") as host:
        assert os.pread(host.fileno(), 3, (1 << 33) + 5) == b"end"
    os.truncate(here / "f", 0)


def test_writes_at_the_end_by_many(here: Path) -> None:
    """O_APPEND by several processes loses nothing."""
    children = []
    for n in range(4):
        child = os.fork()
        if child == 0:
            fd = os.open(here / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for i in range(100):
                os.write(fd, b"%d-%03d\n" % (n, i))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    lines = (here / "log").read_bytes().split()
    assert sorted(lines) == sorted(b"%d-%03d" % (n, i) for n in range(4) for i in range(100))


def test_statfs_and_syncfs(shared: Mount, here: Path) -> None:
    guest, host = os.statvfs(here), os.statvfs(shared.host)
    assert (guest.f_blocks, guest.f_bsize, guest.f_frsize, guest.f_namemax) == (
        host.f_blocks,
        host.f_bsize,
        host.f_frsize,
        host.f_namemax,
    )
    fd = os.open(here, os.O_RDONLY)
    linux.syncfs(fd)
    os.fsync(fd)
    os.close(fd)


def test_birth_time(here: Path, shared: Mount) -> None:
    (here / "f").touch()
    guest, host = os.open(here / "f", os.O_RDONLY), os.open(on_host(shared, here / "f"), os.O_RDONLY)
    seen, real = linux.statx(guest), linux.statx(host)
    assert seen.btime == real.btime > 0
    assert (seen.ino, seen.size, seen.mode) == (real.ino, real.size, real.mode)
    os.close(guest)
    os.close(host)


# ---- directories and names


@pytest.mark.parametrize(
    "name", [b"n" * 255, b"\xff\xfe not UTF-8", "ünïcode".encode(), b" ", b"new\nline", b"-", b"...", b"a:b,c"]
)
def test_names(shared: Mount, here: Path, name: bytes) -> None:
    path = os.fsencode(here) + b"/" + name
    with open(path, "w") as file:
        file.write("x")
    assert os.listdir(os.fsencode(here)) == [name]
    assert os.stat(path).st_size == 1
    assert os.listdir(os.fsencode(on_host(shared, here))) == [name]
    os.unlink(path)


def test_deep_directories(here: Path) -> None:
    back = os.open(".", os.O_RDONLY)
    try:
        os.chdir(here)
        for _ in range(300):
            os.mkdir("d" * 20)
            os.chdir("d" * 20)
        Path("bottom").write_text("x")
        assert Path("bottom").read_text() == "x"
    finally:
        os.chdir(back)
        os.close(back)


def test_a_hundred_thousand_entries(shared: Mount, here: Path) -> None:
    host = on_host(shared, here)
    fd = os.open(host, os.O_RDONLY)
    for n in range(100_000):
        os.mknod(f"entry-{n:06}", dir_fd=fd)
    os.close(fd)
    names = os.listdir(here)
    assert len(names) == 100_000
    assert set(names) == {f"entry-{n:06}" for n in range(100_000)}
    with os.scandir(here) as entries:
        for count, entry in enumerate(entries):
            if count % 2 == 0:
                os.unlink(entry.path)  # while it is being read
    assert len(os.listdir(here)) == 50_000


def test_directory_position_survives_changes(shared: Mount, here: Path) -> None:
    """telldir and seekdir, with entries made and removed in between."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.opendir.argtypes = [ctypes.c_char_p]
    libc.readdir.argtypes = libc.closedir.argtypes = libc.telldir.argtypes = [ctypes.c_void_p]
    libc.telldir.restype = ctypes.c_long
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    for n in range(3000):
        (on_host(shared, here) / f"stays-{n:05}").touch()
        (on_host(shared, here) / f"goes-{n:05}").touch()
    stream = libc.opendir(os.fsencode(here))

    def name() -> str:
        entry = libc.readdir(stream)
        return ctypes.string_at(entry + 19).decode() if entry else ""

    seen = [name() for _ in range(2000)]
    place = libc.telldir(stream)
    for n in range(3000):
        (here / f"goes-{n:05}").unlink()
    rest = []
    while word := name():
        rest.append(word)
    libc.seekdir(stream, place)
    again = []
    while word := name():
        again.append(word)
    libc.closedir(stream)
    for part in (rest, again):
        stays = [word for word in (*seen, *part) if word.startswith("stays")]
        assert sorted(stays) == [f"stays-{n:05}" for n in range(3000)]


# ---- what the host changes is seen


def test_host_changes_are_seen(pushed: Mount) -> None:
    here = fresh(pushed, "host_changes_are_seen")
    host = on_host(pushed, here)
    assert not (here / "f").exists()
    (host / "f").write_text("one")
    eventually(lambda: (here / "f").exists())
    assert (here / "f").read_text() == "one"
    (host / "f").write_text("second")
    eventually(lambda: (here / "f").stat().st_size == 6)
    assert (here / "f").read_text() == "second"
    (host / "f").chmod(0o600)
    eventually(lambda: stat.S_IMODE((here / "f").stat().st_mode) == 0o600)
    (host / "f").rename(host / "g")
    eventually(lambda: not (here / "f").exists() and (here / "g").exists())
    (host / "new").write_text("replaced")
    (host / "new").rename(host / "g")
    eventually(lambda: (here / "g").read_text() == "replaced")
    (host / "d" / "e").mkdir(parents=True)
    eventually(lambda: (here / "d" / "e").is_dir())
    assert sorted(os.listdir(here)) == ["d", "g"]
    (host / "d" / "e" / "f").touch()
    eventually(lambda: os.listdir(here / "d" / "e") == ["f"])
    (host / "g").unlink()
    eventually(lambda: not (here / "g").exists())
    assert os.listdir(here) == ["d"]


def test_host_writes_into_an_open_and_cached_file(pushed: Mount) -> None:
    here = fresh(pushed, "host_writes_into_an_open_and_cached_file")
    (here / "f").write_bytes(b"a" * 8192)
    with (here / "f").open("rb", buffering=0) as guest, on_host(pushed, here / "f").open("r+b", buffering=0) as host:
        assert guest.read(8192) == b"a" * 8192
        for n in range(5):
            host.seek(4096)
            host.write(b"%d" % n)
            eventually(lambda n=n: os.pread(guest.fileno(), 1, 4096) == b"%d" % n)
        host.seek(0, os.SEEK_END)
        host.write(b"appended")
        eventually(lambda: os.fstat(guest.fileno()).st_size == 8200)
        assert os.pread(guest.fileno(), 8, 8192) == b"appended"


def test_guest_changes_are_seen_at_close(shared: Mount, here: Path) -> None:
    for n in range(20):
        (here / "f").write_text(f"version {n}")
        assert (on_host(shared, here) / "f").read_text() == f"version {n}"


@pytest.mark.parametrize("settle", [os.fsync, os.fdatasync, os.close])
def test_the_host_has_what_was_written_when_it_is_settled(
    shared: Mount, here: Path, settle: Callable[[int], None]
) -> None:
    path = here / "f"
    for n in range(20):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for block in range(n):
            os.write(fd, bytes([block]) * 5000)
        settle(fd)
        assert on_host(shared, path).read_bytes() == b"".join(bytes([block]) * 5000 for block in range(n))
        if settle is not os.close:
            os.close(fd)


def test_what_was_written_is_there_for_others_at_once(here: Path) -> None:
    """Written by one process and looked at by another before it is closed: size, content, in order with locks."""
    path = here / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    for n in range(1, 50):
        os.pwrite(fd, n.to_bytes(4, "little") * 1000, 0)
        os.pwrite(fd, b"x", 4000 + n)
        assert as_user(lambda: os.stat(path).st_size) == 4001 + n
        assert as_user(lambda: path.read_bytes()[:4]) == n.to_bytes(4, "little")
    os.close(fd)


def test_a_synchronous_write_is_on_the_host_when_it_returns(shared: Mount, here: Path) -> None:
    fd = os.open(here / "f", os.O_WRONLY | os.O_CREAT | os.O_DSYNC)
    for n in range(20):
        os.pwrite(fd, b"%d" % n, 0)
        assert on_host(shared, here / "f").read_bytes() == b"%d" % n
    os.close(fd)


@pytest.fixture
def small() -> Iterator[Path]:
    """A mount of a disk of 1 MiB."""
    with fuse_support.scratch() as base:
        (base / "host").mkdir()
        linux.mount("none", str(base / "host"), "tmpfs", 0, "size=1m")
        try:
            with fuse_support.mount(base) as mounted:
                yield mounted.path
        finally:
            linux.umount(str(base / "host"), linux.MNT_DETACH)


def test_a_full_disk_is_told_of(small: Path) -> None:
    fill_up(small / "f")
    (small / "f").unlink()
    # The kernel says that it has closed and forgotten f a moment after unlink has returned.
    eventually(lambda: not error_of((small / "g").write_bytes, bytes(500_000)))
    fill_up(small / "h")
    assert (small / "g").read_bytes() == bytes(500_000)


def test_a_full_disk_is_told_to_the_writer_whoever_else_closes_the_file(small: Path) -> None:
    writer = os.open(small / "f", os.O_WRONLY | os.O_CREAT)
    reader = os.open(small / "f", os.O_RDONLY)
    os.write(writer, bytes((1 << 20) + 4096))  # answered before it is done; the last of it fails
    assert error_of(os.close, reader) == "ENOSPC"
    assert error_of(os.fsync, writer) == "ENOSPC"
    os.close(writer)
    with (small / "f").open("r+b") as later:
        os.fsync(later.fileno())


def fill_up(path: Path) -> None:
    """Write more than there is room for: whoever closes the file without looking at ``write`` learns it as well."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    failed = []
    for _ in range(40):
        try:
            os.write(fd, bytes(64 << 10))
        except OSError as error:
            failed.append(error.errno)
    failed.append(error_of(os.close, fd))
    assert set(failed) - {""} <= {errno.ENOSPC, "ENOSPC"}
    assert len(failed) > 2 or failed[-1] == "ENOSPC"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    assert error_of(os.write, fd, bytes(2 << 20)) == "ENOSPC"  # writes wait for the host now
    os.close(fd)


def test_deleted_by_the_host_while_open(pushed: Mount) -> None:
    here = fresh(pushed, "deleted_by_the_host_while_open")
    (here / "f").write_text("content")
    with (here / "f").open() as file:
        (on_host(pushed, here) / "f").unlink()
        eventually(lambda: not (here / "f").exists())
        assert file.read() == "content"
        assert os.fstat(file.fileno()).st_nlink == 0


def test_inotify_tells_of_deletions_by_the_host(shared: Mount, here: Path) -> None:
    (here / "f").touch()
    with (here / "f").open():
        fd = linux.inotify_init()
        linux.inotify_add(fd, os.fsencode(here / "f"), 0x400)  # IN_DELETE_SELF
        (on_host(shared, here) / "f").unlink()
    assert select.select([fd], [], [], 60)[0]
    os.close(fd)


def test_what_makes_up_for_dropped_notifications_leaves_mounts_and_working_directories() -> None:
    """The kernel must not drop names that lead where they did: with a name goes what is mounted there."""
    with fuse_support.scratch() as base:
        mounted = Mount(base)
        files = [f"file-{number}" for number in range(300)]
        for name in ("mounted", "working"):
            (mounted.host / name).mkdir(parents=True)
        for name in files:
            (mounted.host / name).write_text("old")
        try:
            mounted.start(program=FEW_KEPT)
            assert mounted.relay is not None
            linux.mount("tmpfs", str(mounted.path / "mounted"), "tmpfs", 0, "")
            (mounted.path / "mounted" / "inside").write_text("content")
            for name in files:
                assert (mounted.path / name).read_text() == "old"
            asked = [sys.executable, "-c", "import os; print(flush=True); input(); print(os.getcwd())"]
            with subprocess.Popen(
                asked, cwd=mounted.path / "working", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as working:
                assert working.stdout is not None
                working.stdout.readline()
                mounted.relay.send_signal(signal.SIGSTOP)
                try:
                    for name in files:
                        (mounted.host / name).write_text("new one")
                    fuse_support.wait_for((base / "dropped").exists, "more than is kept")
                finally:
                    mounted.relay.send_signal(signal.SIGCONT)
                fuse_support.wait_for((base / "made up").exists, "what makes up for it")
                assert not (mounted.path / "last").exists()
                (mounted.host / "last").touch()
                eventually((mounted.path / "last").exists)  # what was sent before has come
                assert working.communicate("\n", timeout=60)[0].strip() == str(mounted.path / "working")
            assert fuse_support.is_mounted(mounted.path / "mounted")
            assert (mounted.path / "mounted" / "inside").read_text() == "content"
            for name in files:
                assert (mounted.path / name).read_text() == "new one"
        finally:
            mounted.stop()


def test_own_writes_keep_the_cache(shared: Mount, here: Path) -> None:
    """What the mount itself wrote raises events on the host, which must not be taken for somebody else's."""
    path = here / "f"
    path.write_bytes(b"x" * 100_000)
    time.sleep(0.05)  # past the clock tick in which changes cannot be told apart
    path.read_bytes()
    reads = io_counters(shared)
    for _ in range(20):
        assert len(path.read_bytes()) == 100_000
    assert io_counters(shared) - reads < 500_000  # of 2,000,000 read


def io_counters(shared: Mount) -> int:
    """Bytes that the relay has received so far."""
    assert shared.relay is not None
    fields = dict(line.split(": ") for line in Path(f"/proc/{shared.relay.pid}/io").read_text().splitlines())
    return int(fields["wchar"])


# ---- read-only, single files, other users


def test_read_only(tmp_path: Path) -> None:
    with fuse_support.scratch() as base:
        (base / "host").mkdir()
        (base / "host" / "f").write_text("content")
        (base / "host" / "d").mkdir()
        os.utime(base / "host" / "f", ns=(1, 2))
        with fuse_support.mount(base, serve=("--ro",)) as mounted:
            f = mounted.path / "f"
            assert f.read_text() == "content"
            assert (mounted.host / "f").stat().st_atime_ns == 1
            libc = ctypes.CDLL(None)  # the guest may well remount: the server still says no
            assert libc.mount(None, os.fsencode(mounted.path), None, 32, None) == 0
            for action in (
                lambda: f.write_text("x"),
                lambda: f.open("a"),
                lambda: f.unlink(),
                lambda: f.chmod(0o777),
                lambda: os.chown(f, 1, 1),
                lambda: os.truncate(f, 0),
                lambda: os.utime(f),
                lambda: f.rename(mounted.path / "g"),
                lambda: (mounted.path / "d").rmdir(),
                lambda: (mounted.path / "n").mkdir(),
                lambda: (mounted.path / "n").touch(),
                lambda: (mounted.path / "n").symlink_to("x"),
                lambda: os.link(f, mounted.path / "n"),
                lambda: os.mkfifo(mounted.path / "n"),
                lambda: os.setxattr(f, "user.x", b""),
                lambda: os.removexattr(f, "user.x"),
                lambda: os.open(mounted.path, os.O_TMPFILE | os.O_RDWR),
            ):
                assert error_of(action) == "EROFS"
            with f.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH)
                fcntl.lockf(file, fcntl.LOCK_SH)
        assert (base / "host" / "f").read_text() == "content"
        assert sorted(os.listdir(base / "host")) == ["d", "f"]


def test_a_single_file(tmp_path: Path) -> None:
    with fuse_support.scratch() as base:
        (base / "file").write_text("content")
        with fuse_support.mount(base, host=base / "file") as mounted:
            assert mounted.path.read_text() == "content"
            with mounted.path.open("a") as file:
                file.write(" more")
            assert (base / "file").read_text() == "content more"
            mounted.path.chmod(0o600)
            assert stat.S_IMODE((base / "file").stat().st_mode) == 0o600


def test_changes_of_a_single_file_are_pushed() -> None:
    """By any of its names, and into what is open and mapped; a new file in its place is another one."""
    with fuse_support.scratch() as base:
        (base / "file").write_text("one")
        os.link(base / "file", base / "link")
        mounted = Mount(base, host=base / "file")
        try:
            mounted.start(program=ONLY_PUSHED)
            with mounted.path.open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 9, 0) == b"one"
                with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
                    assert view[:] == b"one"
                    overwrite(base / "file", "two and more")
                    eventually(lambda: view[:] == b"two")
                    assert os.pread(file.fileno(), 99, 0) == b"two and more"
                overwrite(base / "link", "2wo")
                eventually(lambda: os.pread(file.fileno(), 3, 0) == b"2wo")
            (base / "new").write_text("another file")
            (base / "new").rename(base / "file")
            eventually(lambda: mounted.path.stat().st_nlink == 1)
            assert mounted.path.read_text() == "2wo and more"
            overwrite(base / "link", "3")
            eventually(lambda: mounted.path.read_text() == "3wo and more")
        finally:
            mounted.stop()


def overwrite(path: Path, text: str) -> None:
    """Write at the beginning of a file."""
    with path.open("r+") as file:
        file.write(text)


def test_mounted_file_systems_below_are_seen() -> None:
    with fuse_support.scratch() as base:
        (base / "host" / "below").mkdir(parents=True)
        linux.mount("none", str(base / "host" / "below"), "tmpfs", 0, "")
        try:
            (base / "host" / "below" / "f").write_text("in the tmpfs")
            (base / "host" / "f").write_text("outside")
            with fuse_support.mount(base) as mounted:
                assert (mounted.path / "below" / "f").read_text() == "in the tmpfs"
                inodes = {path.stat().st_ino for path in mounted.path.rglob("*")}
                assert len(inodes) == 3
                assert error_of(os.rename, mounted.path / "f", mounted.path / "below" / "g") == "EXDEV"
        finally:
            linux.umount(str(base / "host" / "below"), linux.MNT_DETACH)  # the server may still be ending


def test_what_raises_no_events_is_not_believed_for_long() -> None:
    """A mount of FUSE below the directory, which somebody else changes."""
    with fuse_support.scratch() as other, fuse_support.scratch() as base, fuse_support.mount(other) as remote:
        below = base / "host" / "below"
        below.mkdir(parents=True)
        linux.mount(str(remote.path), str(below), "none", MS_BIND, "")
        try:
            with fuse_support.mount(base) as mounted:
                names = [mounted.path / "below" / "new", mounted.path / "below" / "newer"]
                assert not any(name.exists() for name in names)
                (remote.host / "new").write_text("one")
                eventually(names[0].exists)
                assert names[0].read_text() == "one"
                (remote.host / "new").write_text("second")
                eventually(lambda: names[0].read_text() == "second")
                (remote.host / "new").rename(remote.host / "newer")
                eventually(lambda: os.listdir(mounted.path / "below") == ["newer"])
                eventually(lambda: not names[0].exists())
        finally:
            linux.umount(str(below), linux.MNT_DETACH)


def test_the_next_file_system_with_the_same_device_number() -> None:
    with fuse_support.scratch() as base:
        below = base / "below"
        below.mkdir()
        for _ in range(20):  # who else mounts something on this host may get the number
            table = NodeTable(os.open(base, os.O_PATH | os.O_CLOEXEC))
            numbers = []
            for kind in ("tmpfs", "proc"):
                linux.mount("none", str(below), kind, 0, "")
                try:
                    numbers.append(below.stat().st_dev)
                    node = table.learn(table.root, b"below", below.stat())
                    assert table.raises_events(node) == (kind == "tmpfs")
                    assert table.of_kernel(node) == (kind == "proc")
                    table.forget(node.id, 1)
                finally:
                    linux.umount(str(below), linux.MNT_DETACH)
            if len(set(numbers)) == 1:
                break
        else:
            pytest.skip("device numbers are not used again")


def test_files_of_the_hosts_kernel() -> None:
    """They have no size, or a wrong one, and hold something else each time; also more than is sent ahead at once."""
    with fuse_support.scratch() as base:
        (base / "host" / "sys").mkdir(parents=True)
        (base / "host" / "proc").mkdir()
        linux.mount("/sys", str(base / "host" / "sys"), "none", MS_BIND, "")
        linux.mount("/proc", str(base / "host" / "proc"), "none", MS_BIND, "")
        try:
            with fuse_support.mount(base) as mounted:
                proc, system = mounted.path / "proc", mounted.path / "sys"
                assert (proc / "version").read_bytes() == Path("/proc/version").read_bytes()
                # A program of the kernel's (BPF) that comes or goes in between is in it too.
                eventually(lambda: (proc / "kallsyms").read_bytes() == Path("/proc/kallsyms").read_bytes())
                uptime = (proc / "uptime").read_text()
                eventually(lambda: (proc / "uptime").read_text() != uptime)
                sent = system / "class" / "net" / "lo" / "statistics" / "tx_packets"
                with sent.open() as file, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                    before = int(file.read())
                    sock.sendto(b"x", ("127.0.0.1", 9))
                    file.seek(0)
                    assert int(file.read()) > before
                with subprocess.Popen(["sleep", "60"]) as child:
                    try:
                        eventually(lambda: (proc / str(child.pid) / "comm").read_text() == "sleep\n")
                    finally:
                        child.kill()
                eventually(lambda: not (proc / str(child.pid)).exists())
        finally:
            linux.umount(str(base / "host" / "proc"), linux.MNT_DETACH)
            linux.umount(str(base / "host" / "sys"), linux.MNT_DETACH)


# A host whose kernel takes no value for any of the files served.
OF_KERNEL = """
import errno, os, sys
from fuse_pipe.nodes import NodeTable
from fuse_pipe.server import Server, listening
def refuse(*arguments):
    raise OSError(errno.EINVAL, "no such value")
NodeTable.of_kernel = lambda table, node: True
os.pwrite = os.pwritev = refuse
with listening(sys.argv[2]) as listener:
    Server(sys.argv[1]).accept(listener)
"""


def test_what_a_file_of_the_hosts_kernel_refuses_fails() -> None:
    with fuse_support.scratch() as base:
        mounted = Mount(base)
        try:
            mounted.start(program=OF_KERNEL)
            (mounted.host / "f").touch()
            for name, flags in (("f", os.O_TRUNC), ("f", os.O_APPEND), ("new", os.O_CREAT)):
                fd = os.open(mounted.path / name, os.O_WRONLY | flags)
                assert error_of(os.write, fd, b"bogus") == "EINVAL"
                os.close(fd)
        finally:
            mounted.stop()


def test_symlinks_are_not_followed_on_the_host(shared: Mount, here: Path) -> None:
    """An absolute link leads to the reader's root, not the server's; one out of the volume leads nowhere inside."""
    on_host(shared, here).joinpath("l").symlink_to("/etc/hostname")
    on_host(shared, here).joinpath("up").symlink_to("../../../../../../etc")
    assert os.readlink(here / "l") == "/etc/hostname"
    assert os.readlink(here / "up") == "../../../../../../etc"
    assert os.lstat(here / "l").st_size == len("/etc/hostname")


def test_more_files_than_descriptors() -> None:
    """The server knows more nodes than it may have descriptors, and more files are open than it likes."""
    with fuse_support.scratch() as base:
        program = (
            "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))\n"
            "from fuse_pipe.server import Server, listening\n"
            "with listening(sys.argv[2]) as listener: Server(sys.argv[1]).accept(listener)"
        )
        mounted = Mount(base)
        try:
            mounted.start(program=program)
            for n in range(2000):
                (mounted.path / f"d{n}").mkdir()
                (mounted.path / f"d{n}" / "f").write_text(str(n))
            for n in range(2000):
                assert (mounted.path / f"d{n}" / "f").read_text() == str(n)
            files = []
            while not (problem := error_of(lambda: files.append((mounted.path / f"d{len(files)}" / "f").open()))):
                assert len(files) < 400
            assert problem == "EMFILE"
            assert len(files) > 60
            assert files[0].read() == "0"
            for file in files:
                file.close()
            eventually(lambda: not error_of(lambda: (mounted.path / "d0" / "f").read_text()))
            assert errno.EMFILE
        finally:
            mounted.stop()


AS_USER = """
import os, sys
from fuse_pipe.server import Server, listening
os.setgroups([]); os.setresgid(65533, 65533, 65533); os.setresuid(65533, 65533, 65533)
with listening(sys.argv[2]) as listener:
    Server(sys.argv[1], owner=(1000, 1000)).accept(listener)
"""


def test_served_by_an_ordinary_user() -> None:
    """Everything is that user's, shown as the owner's; what that user may not, nobody on the mount may."""
    with fuse_support.scratch() as base:
        base.chmod(0o777)
        (base / "host").mkdir()
        os.chown(base / "host", 65533, 65533)
        (base / "host" / "of-root").write_text("secret")
        (base / "host" / "of-root").chmod(0o600)
        mounted = Mount(base)
        try:
            mounted.start(program=AS_USER)
            path = mounted.path
            (path / "d").mkdir()
            (path / "d" / "f").write_text("x")
            as_user(lambda: (path / "by-owner").write_text("y"), uid=1000, gid=1000)
            for made in (path / "d", path / "d" / "f", path / "by-owner"):
                assert (made.stat().st_uid, made.stat().st_gid) == (1000, 1000)
                assert (mounted.host / made.relative_to(path)).stat().st_uid == 65533
            assert ((path / "of-root").stat().st_uid, (path / "of-root").stat().st_gid) == (65534, 65534)
            assert error_of(lambda: (path / "of-root").read_text()) == "EACCES"
            assert error_of(os.chown, path / "d", 0, 0) == "EPERM"
            os.chown(path / "d", 1000, 1000)
            for name, number, on_host_as, refused in (
                ("system.posix_acl_access", 1000, 65533, 1234),
                ("system.posix_acl_default", 1000, 65533, 65533),
            ):
                given = [acl((1, 7, -1), (2, 6, n), (4, 4, -1), (16, 6, -1), (32, 4, -1)) for n in (number, on_host_as, refused)]
                assert error_of(os.setxattr, path / "d", name, given[2]) == "EPERM"  # as giving away is
                os.setxattr(path / "d", name, given[0])
                assert os.getxattr(mounted.host / "d", name) == given[1]
                assert os.getxattr(path / "d", name) == given[0]
            assert error_of(os.mknod, path / "device", stat.S_IFCHR, os.makedev(1, 3)) == "EPERM"
            with (path / "d" / "f").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                fcntl.flock(file, fcntl.LOCK_EX)
            (mounted.host / "d" / "new").write_text("by the host")
            eventually(lambda: (path / "d" / "new").exists())
            (path / "d" / "f").rename(path / "d" / "g")
            os.link(path / "d" / "g", path / "h")
            assert sorted(os.listdir(path / "d")) == ["g", "new"]
        finally:
            mounted.stop()
