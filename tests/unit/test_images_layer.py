"""Layers: whiteouts, directories that a layer leaves out, links, and tars that are damaged or hostile."""

import base64
import gzip
import io
import json
import os
import stat
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator

import images_support
import pytest
from archive import File, directory, layer, symlink

from fcvm.errors import ImageError
from fcvm.images import erofs, tar_split, tars
from fcvm.images import layer as layers
from fcvm.images.erofs import Directory, Node, Symlink, Writer
from fcvm.images.layer import OPAQUE_XATTR, Whiteout

Read = Callable[..., Directory]


@pytest.fixture
def read() -> Iterator[Read]:
    """Reads the layer of these files above others."""
    with tempfile.TemporaryFile() as file:
        writer = Writer(file.fileno())
        yield lambda *files, below=(): layers.read(io.BytesIO(layer(files)), writer, list(below))[0]  # type: ignore[arg-type]


def at(tree: Directory, path: str) -> Node:
    node: Node = tree
    for part in path.split("/"):
        assert isinstance(node, Directory)
        node = node.entries[part.encode()]
    return node


def test_a_whiteout_is_a_character_device_that_hides_the_name(read: Read) -> None:
    tree = read(directory("a"), File("a/.wh.gone"))
    gone = at(tree, "a/gone")
    assert isinstance(gone, Whiteout)
    assert stat.S_ISCHR(gone.mode)
    assert set(tree.entries[b"a"].entries) == {b"gone"}  # type: ignore[attr-defined]


def test_a_whiteout_does_not_hide_what_its_own_layer_has(read: Read) -> None:
    for files in ([File("x", b"1"), File(".wh.x")], [File(".wh.x"), File("x", b"1")]):
        assert stat.S_ISREG(at(read(*files), "x").mode)


def test_a_removed_directory_that_is_made_again_is_opaque(read: Read) -> None:
    for files in ([File(".wh.d"), directory("d")], [directory("d"), File(".wh.d")], [File(".wh.d"), File("d/f", b"1")]):
        assert at(read(*files), "d").xattrs[OPAQUE_XATTR] == b"y"


def test_an_opaque_mark_outlives_the_directorys_own_entry(read: Read) -> None:
    tree = read(File("d/.wh..wh..opq"), directory("d", 0o700, 5, 6))
    assert at(tree, "d").xattrs == {OPAQUE_XATTR: b"y"}
    assert at(tree, "d").uid == 5
    assert not at(tree, "d").entries  # type: ignore[attr-defined]


def test_marks_of_old_storage_drivers_are_no_files(read: Read) -> None:
    assert not read(File(".wh..wh.plnk"), File(".wh..wh.aufs")).entries


def test_a_directory_that_the_layer_leaves_out_is_as_below(read: Read) -> None:
    lowest = read(directory("etc", 0o750, 7, 8), directory("etc/deep", 0o1777))
    middle = read(directory("other"))
    top = read(File("etc/deep/new", b"1"), below=(middle, lowest))
    assert (stat.S_IMODE(at(top, "etc").mode), at(top, "etc").uid, at(top, "etc").gid) == (0o750, 7, 8)
    assert stat.S_IMODE(at(top, "etc/deep").mode) == 0o1777


def test_a_directory_that_nobody_describes_is_roots(read: Read) -> None:
    assert (at(read(File("a/b/c", b"")), "a/b").mode, at(read(File("a/b", b"")), "a").uid) == (stat.S_IFDIR | 0o755, 0)


def test_the_root_may_be_described(read: Read) -> None:
    lowest = read(directory("./", 0o700, 3, 4))
    assert (stat.S_IMODE(lowest.mode), lowest.uid) == (0o700, 3)
    assert stat.S_IMODE(read(File("x"), below=(lowest,)).mode) == 0o700


def test_parents_that_are_symbolic_links_are_followed_inside(read: Read) -> None:
    tree = read(directory("usr"), symlink("lib", "usr/lib"), File("lib/x", b"1"), symlink("out", "../../../etc"), File("out/y", b"2"))
    assert stat.S_ISREG(at(tree, "usr/lib/x").mode)
    assert stat.S_ISREG(at(tree, "etc/y").mode)
    assert isinstance(at(tree, "lib"), Symlink)


def test_names_cannot_leave_the_root(read: Read) -> None:
    tree = read(File("../../x", b"1"), File("/abs", b"2"), File("a/../../b", b"3"))
    assert set(tree.entries) == {b"x", b"abs", b"b"}


def test_hard_links_share_a_node(read: Read) -> None:
    tree = read(File("a", b"1"), directory("d"), File("d/b", kind=tarfile.LNKTYPE, link="a"), File("c", kind=tarfile.LNKTYPE, link="./a"))
    assert at(tree, "a") is at(tree, "d/b") is at(tree, "c")
    assert at(tree, "a").links == 3


def test_a_later_entry_replaces_an_earlier_one(read: Read) -> None:
    tree = read(File("x", b"1"), directory("x"), File("x/y", b"2"), directory("d"), symlink("d", "x"))
    assert isinstance(at(tree, "x"), Directory)
    assert isinstance(at(tree, "d"), Symlink)


@pytest.mark.parametrize(
    "files",
    [
        [File("a", kind=tarfile.LNKTYPE, link="missing")],
        [directory("d"), File("a", kind=tarfile.LNKTYPE, link="d")],
        [symlink("loop", "loop"), File("loop/x", b"")],
        [File("f", b"1"), File("f/x", b"2")],
    ],
)
def test_layers_that_contradict_themselves(read: Read, files: list[File]) -> None:
    with pytest.raises(ImageError, match="damaged"):
        read(*files)


def test_a_layer_that_ends_too_early() -> None:
    whole = layer([File("a", bytes(100000)), File("b", b"2")])
    with tempfile.TemporaryFile() as file:
        for length in (700, 50000):
            with pytest.raises(ImageError, match="damaged"):
                layers.read(io.BytesIO(whole[:length]), Writer(file.fileno()), [])  # type: ignore[arg-type]


def test_odd_names_and_attributes_survive(read: Read) -> None:
    raw = b"\xff\xfe-" + "ä".encode()
    value = bytes(range(256))
    tree = read(
        File(raw.decode("utf-8", "surrogateescape"), b"1", pax={"SCHILY.xattr.user.x": value.decode("utf-8", "surrogateescape")}),
        File("exact", pax={"mtime": "1700000000.123456789"}),
        File("n" * 255 + "/" + "m" * 255, b"2"),
    )
    assert tree.entries[raw].xattrs == {b"user.x": value}
    assert at(tree, "exact").mtime_ns == 1700000000_123456789
    assert stat.S_ISREG(at(tree, "n" * 255 + "/" + "m" * 255).mode)


def strange(name: str = "x", *, pax: dict[str, str] | None = None, kind: int = tarfile.PAX_FORMAT, **attributes: object) -> bytes:
    """A tar with one empty file that is strange in some way."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as archive:
        member = tarfile.TarInfo(name)
        member.pax_headers = pax or {}
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        archive.addfile(member)
    return out.getvalue()


@pytest.mark.parametrize(
    "tar",
    [
        strange(uid=1 << 40),
        strange(uid=-5, kind=tarfile.GNU_FORMAT),
        strange(type=tarfile.CHRTYPE, devmajor=1 << 30, kind=tarfile.GNU_FORMAT),
        strange(pax={"mtime": "1e30"}),
        strange(pax={"mtime": "1e999999999"}),
        strange(pax={"mtime": "1e999980"}),  # as an integer it would take half a minute
        strange(pax={"mtime": "nan"}),
        strange(pax={"SCHILY.xattr.user." + "a" * 300: "x"}),
        strange(pax={"SCHILY.xattr.user.a": "x" * 70_000}),
        strange("a" * 256),
        strange("a/" * 2500),
        strange(pax={"path": "a\0b"}),
        strange("link", type=tarfile.SYMTYPE, linkname="x" * 5000),
        strange("x" * 200, kind=tarfile.GNU_FORMAT)[:1024] * 3000,  # long names of long names
    ],
)
def test_what_linux_has_no_place_for_is_a_damaged_layer(tar: bytes) -> None:
    with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="damaged"):
        layers.read(io.BytesIO(tar), Writer(file.fileno()), [])


class Endless(io.RawIOBase):
    """A tar that begins in some way and goes on for ever, as gigabytes of the same are a few kilobytes of gzip."""

    def __init__(self, start: bytes, more: bytes) -> None:
        self.start, self.more, self.given = start, more, 0

    def read(self, size: int = -1) -> bytes:
        assert size >= 0
        self.given += size
        assert self.given < 200 << 20, "it takes whatever it is given"
        data, self.start = self.start[:size], self.start[size:]
        while len(data) < size:
            self.start = self.more * -(-size // len(self.more))
            left = size - len(data)
            data, self.start = data + self.start[:left], self.start[left:]
        return data


def header(name: str = "x", kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def sparse(isextended: bool) -> bytes:
    """The header of a sparse file of GNU's older kind."""
    block = bytearray(header(kind=tarfile.GNUTYPE_SPARSE))
    block[482], block[483:495] = isextended, b"00000001000\0"
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


ONE_BLOCK = strange(pax={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})[:1536]
HOSTILE = {
    "pax": (header(kind=tarfile.XHDTYPE, size=1 << 33), b"x"),
    "pax in small pieces": (b"", strange(pax={"comment": "x" * 1000})[:1536] * 200),
    "long name": (header(kind=tarfile.GNUTYPE_LONGNAME, size=1 << 33), b"x"),
    "long link": (header(kind=tarfile.GNUTYPE_LONGLINK, size=1 << 33), b"x"),
    "sparse map": (ONE_BLOCK + b"99999999999\n", b"0\n"),
    "older sparse map": (sparse(True), (b"00000001000\0" * 42 + b"\1").ljust(512, b"\0")),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_describes_a_file_has_an_end(hostile: str) -> None:
    stream = Endless(*HOSTILE[hostile])
    tracemalloc.start()
    try:
        with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="damaged"):
            layers.read(stream, Writer(file.fileno()), [])
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_names_may_be_as_long_as_linux_lets_them(read: Read) -> None:
    tree = read(File("a" * 255, b"1"), File(".wh." + "b" * 255), symlink("l", "x" * 4095))
    assert {len(name) for name in tree.entries} == {255, 1}


def test_headers_for_all_files_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST", 100_000)
    out = io.BytesIO()
    for number in range(10):
        with tarfile.open(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT, pax_headers={f"key{number}": "x" * 20_000}) as archive:
            out.write(archive.fileobj.getvalue())  # type: ignore[union-attr]
        out.write(header())
    with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="about all of its files"):
        layers.read(io.BytesIO(out.getvalue()), Writer(file.fileno()), [])


def test_a_skipped_file_has_an_end() -> None:
    whole = header(".wh.gone", size=1 << 33) + b"x"
    with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="damaged"):
        layers.read(io.BytesIO(whole), Writer(file.fileno()), [])


def holes(size: int, count: int = 1) -> bytes:
    """A layer of sparse files of which nothing but a byte is there."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    return layer([File(f"f{n}", f"1\n{size - 1}\n1\n".encode().ljust(512, b"\0") + b"e", pax=pax) for n in range(count)])


def test_holes_take_no_space() -> None:
    with tempfile.TemporaryFile() as file:
        writer = Writer(file.fileno())
        tree, _ = layers.read(io.BytesIO(holes(50_000_000)), writer, [])
        assert writer.finish(tree, uuid=bytes(16), time=0) > 50_000_000
        assert os.fstat(file.fileno()).st_blocks * 512 < 1_000_000
        file.seek(0)
        assert images_support.read_erofs(file.read())["/f0"].content == bytes(49_999_999) + b"e"


def test_sparse_files_have_an_end() -> None:
    for tar in (holes(1 << 60), holes(17 << 30)):
        with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="sparse files have more than 16 GiB"):
            layers.read(io.BytesIO(tar), Writer(file.fileno()), [])


def test_many_small_sparse_files_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MOST_SPARSE", 100_000)
    with tempfile.TemporaryFile() as file, pytest.raises(ImageError, match="sparse"):
        layers.read(io.BytesIO(holes(30_000, count=4)), Writer(file.fileno()), [])


@pytest.mark.parametrize("files", [[File(f"file{n}") for n in range(200)], [File("a/" * 200 + "f")], [File("f", pax={"SCHILY.xattr.user.a": "x" * 60_000}), File("g", pax={"SCHILY.xattr.user.a": "x" * 60_000})]])  # fmt: skip
def test_names_and_attributes_have_an_end(read: Read, files: list[File], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erofs, "MOST_HELD", 100_000)
    with pytest.raises(ImageError, match="more names"):
        read(*files)


def test_the_record_of_a_tar_has_an_end(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_split, "MOST", 10_000)
    with pytest.raises(ImageError, match="beside the contents"):
        read(*(File(os.urandom(20).hex()) for _ in range(2000)), File("last", b"1"))


def test_the_content_of_a_sparse_file_is_not_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_split, "FLUSH", 1 << 20)
    size = 100 << 20
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    tar = layer([File("f", f"1\n0\n{size}\n".encode().ljust(512, b"\0") + bytes(size), pax=pax)])
    tracemalloc.start()
    try:
        with tempfile.TemporaryFile() as file:
            _, record = layers.read(io.BytesIO(tar), Writer(file.fileno()), [])
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
    segments = [json.loads(line)["payload"] for line in gzip.decompress(record).splitlines()]
    assert b"".join(map(base64.b64decode, segments)) == tar
