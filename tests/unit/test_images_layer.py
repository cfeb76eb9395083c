"""Layers: whiteouts, directories that a layer leaves out, links, and tars that are damaged or hostile."""

import io
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator

import images_support  # noqa: F401  (puts examples/ on the path)
import pytest
from archive import File, directory, layer, symlink

from fcvm.errors import ImageError
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


def test_names_may_be_as_long_as_linux_lets_them(read: Read) -> None:
    tree = read(File("a" * 255, b"1"), File(".wh." + "b" * 255), symlink("l", "x" * 4095))
    assert {len(name) for name in tree.entries} == {255, 1}
