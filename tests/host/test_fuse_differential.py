"""Random sequences of operations on a mount and on a plain directory: every result and the whole tree must be the
same.
"""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuse_support
import pytest
from fuse_support import Mount, as_user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "c", "d", "a/a", "a/b", "b/a", "b/b", "a/a/a", "a/b/c"])
OFFSETS = st.sampled_from([0, 1, 100, 4095, 4096, 4097, 100_000, 1 << 20])
SIZES = st.sampled_from([0, 1, 100, 4096, 5000, 70_000])
BITS = st.sampled_from([0o644, 0o600, 0o755, 0o4755, 0o2755, 0o000, 0o1777, 0o7777])
IDS = st.sampled_from([-1, 0, 1000, 1001])
TIMES = st.sampled_from([0, 1, 10**18 + 5, -(10**9) - 1, 1 << 61])
FLAGS = st.sampled_from(
    [
        os.O_RDONLY,
        os.O_RDWR,
        os.O_WRONLY | os.O_CREAT,
        os.O_RDWR | os.O_CREAT | os.O_EXCL,
        os.O_WRONLY | os.O_TRUNC,
        os.O_WRONLY | os.O_APPEND | os.O_CREAT,
        os.O_RDONLY | os.O_DIRECTORY,
        os.O_RDWR | os.O_NOFOLLOW,
        os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    ]
)
SLOTS = st.integers(0, 3)

OPERATIONS = st.one_of(
    st.tuples(st.just("open"), SLOTS, NAMES, FLAGS, BITS),
    st.tuples(st.just("close"), SLOTS),
    st.tuples(st.just("pwrite"), SLOTS, OFFSETS, SIZES),
    st.tuples(st.just("write"), SLOTS, SIZES),
    st.tuples(st.just("pread"), SLOTS, OFFSETS, SIZES),
    st.tuples(st.just("ftruncate"), SLOTS, OFFSETS),
    st.tuples(st.just("seek"), SLOTS, OFFSETS, st.sampled_from([os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE])),
    st.tuples(st.just("fstat"), SLOTS),
    st.tuples(st.just("copy"), SLOTS, SLOTS, SIZES, OFFSETS, OFFSETS),
    st.tuples(st.just("fallocate"), SLOTS, OFFSETS, SIZES),
    st.tuples(st.just("mkdir"), NAMES, BITS),
    st.tuples(st.just("rmdir"), NAMES),
    st.tuples(st.just("unlink"), NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("link"), NAMES, NAMES),
    st.tuples(st.just("symlink"), NAMES, NAMES),
    st.tuples(st.just("mkfifo"), NAMES),
    st.tuples(st.just("truncate"), NAMES, OFFSETS),
    st.tuples(st.just("chmod"), NAMES, BITS),
    st.tuples(st.just("lchown"), NAMES, IDS, IDS),
    st.tuples(st.just("utime"), NAMES, TIMES, TIMES),
    st.tuples(st.just("stat"), NAMES),
    st.tuples(st.just("readlink"), NAMES),
    st.tuples(st.just("listdir"), NAMES),
    st.tuples(st.just("setxattr"), NAMES, st.sampled_from([b"", b"v", b"w" * 500])),
    st.tuples(st.just("getxattr"), NAMES),
    st.tuples(st.just("read_as"), NAMES),
    st.tuples(st.just("make_as"), NAMES),
)


class Tree:
    """One of the two: a directory and its open files. ``do`` returns what an operation gave, errors included."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        root.chmod(0o777)
        self.slots: list[int | None] = [None] * 4

    def do(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self, name)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def path(self, name: str) -> Path:
        return self.root / name

    def slot(self, n: int) -> int:
        fd = self.slots[n]
        if fd is None:
            raise OSError(errno.EBADF, "no such slot")
        return fd

    def open(self, n: int, name: str, flags: int, mode: int) -> None:
        with contextlib.suppress(OSError):
            self.close(n)
        if stat.S_ISFIFO(os.lstat(self.path(name)).st_mode) if os.path.lexists(self.path(name)) else False:
            return
        self.slots[n] = os.open(self.path(name), flags | os.O_NONBLOCK, mode)

    def close(self, n: int) -> None:
        fd = self.slot(n)
        self.slots[n] = None
        os.close(fd)

    def pwrite(self, n: int, offset: int, size: int) -> int:
        return os.pwrite(self.slot(n), b"p" * size, offset)

    def write(self, n: int, size: int) -> int:
        return os.write(self.slot(n), b"w" * size)

    def pread(self, n: int, offset: int, size: int) -> bytes:
        return os.pread(self.slot(n), size, offset)

    def ftruncate(self, n: int, size: int) -> None:
        os.ftruncate(self.slot(n), size)

    def seek(self, n: int, offset: int, whence: int) -> int:
        if stat.S_ISDIR(os.fstat(self.slot(n)).st_mode):
            return 0
        return os.lseek(self.slot(n), offset, whence)

    def fstat(self, n: int) -> Any:
        return self.facts(os.fstat(self.slot(n)))

    def copy(self, n: int, to: int, size: int, offset: int, target: int) -> int:
        return os.copy_file_range(self.slot(n), self.slot(to), size, offset, target)

    def fallocate(self, n: int, offset: int, size: int) -> None:
        os.posix_fallocate(self.slot(n), offset, size)

    def mkdir(self, name: str, mode: int) -> None:
        os.mkdir(self.path(name), mode)

    def rmdir(self, name: str) -> None:
        os.rmdir(self.path(name))

    def unlink(self, name: str) -> None:
        os.unlink(self.path(name))

    def rename(self, name: str, to: str) -> None:
        os.rename(self.path(name), self.path(to))

    def link(self, name: str, to: str) -> None:
        os.link(self.path(name), self.path(to), follow_symlinks=False)

    def symlink(self, target: str, name: str) -> None:
        os.symlink(target, self.path(name))

    def mkfifo(self, name: str) -> None:
        os.mkfifo(self.path(name))

    def truncate(self, name: str, size: int) -> None:
        os.truncate(self.path(name), size)

    def chmod(self, name: str, mode: int) -> None:
        os.chmod(self.path(name), mode)

    def lchown(self, name: str, uid: int, gid: int) -> None:
        os.lchown(self.path(name), uid, gid)

    def utime(self, name: str, atime: int, mtime: int) -> Any:
        os.utime(self.path(name), ns=(atime, mtime), follow_symlinks=False)
        info = os.lstat(self.path(name))
        return info.st_atime_ns, info.st_mtime_ns

    def stat(self, name: str) -> Any:
        return self.facts(os.lstat(self.path(name)))

    def readlink(self, name: str) -> str:
        return os.readlink(self.path(name))

    def listdir(self, name: str) -> list[str]:
        return sorted(os.listdir(self.path(name)))

    def setxattr(self, name: str, value: bytes) -> None:
        os.setxattr(self.path(name), "user.test", value)

    def getxattr(self, name: str) -> bytes:
        return os.getxattr(self.path(name), "user.test")

    def read_as(self, name: str) -> Any:
        return as_user(lambda: os.read(os.open(self.path(name), os.O_RDONLY | os.O_NONBLOCK), 100), uid=1000, gid=1000)

    def make_as(self, name: str) -> Any:
        return as_user(
            lambda: os.write(os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666), b"m"),
            uid=1000,
            gid=1001,
        )

    @staticmethod
    def facts(info: os.stat_result) -> Any:
        size = info.st_size if not stat.S_ISDIR(info.st_mode) else 0
        return oct(info.st_mode), info.st_nlink, info.st_uid, info.st_gid, size

    def everything(self) -> list[Any]:
        found = []
        for directory, names, files in os.walk(self.root):
            for name in sorted(names + files):
                path = os.path.join(directory, name)
                info = os.lstat(path)
                content = (
                    Path(path).read_bytes()
                    if stat.S_ISREG(info.st_mode)
                    else os.readlink(path)
                    if stat.S_ISLNK(info.st_mode)
                    else None
                )
                found.append((os.path.relpath(path, self.root), self.facts(info), content))
        return sorted(found)

    def remove(self) -> None:
        for n in range(4):
            with contextlib.suppress(OSError):
                self.close(n)
        shutil.rmtree(self.root)


@pytest.fixture(scope="module")
def shared() -> Iterator[Mount]:
    with fuse_support.scratch() as base, fuse_support.mount(base) as mounted:
        (base / "plain").mkdir()
        yield mounted


def compare(mounted: Mount, operations: list[tuple[Any, ...]]) -> None:
    old = os.umask(0o022)
    plain, guest = Tree(mounted.base / "plain" / "tree"), Tree(mounted.path / "tree")
    try:
        for n, operation in enumerate(operations):
            assert guest.do(*operation) == plain.do(*operation), f"operation {n}: {operation}"
        assert guest.everything() == plain.everything()
        assert Tree.everything(_at(mounted.host / "tree")) == plain.everything()
    finally:
        os.umask(old)
        plain.remove()
        guest.remove()


def _at(root: Path) -> Tree:
    tree = Tree.__new__(Tree)
    tree.root = root
    return tree


COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **COMMON)
@given(operations=st.lists(OPERATIONS, min_size=5, max_size=60))
def test_random_operations(shared: Mount, operations: list[tuple[Any, ...]]) -> None:
    compare(shared, operations)


MAKE: Callable[..., Any] = lambda *names: [("mkdir", name, 0o755) for name in names]  # noqa: E731


@settings(max_examples=100, derandomize=True, **COMMON)
@given(operations=st.lists(OPERATIONS, min_size=10, max_size=60))
def test_random_operations_in_a_tree(shared: Mount, operations: list[tuple[Any, ...]]) -> None:
    files = [
        ("make_as", "c"),
        ("open", 0, "a/a", os.O_RDWR | os.O_CREAT, 0o644),
        ("open", 1, "a/b", os.O_RDWR | os.O_CREAT, 0o4755),
    ]
    compare(shared, [*MAKE("a", "b", "b/a"), *files, ("pwrite", 0, 100, 5000), ("pwrite", 1, 4096, 100), *operations])
