"""POSIX.1-2017 as the file system calls have it, on a mount and, to test the tests, on the host's directory itself.

The calls covered are those of the usual conformance suites: chmod, chown, ftruncate, link, mkdir, mkfifo, mknod, open,
posix_fallocate, rename, rmdir, symlink, truncate, unlink, utimensat; with the permissions of owner, group and others,
sticky directories, set-user-ID bits, times, and every errno that can be provoked.
"""

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuse_support
import pytest
from fuse_support import Mount, error_of
from fuse_tree import as_user

U1, U2, G1, G2 = 65533, 65532, 65533, 65532
LONG = "n" * 255
Make = Callable[[Path], Any]


@pytest.fixture(scope="module", params=["host", "mount"])
def area(request: pytest.FixtureRequest) -> Iterator[Path | Mount]:
    with fuse_support.scratch() as base:
        if request.param == "host":
            yield base
        else:
            with fuse_support.mount(base) as mounted:
                yield mounted


@pytest.fixture
def here(area: Path | Mount, request: pytest.FixtureRequest) -> Iterator[Path]:
    if isinstance(area, Mount):
        area.live_on()
        area = area.path
    path = area / f"t{abs(hash(request.node.nodeid))}"
    path.mkdir()
    path.chmod(0o755)
    yield path
    os.system(f"rm -rf '{path}'")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        directory = os.open(path.parent, os.O_PATH)
        try:
            sock.bind(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)


KINDS: dict[str, Make] = {
    "regular": lambda path: path.touch(),
    "directory": lambda path: path.mkdir(),
    "fifo": fifo,
    "block": lambda path: os.mknod(path, stat.S_IFBLK | 0o644, os.makedev(1, 2)),
    "char": lambda path: os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 2)),
    "socket": bound,
    "symlink": lambda path: path.symlink_to("nowhere"),
}
FILES = {name: make for name, make in KINDS.items() if name != "directory"}
kinds = pytest.mark.parametrize("kind", KINDS)
files = pytest.mark.parametrize("kind", FILES)
real = pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "symlink"])


def ctime(path: Path) -> int:
    return os.lstat(path).st_ctime_ns


def times(path: Path) -> tuple[int, int, int]:
    info = os.lstat(path)
    return info.st_atime_ns, info.st_mtime_ns, info.st_ctime_ns


def tick(path: Path) -> None:
    """Wait until the file system's clock has moved past what it stamps now."""
    probe = path / ".tick"
    probe.touch()
    first = ctime(probe)

    def moved() -> bool:
        os.utime(probe)
        return ctime(probe) > first

    fuse_support.wait_for(moved, "the clock")
    probe.unlink()


def owned(path: Path, uid: int, gid: int, mode: int | None = None) -> Path:
    os.chown(path, uid, gid, follow_symlinks=False)
    if mode is not None:
        path.chmod(mode)
    return path


def mine(here: Path, name: str = "dir", mode: int = 0o755, uid: int = U1, gid: int = G1) -> Path:
    path = here / name
    path.mkdir()
    return owned(path, uid, gid, mode)


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


# ---- chmod


@real
def test_chmod_sets_all_bits_and_ctime(here: Path, kind: str) -> None:
    path = here / "x"
    KINDS[kind](path)
    tick(here)
    before = ctime(path)
    for bits in (0o111, 0o777, 0o000, 0o4711, 0o2711, 0o1755, 0o7777, 0o644):
        os.chmod(path, bits)
        assert mode(path) == bits
    assert ctime(path) > before


def test_chmod_follows_symlinks(here: Path) -> None:
    (here / "f").touch()
    (here / "l").symlink_to("f")
    os.chmod(here / "l", 0o321)
    assert mode(here / "f") == 0o321
    assert mode(here / "l") == 0o777


def test_chmod_errors(here: Path) -> None:
    path = here / "f"
    path.touch()
    assert error_of(os.chmod, here / "none", 0o644) == "ENOENT"
    assert error_of(os.chmod, path / "x", 0o644) == "ENOTDIR"
    assert error_of(os.chmod, here / (LONG + "n"), 0o644) == "ENAMETOOLONG"
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    assert error_of(os.chmod, here / "a", 0o644) == "ELOOP"
    tick(here)
    before = ctime(path)
    assert error_of(as_user, os.chmod, path, 0o777, uid=U1, gid=G1) == "EPERM"
    assert (mode(path), ctime(path)) == (0o644, before)
    owned(path, U1, G1)
    as_user(os.chmod, path, 0o640, uid=U1, gid=G1)
    assert mode(path) == 0o640
    closed = mine(here, mode=0o700)
    (closed / "f").touch()
    assert error_of(as_user, os.chmod, closed / "f", 0o644, uid=U2, gid=G2) == "EACCES"


def test_chmod_drops_the_group_id_bit_of_a_foreign_group(here: Path) -> None:
    path = here / "f"
    path.touch()
    owned(path, U1, G2, 0o755)
    as_user(os.chmod, path, 0o2755, uid=U1, gid=G1)
    assert mode(path) == 0o755
    as_user(os.chmod, path, 0o2755, uid=U1, gid=G1, groups=(G2,))
    assert mode(path) == 0o2755
    os.chmod(path, 0o755)
    os.chmod(path, 0o2755)  # root keeps it
    assert mode(path) == 0o2755


# ---- chown


@kinds
def test_chown_by_root(here: Path, kind: str) -> None:
    path = here / "x"
    KINDS[kind](path)
    tick(here)
    before = ctime(path)
    os.lchown(path, 123, 456)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (123, 456)
    os.lchown(path, -1, 789)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (123, 789)
    os.lchown(path, 124, -1)
    assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (124, 789)
    assert ctime(path) > before


def test_chown_follows_symlinks_and_lchown_does_not(here: Path) -> None:
    (here / "f").touch()
    (here / "l").symlink_to("f")
    os.chown(here / "l", 1, 2)
    assert (os.stat(here / "f").st_uid, os.lstat(here / "l").st_uid) == (1, 0)
    os.lchown(here / "l", 3, 4)
    assert (os.stat(here / "f").st_uid, os.lstat(here / "l").st_uid) == (1, 3)


def test_chown_by_the_owner(here: Path) -> None:
    path = here / "f"
    path.touch()
    owned(path, U1, G1)
    assert error_of(as_user, os.chown, path, U2, -1, uid=U1, gid=G1) == "EPERM"
    assert error_of(as_user, os.chown, path, -1, G2, uid=U1, gid=G1) == "EPERM"
    as_user(os.chown, path, -1, G2, uid=U1, gid=G1, groups=(G2,))
    assert os.stat(path).st_gid == G2
    as_user(os.chown, path, U1, G1, uid=U1, gid=G1)
    assert os.stat(path).st_gid == G1
    assert error_of(as_user, os.chown, path, -1, G2, uid=U2, gid=G2) == "EPERM"


@pytest.mark.parametrize(
    ("bits", "left"), [(0o6755, 0o755), (0o4755, 0o755), (0o2755, 0o755), (0o2644, 0o2644), (0o755, 0o755)]
)
def test_chown_drops_set_id_bits(here: Path, bits: int, left: int) -> None:
    path = here / "f"
    path.touch()
    owned(path, U1, G1, bits)
    as_user(os.chown, path, -1, G2, uid=U1, gid=G1, groups=(G2,))
    assert mode(path) == left or (bits == 0o2644 and mode(path) == 0o644)


def test_chown_leaves_the_bits_of_directories(here: Path) -> None:
    path = mine(here, mode=0o2775)
    os.chown(path, U2, G2)
    assert mode(path) == 0o2775


def test_chown_errors(here: Path) -> None:
    (here / "f").touch()
    assert error_of(os.chown, here / "none", 1, 1) == "ENOENT"
    assert error_of(os.chown, here / "f" / "x", 1, 1) == "ENOTDIR"
    assert error_of(os.chown, here / (LONG + "n"), 1, 1) == "ENAMETOOLONG"
    closed = mine(here, mode=0o700)
    (closed / "f").touch()
    assert error_of(as_user, os.chown, closed / "f", U2, -1, uid=U2, gid=G2) == "EACCES"


# ---- link


@files
def test_link_counts_and_shares(here: Path, kind: str) -> None:
    FILES[kind](here / "a")
    tick(here)
    parent = times(here)
    before = ctime(here / "a")
    os.link(here / "a", here / "b", follow_symlinks=False)
    assert os.lstat(here / "a").st_nlink == os.lstat(here / "b").st_nlink == 2
    assert os.lstat(here / "a").st_ino == os.lstat(here / "b").st_ino
    assert ctime(here / "a") > before
    assert times(here)[1] > parent[1]
    assert times(here)[2] > parent[2]
    os.link(here / "b", here / "c", follow_symlinks=False)
    os.lchown(here / "c", U1, G1)
    assert os.lstat(here / "a").st_uid == U1
    os.unlink(here / "a")
    assert os.lstat(here / "c").st_nlink == 2
    os.unlink(here / "b")
    assert os.lstat(here / "c").st_nlink == 1
    assert error_of(os.lstat, here / "a") == "ENOENT"


def test_link_errors(here: Path) -> None:
    (here / "f").touch()
    (here / "d").mkdir()
    assert error_of(os.link, here / "none", here / "x") == "ENOENT"
    assert error_of(os.link, here / "f", here / "no" / "x") == "ENOENT"
    assert error_of(os.link, here / "f", here / "f" / "x") == "ENOTDIR"
    assert error_of(os.link, here / "d", here / "x") == "EPERM"
    assert error_of(os.link, here / "f", here / (LONG + "n")) == "ENAMETOOLONG"
    for kind, make in KINDS.items():
        make(here / kind)
        assert error_of(os.link, here / "f", here / kind) == "EEXIST"
    os.link(here / "f", here / LONG)
    assert (here / LONG).stat().st_nlink == 2
    closed = mine(here, mode=0o555)
    owned(here / "f", U1, G1)
    assert error_of(as_user, os.link, here / "f", closed / "x", uid=U1, gid=G1) == "EACCES"
    assert error_of(os.link, here / "f", "/dev/shm/other-file-system") == "EXDEV"


# ---- mkdir, mkfifo, mknod, symlink, creating open

CREATORS: dict[str, Make] = {
    "mkdir": lambda path: os.mkdir(path, 0o777),
    "mkfifo": lambda path: os.mkfifo(path, 0o777),
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o777),
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o777)),
    "symlink": lambda path: os.symlink("target", path),
}
creators = pytest.mark.parametrize("creator", CREATORS)


@creators
def test_creating_stamps_and_owns(here: Path, creator: str) -> None:
    directory = mine(here, mode=0o777)
    tick(directory)
    before = times(directory)
    as_user(CREATORS[creator], directory / "x", uid=U2, gid=G2, umask=0)
    info = os.lstat(directory / "x")
    assert (info.st_uid, info.st_gid) == (U2, G2)
    assert mode(directory / "x") == 0o777
    assert min(times(directory / "x")) >= before[1]
    assert times(directory)[1] > before[1]
    assert times(directory)[2] > before[2]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o777, 0o501])
@pytest.mark.parametrize("creator", [name for name in CREATORS if name != "symlink"])
def test_creating_honours_the_umask(here: Path, creator: str, umask: int) -> None:
    as_user(CREATORS[creator], here / "x", umask=umask)
    assert mode(here / "x") == 0o777 & ~umask


@creators
def test_creating_in_a_set_group_id_directory(here: Path, creator: str) -> None:
    directory = mine(here, mode=0o2777, gid=G2)
    as_user(CREATORS[creator], directory / "x", uid=U1, gid=G1, umask=0)
    info = os.lstat(directory / "x")
    assert (info.st_uid, info.st_gid) == (U1, G2)
    assert bool(info.st_mode & stat.S_ISGID) == (creator == "mkdir")


@creators
def test_creating_errors(here: Path, creator: str) -> None:
    create = CREATORS[creator]
    (here / "f").touch()
    assert error_of(create, here / "no" / "x") == "ENOENT"
    assert error_of(create, here / "f" / "x") == "ENOTDIR"
    assert error_of(create, here / (LONG + "n")) == "ENAMETOOLONG"
    assert error_of(create, here / LONG) == ""
    for kind, make in KINDS.items():
        make(here / kind)
        assert error_of(create, here / kind) == "EEXIST"
    closed = mine(here, "closed", 0o555)
    assert error_of(as_user, create, closed / "x", uid=U1, gid=G1) == "EACCES"
    hidden = mine(here, "hidden", 0o666)
    assert error_of(as_user, create, hidden / "x", uid=U1, gid=G1) == "EACCES"
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    assert error_of(create, here / "a" / "x") == "ELOOP"


def test_mkdir_link_counts(here: Path) -> None:
    before = here.stat().st_nlink
    (here / "d").mkdir()
    assert (here / "d").stat().st_nlink == 2
    assert here.stat().st_nlink == before + 1
    (here / "d").rmdir()
    assert here.stat().st_nlink == before


@pytest.mark.parametrize("kind", ["char", "block"])
def test_mknod_devices(here: Path, kind: str) -> None:
    for major, minor in ((1, 3), (0, 0), (4095, 1048575), (8, 255), (8, 256)):
        bits = stat.S_IFCHR if kind == "char" else stat.S_IFBLK
        os.mknod(here / "n", bits | 0o600, os.makedev(major, minor))
        info = os.lstat(here / "n")
        assert stat.S_IFMT(info.st_mode) == bits
        assert (os.major(info.st_rdev), os.minor(info.st_rdev)) == (major, minor)
        os.unlink(here / "n")
    directory = mine(here, mode=0o777)
    assert error_of(as_user, KINDS[kind], directory / "x", uid=U1, gid=G1) == "EPERM"


def test_device_works(here: Path) -> None:
    os.mknod(here / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (here / "null").read_bytes() == b""


def test_fifo_works(here: Path) -> None:
    os.mkfifo(here / "p")
    writer = threading.Thread(target=lambda: (here / "p").write_bytes(b"through"))
    writer.start()
    assert (here / "p").read_bytes() == b"through"
    writer.join()


@pytest.mark.parametrize("target", ["t", "/absolute", "../up", "x" * 1023, "y" * 4095, "with space", "ü"])
def test_symlink_target(here: Path, target: str) -> None:
    (here / "l").symlink_to(target)
    assert os.readlink(here / "l") == target
    assert os.lstat(here / "l").st_size == len(os.fsencode(target))
    assert error_of(os.symlink, "z" * 4096, here / "m") == "ENAMETOOLONG"
    (here / "f").touch()
    assert error_of(os.readlink, here / "f") == "EINVAL"


# ---- open


@pytest.mark.parametrize(
    ("bits", "flags", "who", "expected"),
    [
        (0o400, os.O_RDONLY, "owner", ""),
        (0o400, os.O_WRONLY, "owner", "EACCES"),
        (0o200, os.O_RDONLY, "owner", "EACCES"),
        (0o200, os.O_WRONLY, "owner", ""),
        (0o400, os.O_RDWR, "owner", "EACCES"),
        (0o600, os.O_RDWR, "owner", ""),
        (0o077, os.O_RDONLY, "owner", "EACCES"),
        (0o040, os.O_RDONLY, "group", ""),
        (0o040, os.O_WRONLY, "group", "EACCES"),
        (0o020, os.O_WRONLY, "group", ""),
        (0o707, os.O_RDONLY, "group", "EACCES"),
        (0o040, os.O_RDONLY, "supplementary", ""),
        (0o707, os.O_RDONLY, "supplementary", "EACCES"),
        (0o004, os.O_RDONLY, "other", ""),
        (0o004, os.O_WRONLY, "other", "EACCES"),
        (0o002, os.O_WRONLY, "other", ""),
        (0o770, os.O_RDONLY, "other", "EACCES"),
        (0o000, os.O_RDWR, "root", ""),
        (0o400, os.O_RDONLY | os.O_TRUNC, "owner", "EACCES"),
        (0o600, os.O_RDWR | os.O_TRUNC, "owner", ""),
    ],
)
def test_open_permissions(here: Path, bits: int, flags: int, who: str, expected: str) -> None:
    path = here / "f"
    path.write_text("x")
    owned(path, U1, G1, bits)
    ids: dict[str, dict[str, Any]] = {
        "owner": {"uid": U1, "gid": G1},
        "group": {"uid": U2, "gid": G1},
        "supplementary": {"uid": U2, "gid": G2, "groups": (G1,)},
        "other": {"uid": U2, "gid": G2},
        "root": {},
    }
    assert error_of(as_user, os.open, path, flags, **ids[who]) == expected


def test_open_errors(here: Path) -> None:
    (here / "f").touch()
    (here / "d").mkdir()
    (here / "l").symlink_to("f")
    assert error_of(os.open, here / "none", os.O_RDONLY) == "ENOENT"
    assert error_of(os.open, here / "f" / "x", os.O_RDONLY) == "ENOTDIR"
    assert error_of(os.open, here / "d", os.O_WRONLY) == "EISDIR"
    assert error_of(os.open, here / "d", os.O_RDWR) == "EISDIR"
    assert error_of(os.open, here / "d", os.O_CREAT) == "EISDIR"
    assert error_of(os.open, here / "f", os.O_CREAT | os.O_EXCL) == "EEXIST"
    assert error_of(os.open, here / "l", os.O_RDONLY | os.O_NOFOLLOW) == "ELOOP"
    assert error_of(os.open, here / "f", os.O_RDONLY | os.O_DIRECTORY) == "ENOTDIR"
    os.mkfifo(here / "p")
    assert error_of(os.open, here / "p", os.O_WRONLY | os.O_NONBLOCK) == "ENXIO"
    bound(here / "s")
    assert error_of(os.open, here / "s", os.O_RDONLY) == "ENXIO"
    program = here / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    child = os.spawnv(os.P_NOWAIT, program, ["sleep", "1000"])
    try:
        fuse_support.wait_for(lambda: os.readlink(f"/proc/{child}/exe") == str(program), "the program")
        assert error_of(os.open, program, os.O_WRONLY) == "ETXTBSY"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_open_create_existing_keeps_it_and_dangling_symlink_creates(here: Path) -> None:
    (here / "f").write_text("content")
    os.close(os.open(here / "f", os.O_CREAT | os.O_RDWR, 0o600))
    assert (here / "f").read_text() == "content"
    (here / "l").symlink_to("target")
    os.close(os.open(here / "l", os.O_CREAT | os.O_RDWR, 0o600))
    assert (here / "target").exists()


def test_open_truncates_and_stamps(here: Path) -> None:
    path = here / "f"
    path.write_text("content")
    tick(here)
    before = times(path)
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert path.stat().st_size == 0
    assert times(path)[1] > before[1]
    assert times(path)[2] > before[2]


def test_new_file_opened_read_write_though_its_mode_forbids(here: Path) -> None:
    fd = (
        as_user(lambda: os.write(os.open(mine_, os.O_CREAT | os.O_RDWR, 0), b"x"), uid=U1, gid=G1)
        if (mine_ := mine(here) / "f")
        else 0
    )
    assert fd == 1
    assert mode(mine_) == 0


def test_append(here: Path) -> None:
    first = os.open(here / "f", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    second = os.open(here / "f", os.O_RDWR | os.O_APPEND)
    for n in range(50):
        os.write((first, second)[n % 2], b"%02d" % n)
    os.lseek(second, 0, os.SEEK_SET)
    os.write(second, b"!!")
    assert (here / "f").read_bytes() == b"".join(b"%02d" % n for n in range(50)) + b"!!"
    os.close(first)
    os.close(second)


# ---- truncate and posix_fallocate


@pytest.mark.parametrize("way", ["truncate", "ftruncate"])
def test_truncate(here: Path, way: str) -> None:
    path = here / "f"
    path.write_bytes(b"0123456789" * 1000)
    fd = os.open(path, os.O_RDWR)
    tick(here)
    before = times(path)
    for size in (5, 20000, 0, 4097, (1 << 32) + 5):
        os.truncate(path if way == "truncate" else fd, size)
        assert os.stat(path).st_size == size
    assert times(path)[1] > before[1]
    assert times(path)[2] > before[2]
    assert os.pread(fd, 10, 0) == bytes(10)
    os.close(fd)


def test_truncate_errors(here: Path) -> None:
    path = here / "f"
    path.touch()
    (here / "d").mkdir()
    assert error_of(os.truncate, here / "none", 0) == "ENOENT"
    assert error_of(os.truncate, path / "x", 0) == "ENOTDIR"
    assert error_of(os.truncate, here / "d", 0) == "EISDIR"
    assert error_of(os.truncate, path, -1) == "EINVAL"
    assert error_of(os.truncate, path, (1 << 63) - 1) == "EFBIG"
    assert error_of(as_user, os.truncate, path, 0, uid=U1, gid=G1) == "EACCES"
    fd = os.open(path, os.O_RDONLY)
    assert error_of(os.ftruncate, fd, 0) == "EINVAL"
    os.close(fd)


@pytest.mark.parametrize("uid", [0, U1])
@pytest.mark.parametrize("way", ["write", "truncate", "ftruncate", "open"])
def test_writing_drops_set_id_bits_unless_root(here: Path, way: str, uid: int) -> None:
    path = here / "f"
    path.write_text("x")
    owned(path, U2, G2, 0o6777)

    def change() -> None:
        if way == "truncate":
            os.truncate(path, 0)
            return
        fd = os.open(path, os.O_WRONLY | (os.O_TRUNC if way == "open" else 0))
        if way == "write":
            os.write(fd, b"y")
        elif way == "ftruncate":
            os.ftruncate(fd, 5)
        os.close(fd)

    as_user(change, uid=uid, gid=G1 if uid else 0)
    assert mode(path) == (0o6777 if uid == 0 else 0o777)


def test_posix_fallocate(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDWR)
    os.posix_fallocate(fd, 0, 2)
    assert path.stat().st_size == 3
    os.posix_fallocate(fd, 100_000, 50_000)
    assert path.stat().st_size == 150_000
    assert path.stat().st_blocks * 512 >= 50_000
    assert path.read_bytes()[:4] == b"abc\0"
    assert error_of(os.posix_fallocate, fd, 0, 0) == "EINVAL"
    assert error_of(os.posix_fallocate, fd, -1, 10) == "EINVAL"
    os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    assert error_of(os.posix_fallocate, fd, 0, 10) == "EBADF"
    os.close(fd)


# ---- rename


@kinds
def test_rename_keeps_the_file(here: Path, kind: str) -> None:
    (here / "d").mkdir()
    KINDS[kind](here / "a")
    before = os.lstat(here / "a")
    tick(here)
    stamps, stamps_of_d = times(here), times(here / "d")
    os.rename(here / "a", here / "d" / "b")
    after = os.lstat(here / "d" / "b")
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert error_of(os.lstat, here / "a") == "ENOENT"
    assert times(here)[1] > stamps[1]
    assert times(here / "d")[1] > stamps_of_d[1]


@files
def test_rename_replaces_a_file(here: Path, kind: str) -> None:
    (here / "new").write_text("new")
    FILES[kind](here / "old")
    os.link(here / "old", here / "kept", follow_symlinks=False)
    os.rename(here / "new", here / "old")
    assert (here / "old").read_text() == "new"
    assert os.lstat(here / "kept").st_nlink == 1


def test_rename_between_hard_links_does_nothing(here: Path) -> None:
    (here / "a").touch()
    os.link(here / "a", here / "b")
    os.rename(here / "a", here / "b")
    assert sorted(os.listdir(here)) == ["a", "b"]


def test_rename_of_directories(here: Path) -> None:
    (here / "a" / "sub").mkdir(parents=True)
    (here / "a" / "sub" / "f").write_text("deep")
    (here / "empty").mkdir()
    (here / "full" / "x").mkdir(parents=True)
    (here / "f").touch()
    fd = os.open(here / "a" / "sub", os.O_RDONLY)
    os.rename(here / "a", here / "empty")
    assert (here / "empty" / "sub" / "f").read_text() == "deep"
    assert os.listdir(fd) == ["f"]
    os.close(fd)
    assert error_of(os.rename, here / "empty", here / "full") == "ENOTEMPTY"
    assert error_of(os.rename, here / "empty", here / "f") == "ENOTDIR"
    assert error_of(os.rename, here / "f", here / "empty") == "EISDIR"
    assert error_of(os.rename, here / "empty", here / "empty" / "sub" / "x") == "EINVAL"
    assert error_of(os.rename, here / "none", here / "x") == "ENOENT"
    assert error_of(os.rename, here / "f", here / "no" / "x") == "ENOENT"
    assert error_of(os.rename, here / "f" / "x", here / "y") == "ENOTDIR"
    assert error_of(os.rename, here / "f", here / (LONG + "n")) == "ENAMETOOLONG"
    links = here.stat().st_nlink
    os.rename(here / "full" / "x", here / "moved")
    assert (here.stat().st_nlink, (here / "full").stat().st_nlink) == (links + 1, 2)


def test_rename_permissions(here: Path) -> None:
    source, target = mine(here, "source", 0o555), mine(here, "target", 0o777)
    (source / "f").touch()
    assert error_of(as_user, os.rename, source / "f", target / "f", uid=U1, gid=G1) == "EACCES"
    source.chmod(0o755)
    target.chmod(0o555)
    assert error_of(as_user, os.rename, source / "f", target / "f", uid=U1, gid=G1) == "EACCES"
    target.chmod(0o755)
    as_user(os.rename, source / "f", target / "f", uid=U1, gid=G1)
    foreign = mine(target, "foreign", 0o555, uid=U2)
    assert error_of(as_user, os.rename, foreign, source / "foreign", uid=U1, gid=G1) == "EACCES"  # its ".." changes


@pytest.mark.parametrize(("flags", "expected"), [(1, "EEXIST"), (2, ""), (4, ""), (3, "EINVAL"), (8, "EINVAL")])
def test_rename_flags(here: Path, flags: int, expected: str) -> None:
    from fuse_pipe import linux

    (here / "a").write_text("a")
    (here / "b").mkdir()
    if flags == 4:
        (here / "b").rmdir()
        (here / "b").write_text("b")
    directory = os.open(here, os.O_RDONLY)
    assert error_of(linux.rename, directory, b"a", directory, b"b", flags) == expected
    if flags == 2:
        assert (here / "a").is_dir()
        assert (here / "b").read_text() == "a"
        assert error_of(linux.rename, directory, b"a", directory, b"none", flags) == "ENOENT"
        (here / "a" / "inside").touch()
        assert os.listdir(here / "a") == ["inside"]
    if flags == 4:
        assert stat.S_ISCHR(os.lstat(here / "a").st_mode)
        assert (here / "b").read_text() == "a"
    os.close(directory)


# ---- sticky directories


@pytest.mark.parametrize(
    ("directory_owner", "file_owner", "allowed"), [(U1, U2, True), (U2, U1, True), (U2, U2, False)]
)
@pytest.mark.parametrize("action", ["unlink", "rmdir", "rename", "replace"])
def test_sticky(here: Path, action: str, directory_owner: int, file_owner: int, allowed: bool) -> None:
    sticky = mine(here, mode=0o1777, uid=directory_owner)
    path = sticky / "x"
    path.mkdir() if action == "rmdir" else path.touch()
    owned(path, file_owner, G2, 0o777)
    owned(here, U1, G1)
    (here / "own").touch()
    owned(here / "own", U1, G1)
    actions: dict[str, Callable[[], None]] = {
        "unlink": lambda: os.unlink(path),
        "rmdir": lambda: os.rmdir(path),
        "rename": lambda: os.rename(path, here / "taken"),
        "replace": lambda: os.rename(here / "own", path),
    }
    assert (error_of(as_user, actions[action], uid=U1, gid=G1) in ("EPERM", "EACCES")) is not allowed


# ---- rmdir and unlink


@files
def test_unlink(here: Path, kind: str) -> None:
    FILES[kind](here / "x")
    os.link(here / "x", here / "y", follow_symlinks=False)
    tick(here)
    before, stamp = ctime(here / "y"), times(here)
    os.unlink(here / "x")
    assert os.lstat(here / "y").st_nlink == 1
    assert ctime(here / "y") > before
    assert times(here)[1] > stamp[1]
    os.unlink(here / "y")
    assert os.listdir(here) == []


def test_unlink_and_rmdir_errors(here: Path) -> None:
    (here / "f").touch()
    (here / "d" / "x").mkdir(parents=True)
    assert error_of(os.unlink, here / "none") == "ENOENT"
    assert error_of(os.unlink, here / "f" / "x") == "ENOTDIR"
    assert error_of(os.unlink, here / "d") in ("EISDIR", "EPERM")
    assert error_of(os.rmdir, here / "none") == "ENOENT"
    assert error_of(os.rmdir, here / "f") == "ENOTDIR"
    assert error_of(os.rmdir, here / "d") == "ENOTEMPTY"
    assert error_of(os.rmdir, f"{here}/d/x/.") == "EINVAL"
    assert error_of(os.rmdir, f"{here}/d/x/..") == "ENOTEMPTY"
    closed = mine(here, mode=0o555)
    (closed / "f").touch()
    (closed / "d").mkdir()
    assert error_of(as_user, os.unlink, closed / "f", uid=U1, gid=G1) == "EACCES"
    assert error_of(as_user, os.rmdir, closed / "d", uid=U1, gid=G1) == "EACCES"


def test_unlinked_but_open(here: Path) -> None:
    path = here / "f"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(fd, b"before")
    os.unlink(path)
    assert os.fstat(fd).st_nlink == 0
    os.write(fd, b" after")
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, 11)
    assert os.pread(fd, 100, 0) == b"before afte"
    assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
    path.write_text("another")
    assert os.fstat(fd).st_size == 11
    os.close(fd)


def test_removed_working_directory(here: Path) -> None:
    (here / "d").mkdir()

    def remove() -> tuple[str, list[str]]:
        os.chdir(here / "d")
        os.rmdir(here / "d")
        return error_of(open, "x", "w"), os.listdir(".")

    assert as_user(remove) == ("ENOENT", [])


# ---- utimensat


@real
def test_utimensat(here: Path, kind: str) -> None:
    path = here / "x"
    KINDS[kind](path)
    tick(here)
    before = ctime(path)
    for atime, mtime in (
        (1_234_567_890_123_456_789, 987_654_321_000_000_001),
        (0, 0),
        (-1_000_000_001, -5),
        ((1 << 32) * 10**9 + 7, 1),
    ):
        os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        assert times(path)[:2] == (atime, mtime)
    assert ctime(path) > before


def test_utimensat_now_and_omit(here: Path) -> None:
    from fuse_pipe import linux

    path = here / "f"
    path.touch()
    os.utime(path, ns=(1, 2))
    fd = os.open(path, os.O_RDONLY)
    linux.utimens(fd, (0, linux.UTIME_OMIT), (5, 6))
    assert times(path)[:2] == (1, 5_000_000_006)
    linux.utimens(fd, (7, 8), (0, linux.UTIME_OMIT))
    assert times(path)[:2] == (7_000_000_008, 5_000_000_006)
    linux.utimens(fd, (0, linux.UTIME_NOW), (0, linux.UTIME_OMIT))
    assert times(path)[0] > 10**18
    assert times(path)[1] == 5_000_000_006
    os.close(fd)


def test_giving_a_file_to_nobody_else_is_a_change(here: Path) -> None:
    for path in (here / "f", here / "d", here / "l"):
        if path.name == "d":
            path.mkdir()
        elif path.name == "l":
            path.symlink_to("f")
        else:
            path.touch()
        before = os.lstat(path).st_ctime_ns
        tick(here)
        os.chown(path, -1, -1, follow_symlinks=False)
        assert os.lstat(path).st_ctime_ns > before


def test_access_time_changes_with_reading_not_with_opening(here: Path) -> None:
    path = here / "f"
    path.write_text("content")
    os.utime(path, ns=(1, 2))
    fd = os.open(path, os.O_RDONLY)
    assert times(path)[:2] == (1, 2)
    os.read(fd, 10)
    os.close(fd)
    fuse_support.wait_for(lambda: times(path)[0] > 2, "the access time", 20)
    assert times(path)[1] == 2


def test_utimensat_of_a_symlink(here: Path) -> None:
    (here / "f").touch()
    (here / "l").symlink_to("f")
    os.utime(here / "l", ns=(1, 2), follow_symlinks=False)
    assert os.lstat(here / "l").st_mtime_ns == 2
    assert os.stat(here / "f").st_mtime_ns > 2


def test_utimensat_permissions(here: Path) -> None:
    path = here / "f"
    path.touch()
    owned(path, U1, G1, 0o646)
    as_user(os.utime, path, None, uid=U2, gid=G2)  # who may write may say "now"
    assert error_of(as_user, lambda: os.utime(path, ns=(1, 2)), uid=U2, gid=G2) == "EPERM"
    path.chmod(0o644)
    assert error_of(as_user, os.utime, path, None, uid=U2, gid=G2) == "EACCES"
    as_user(lambda: os.utime(path, ns=(1, 2)), uid=U1, gid=G1)
    assert error_of(os.utime, here / "none") == "ENOENT"


# ---- what reading and writing stamp


def test_times_of_reading_and_writing(here: Path) -> None:
    path = here / "f"
    path.write_bytes(b"x" * 10000)
    tick(here)
    before = times(path)
    with path.open("r+b") as file:
        file.write(b"y")
    after = times(path)
    assert after[1] > before[1]
    assert after[2] > before[2]


def test_access_and_search_permissions(here: Path) -> None:
    directory = mine(here, mode=0o711)
    (directory / "f").write_text("x")
    assert as_user(os.stat, directory / "f", uid=U2, gid=G2).st_size == 1
    assert error_of(as_user, os.listdir, directory, uid=U2, gid=G2) == "EACCES"
    directory.chmod(0o644)
    assert error_of(as_user, os.stat, directory / "f", uid=U1, gid=G1) == "EACCES"
    assert as_user(os.listdir, directory, uid=U1, gid=G1) == ["f"]
    assert as_user(os.access, directory, os.W_OK, uid=U2, gid=G2) is False
    assert as_user(os.access, directory, os.W_OK, uid=U1, gid=G1) is True


def test_execute(here: Path) -> None:
    path = here / "script"
    path.write_text("#!/bin/sh\nexit 42\n")
    assert error_of(os.execv, path, ["script"]) == "EACCES"
    path.chmod(0o755)
    assert os.waitstatus_to_exitcode(os.system(str(path))) == 42
