"""The EROFS writer, read back by an independent reader; the kernel's own reading is in tests/host."""

import io
import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images_support import read_erofs

from fcvm.images.erofs import BLOCK, Directory, Node, Symlink, Writer

FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755


def build(fill: "object", path: Path | None = None) -> bytes:
    """The image that ``fill(writer, root)`` makes."""
    with tempfile.TemporaryFile() as file:
        writer, root = Writer(file.fileno()), Directory(DIRECTORY)
        fill(writer, root)  # type: ignore[operator]
        size = writer.finish(root, uuid=bytes(16), time=0)
        data = os.pread(file.fileno(), size + 1, 0)
    assert len(data) == size
    return data


# Around a block, around the longest tail that gets a new inode block, and around what fits behind an inode.
SIZES = [0, 1, 31, 32, 2047, 2048, 2049, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 8193, (1 << 20) + 5, 3 << 20]


def test_files_of_every_size() -> None:
    contents = {f"{size}-{n}".encode(): os.urandom(size) for size in SIZES for n in range(3)}

    def fill(writer: Writer, root: Directory) -> None:
        for name, content in contents.items():
            root.entries[name] = node = Node(FILE)
            writer.add_file(node, len(content), io.BytesIO(content).read)

    seen = read_erofs(build(fill))
    assert {path[1:].encode(): file.content for path, file in seen.items() if path != "/"} == contents


def test_attributes_links_and_devices() -> None:
    def fill(writer: Writer, root: Directory) -> None:
        file = Node(stat.S_IFREG | 0o6755, 70000, 80000, 1700000000_123456789, {b"user.a": b"1", b"security.b": bytes(5000)})
        writer.add_bytes(file, b"content")
        file.links = 3
        writer.set_links(file)
        link = Symlink(stat.S_IFLNK | 0o777, target=b"../far/" + b"a" * 4000)
        writer.add_bytes(link, link.target)
        device = Node(stat.S_IFBLK | 0o600)
        writer.add_special(device, 259, 70000)
        before = Node(FILE, mtime_ns=-1)
        writer.add_bytes(before, b"")
        below = Directory(stat.S_IFDIR | 0o1777, 1, 2, 3, {b"trusted.overlay.opaque": b"y", b"odd.x": b"dropped"})
        below.entries = {b"same": file, b"device": device}
        root.entries = {b"file": file, b"link": link, b"below": below, b"again": file, b"1969": before}

    seen = read_erofs(build(fill))
    for path in ("/file", "/again", "/below/same"):
        file = seen[path]
        assert (file.mode, file.uid, file.gid, file.links) == (stat.S_IFREG | 0o6755, 70000, 80000, 3)
        assert (file.mtime_ns, file.content) == (1700000000_123456789, b"content")
        assert file.xattrs == ((b"security.b", bytes(5000)), (b"user.a", b"1"))
    assert seen["/link"].content == b"../far/" + b"a" * 4000
    assert seen["/below/device"].device == (70000 & 0xFF) | 259 << 8 | (70000 & ~0xFF) << 12
    assert seen["/1969"].mtime_ns == -1
    assert seen["/below"].xattrs == ((b"trusted.overlay.opaque", b"y"),)
    assert (seen["/"].links, seen["/below"].links) == (3, 2)


@pytest.mark.parametrize("count", [0, 1, 100, 5000])
def test_directories_of_every_size(count: int) -> None:
    def fill(writer: Writer, root: Directory) -> None:
        below = root.entries[b"d"] = Directory(DIRECTORY)
        shared = Node(FILE)
        writer.add_bytes(shared, b"x")
        below.entries = {f"{n * 7919 % 100003}-{'n' * (n % 200)}".encode(): shared for n in range(count)}

    assert len(read_erofs(build(fill))) == count + 2


def test_a_file_that_ends_too_early() -> None:
    for size in (100, 10000):
        with pytest.raises(EOFError):
            build(lambda writer, root, size=size: writer.add_file(Node(FILE), size, io.BytesIO(b"short").read))


def test_a_reader_that_returns_little_at_a_time() -> None:
    content = os.urandom(9001)

    def fill(writer: Writer, root: Directory) -> None:
        source = io.BytesIO(content)
        root.entries[b"f"] = node = Node(FILE)
        writer.add_file(node, len(content), lambda count: source.read(min(count, 17)))

    assert read_erofs(build(fill))["/f"].content == content


names = st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))
trees = st.recursive(st.binary(max_size=6000), lambda inner: st.dictionaries(names, inner, max_size=6), max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, trees, max_size=8))
def test_any_tree(tree: dict[bytes, object]) -> None:
    expected: dict[str, bytes | None] = {}

    def add(writer: Writer, value: object, path: str) -> Node:
        if isinstance(value, bytes):
            node = Node(FILE)
            writer.add_bytes(node, value)
            expected[path] = value
            return node
        assert isinstance(value, dict)
        expected[path] = None
        return Directory(DIRECTORY, entries={n: add(writer, v, os.path.join(path, os.fsdecode(n))) for n, v in value.items()})

    def fill(writer: Writer, root: Directory) -> None:
        made = add(writer, tree, "/")
        assert isinstance(made, Directory)
        root.entries = made.entries

    seen = read_erofs(build(fill))
    assert {path: None if stat.S_ISDIR(file.mode) else file.content for path, file in seen.items()} == expected


def test_the_same_input_gives_the_same_bytes() -> None:
    def fill(writer: Writer, root: Directory) -> None:
        for n in range(50):
            root.entries[b"%d" % n] = node = Node(FILE)
            writer.add_bytes(node, b"%d" % n * n * 100)

    first = build(fill)
    assert first == build(fill)
    assert len(first) % BLOCK == 0
