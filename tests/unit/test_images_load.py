"""What is in an archive, and what its images will be called; and the writer of examples/."""

import bz2
import contextlib
import gzip
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from images_support import archive, image

from fcvm.errors import ImageError, NotFoundError, UsageError
from fcvm.images import load, oci_archive, tars
from fcvm.images.reference import Reference


@pytest.mark.parametrize(
    ("text", "full"),
    [("x", "localhost/x:latest"), ("a/b:1", "localhost/a/b:1"), ("localhost/x:2", "localhost/x:2"), ("quay.io/x", "quay.io/x:latest")],
)
def test_names_of_what_is_loaded(text: str, full: str) -> None:
    assert load.local_name(text) == full


def test_a_digest_is_no_name() -> None:
    with pytest.raises(UsageError):
        load.local_name("x@sha256:" + "0" * 64)


def test_the_two_kinds_of_archive(tmp_path: Path) -> None:
    path = image(tmp_path / "a.tar", "localhost/a:1")
    assert [(str(r), names) for r, names in load.contents(path)] == [(f"docker-archive:{path}", ["localhost/a:1"])]
    assert [(str(r), names) for r, names in load.contents(path, "oci-archive")] == [(f"oci-archive:{path}", ["localhost/a:1"])]


def test_directories(tmp_path: Path) -> None:
    with tarfile.open(image(tmp_path / "a.tar", "localhost/a:1")) as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    assert str(load.contents(tmp_path / "layout")[0][0]) == f"oci:{tmp_path / 'layout'}"
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir/manifest.json").write_text("{}")
    assert [(r.transport, names) for r, names in load.contents(tmp_path / "dir")] == [("dir", [])]


def test_an_archive_with_several_images(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps([{"RepoTags": ["a:1"]}, {"RepoTags": None}]))
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(tmp_path / "manifest.json", "./manifest.json")
    found = [(str(r), names) for r, names in load.contents(tmp_path / "two.tar")]
    assert found == [(f"docker-archive:{tmp_path}/two.tar:@0", ["a:1"]), (f"docker-archive:{tmp_path}/two.tar:@1", [])]


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").write_text("")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "text", "text")
    (tmp_path / "cut.tar").write_bytes(image(tmp_path / "a.tar").read_bytes()[:300])
    for name in ("text", "empty", "other.tar", "cut.tar", "."):
        with pytest.raises(ImageError, match="damaged, or not an image"):
            load.contents(tmp_path / name)
    with pytest.raises(NotFoundError):
        load.contents(tmp_path / "missing")


def test_an_index_without_end_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes of gzip can be gigabytes of it."""
    monkeypatch.setattr(load, "MOST", 1000)
    (tmp_path / "manifest.json").write_text('[{"RepoTags": ["a"]}]' + 1000 * " ")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "manifest.json", "manifest.json")
    with pytest.raises(ImageError, match="damaged, or not an image"):
        load.contents(tmp_path / "a.tar")


def test_an_archive_of_nothing_but_long_names_is_no_image(tmp_path: Path) -> None:
    member = tarfile.TarInfo("x" * 200)
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT)[:1024] * 3000)
    with pytest.raises(ImageError, match="damaged, or not an image"):
        load.contents(tmp_path / "a.tar")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_what_describes_a_file_of_an_archive_has_an_end(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 100 << 20
    (tmp_path / "a.tar").write_bytes(compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(member.size)))
    tracemalloc.start()
    try:
        for read in (load.contents, lambda path: oci_archive.unpack(Reference("oci-archive", str(path), str(path)), tmp_path / "o")):
            with pytest.raises(ImageError, match="damaged"):
                read(tmp_path / "a.tar")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_an_archive_of_countless_files_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MOST_MEMBERS", 100)
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("manifest.json").tobuf() * 101)
    with pytest.raises(ImageError, match="damaged, or not an image"):
        load.contents(tmp_path / "a.tar")


@pytest.mark.parametrize("index", [
    "[" * 100_000, "null", "1", '"x"', "[]", "{}", "[1]", '[{"RepoTags": "abc"}]', '[{"RepoTags": [1]}]', '{"manifests": 1}', '{"manifests": []}',
    '{"manifests": [1]}', '{"manifests": [{"annotations": {"io.containerd.image.name": 5}}]}',
])  # fmt: skip
@pytest.mark.parametrize("kind", ["docker-archive", "oci-archive"])
def test_an_index_of_another_form_is_no_image(index: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "index").write_text(index)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ["manifest.json"] if kind == "docker-archive" else ["oci-layout", "index.json"]:
            tar.add(tmp_path / "index", name)
    with pytest.raises(ImageError, match="damaged, or not an image"):
        load.contents(tmp_path / "a.tar")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damaged_compressed_archive(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    whole = compress(image(tmp_path / "a.tar").read_bytes())
    for position in range(20, len(whole), len(whole) // 40):
        (tmp_path / "a").write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        with contextlib.suppress(ImageError):  # or it is in a part that is not looked at
            load.contents(tmp_path / "a")
            oci_archive.unpack(Reference("oci-archive", str(tmp_path / "a"), str(tmp_path / "a")), tmp_path / f"o{position}")


def test_the_writer_gives_the_same_bytes_again(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a.tar", "localhost/a:1"), image(tmp_path / "b.tar", "localhost/a:1")
    assert first.read_bytes() == second.read_bytes()


def test_every_blob_is_what_its_name_says(tmp_path: Path) -> None:
    import hashlib

    with tarfile.open(image(tmp_path / "a.tar")) as tar:
        blobs = {m.name: tar.extractfile(m).read() for m in tar if m.name.startswith("blobs/")}  # type: ignore[union-attr]
    assert len(blobs) == 4  # two layers, configuration, manifest
    for name, content in blobs.items():
        assert name.endswith(hashlib.sha256(content).hexdigest())


def test_a_static_program_is_told_from_a_dynamic_one() -> None:
    import packages

    dynamic = Path("/bin/true").read_bytes()
    assert not packages.is_static(dynamic)
    assert not packages.is_static(b"#!/bin/sh\n")
    assert packages.is_static(packages.busybox().read_bytes())


def test_the_demo_image_has_its_applets() -> None:
    import recipes

    files = {file.name: file for file in recipes.demo_files()}
    assert {files[f"bin/{name}"].link for name in ("sh", "httpd", "sha256sum", "vi")} == {"busybox"}
    assert b"demo:x:1000:" in files["etc/passwd"].content
    assert len(archive.layer(files.values())) > 1_000_000


def test_a_path_with_a_colon(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="colon"):
        load.contents(image(tmp_path / "a:b.tar"))
