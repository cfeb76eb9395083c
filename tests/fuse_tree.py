"""A directory tree as an object, and the operations that change and look at it: what differential tests do to two trees.

The standard library only, in one file: a guest runs it too (``python3 - <`` this file and what to do with it).
"""

import contextlib
import errno
import hashlib
import itertools
import os
import pickle
import random
import shutil
import stat
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NAMES = ["a", "b", "c", "d", "a/a", "a/b", "b/a", "b/b", "a/a/a", "a/b/c"]
OFFSETS = [0, 1, 100, 4095, 4096, 4097, 100_000, 1 << 20]
SIZES = [0, 1, 100, 4096, 5000, 70_000]
BITS = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o000, 0o1777, 0o7777]
IDS = [-1, 0, 1000, 1001]
TIMES = [0, 1, 10**18 + 5, -(10**9) - 1, 1 << 61]
WHENCE = [os.SEEK_SET, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE]
FLAGS = [
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
SLOTS = [0, 1, 2, 3]

# The name of a method of ``Tree``, and for each of its arguments what there is to choose from.
OPERATIONS: list[tuple[str, *tuple[Sequence[Any], ...]]] = [
    ("open", SLOTS, NAMES, FLAGS, BITS),
    ("close", SLOTS),
    ("pwrite", SLOTS, OFFSETS, SIZES),
    ("write", SLOTS, SIZES),
    ("pread", SLOTS, OFFSETS, SIZES),
    ("ftruncate", SLOTS, OFFSETS),
    ("seek", SLOTS, OFFSETS, WHENCE),
    ("fstat", SLOTS),
    ("copy", SLOTS, SLOTS, SIZES, OFFSETS, OFFSETS),
    ("fallocate", SLOTS, OFFSETS, SIZES),
    ("mkdir", NAMES, BITS),
    ("rmdir", NAMES),
    ("unlink", NAMES),
    ("rename", NAMES, NAMES),
    ("link", NAMES, NAMES),
    ("symlink", NAMES, NAMES),
    ("mkfifo", NAMES),
    ("truncate", NAMES, OFFSETS),
    ("chmod", NAMES, BITS),
    ("lchown", NAMES, IDS, IDS),
    ("utime", NAMES, TIMES, TIMES),
    ("stat", NAMES),
    ("readlink", NAMES),
    ("listdir", NAMES),
    ("setxattr", NAMES, [b"", b"v", b"w" * 500]),
    ("getxattr", NAMES),
    ("read_as", NAMES),
    ("make_as", NAMES),
]
Operation = tuple[Any, ...]  # a method's name and its arguments

# A tree to start from, so that most of what follows finds something.
PLANTED: list[Operation] = [
    *(("mkdir", name, 0o755) for name in ("a", "b", "b/a")),
    ("make_as", "c"),
    ("open", 0, "a/a", os.O_RDWR | os.O_CREAT, 0o644),
    ("open", 1, "a/b", os.O_RDWR | os.O_CREAT, 0o4755),
    ("pwrite", 0, 100, 5000),
    ("pwrite", 1, 4096, 100),
]


def chosen(seed: int, length: int) -> list[Operation]:
    """``length`` operations; the same for the same seed."""
    source = random.Random(seed)
    return [
        (name, *(source.choice(choices) for choices in arguments))
        for name, *arguments in source.choices(OPERATIONS, k=length)
    ]


def as_user(
    function: Callable[..., Any],
    *arguments: Any,
    uid: int = 0,
    gid: int = 0,
    groups: tuple[int, ...] = (),
    umask: int = 0o022,
) -> Any:
    """Call a function in a child that is somebody else; its result, or the OSError that it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            os.umask(umask)
            try:
                result: Any = (True, function(*arguments))
            except OSError as error:
                result = (False, error.errno)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(result, pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the child failed"
    good, value = pickle.loads(data)
    if good:
        return value
    raise OSError(value, os.strerror(value))


class Tree:
    """A directory and its open files. ``do`` returns what an operation gave, errors included.

    ``alike``: leave out what two kinds of file systems do differently, holes and the number of links of a directory.
    """

    def __init__(self, root: Path, *, alike: bool = False) -> None:
        self.root = root
        self.alike = alike
        self.slots: list[int | None] = [None] * len(SLOTS)

    def make(self) -> None:
        self.root.mkdir()
        self.root.chmod(0o777)

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
        if self.alike and whence in (os.SEEK_DATA, os.SEEK_HOLE):
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

    def facts(self, info: os.stat_result) -> Any:
        directory = stat.S_ISDIR(info.st_mode)
        links = 0 if directory and self.alike else info.st_nlink
        return oct(info.st_mode), links, info.st_uid, info.st_gid, 0 if directory else info.st_size

    def everything(self) -> list[Any]:
        """The path, the facts and the content of all that is in the tree; of a file's content, the SHA-256."""
        found: list[Any] = []
        for directory, names, files in os.walk(self.root):
            for name in names + files:
                path = os.path.join(directory, name)
                info = os.lstat(path)
                content = None
                if stat.S_ISREG(info.st_mode):
                    content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                elif stat.S_ISLNK(info.st_mode):
                    content = os.readlink(path)
                found.append((os.path.relpath(path, self.root), self.facts(info), content))
        return sorted(found)

    def digest(self) -> str:
        """One word for everything that is in the tree."""
        return hashlib.sha256(repr(self.everything()).encode()).hexdigest()

    def close_all(self) -> None:
        for n in SLOTS:
            with contextlib.suppress(OSError):
                self.close(n)

    def remove(self) -> None:
        self.close_all()
        shutil.rmtree(self.root)


def difference(tree: Tree, plain: Tree, operations: list[Operation]) -> str:
    """Do all the operations to both, new, trees; the first difference between them in words, "" if there is none."""
    old = os.umask(0o022)
    try:
        tree.make()
        plain.make()
        for n, operation in enumerate(operations):
            got, expected = tree.do(*operation), plain.do(*operation)
            if got != expected:
                return f"operation {n}, {operation}: {got!r}, expected {expected!r}"
        for got, expected in itertools.zip_longest(tree.everything(), plain.everything()):
            if got != expected:
                return f"at the end: {got}, expected {expected}"
        return ""
    finally:
        os.umask(old)


def plant(path: Path, files: int) -> None:
    """A tree with every kind of file, for programs that copy trees; ``files`` are ordinary ones, each larger than the last."""
    (path / "files").mkdir(parents=True)
    for n in range(files):
        (path / "files" / f"{n}").write_text(f"{n}\n" * n * 100)
    (path / "empty").mkdir()
    (path / "link").symlink_to("files/1")
    (path / "dangling").symlink_to("/nowhere")
    (path / "hard").hardlink_to(path / "files" / "0")
    os.mkfifo(path / "fifo")
    (path / "big").write_bytes(os.urandom(1_000_000))
    (path / "mode").write_text("x")
    (path / "mode").chmod(0o4751)
    os.chown(path / "empty", 1234, 5678)
    with (path / "sparse").open("wb") as file:
        file.seek(4 << 20)
        file.write(b"end")
