"""The record of a layer's tar: the tar can be put together again from it and the files, as tar-split does."""

import base64
import gzip
import io
import json
import os
import tarfile
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from images_support import archive, lower, upper

from fcvm.images import layer
from fcvm.images.crc64 import ROW, crc64
from fcvm.images.erofs import Writer


def by_bytes(data: bytes) -> int:
    """The textbook algorithm."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0xD800000000000000 if crc & 1 else crc >> 1
    return crc ^ ((1 << 64) - 1)


def test_the_published_check_value() -> None:
    assert crc64(b"123456789") == 0xB90956C775A41001


@given(st.binary(max_size=700), st.integers(0, 700))
def test_crc64_of_anything_and_in_parts(data: bytes, cut: int) -> None:
    assert crc64(data) == by_bytes(data)
    assert crc64(data[cut:], crc64(data[:cut])) == by_bytes(data)


@pytest.mark.parametrize("size", [ROW - 1, ROW, ROW + 1, 2 * ROW - 1, 2 * ROW, 2 * ROW + 1, 3 * ROW, 3 * ROW + 8])
def test_crc64_around_its_rows(size: int) -> None:
    data = os.urandom(size)
    assert crc64(data) == by_bytes(data)
    assert crc64(data[ROW // 2 :], crc64(data[: ROW // 2])) == by_bytes(data)


def reassembled(tar: bytes, record: bytes) -> bytes:
    """The tar, from the record and the files in it; every file's checksum must be right."""
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as source:
        files = {m.name: source.extractfile(m).read() for m in source if m.isreg()}  # type: ignore[union-attr]
    parts = []
    for position, line in enumerate(gzip.decompress(record).splitlines()):
        entry = json.loads(line)
        assert entry["position"] == position
        if entry["type"] == 2:
            parts.append(base64.b64decode(entry["payload"]))
        else:
            raw = base64.b64decode(entry["name_raw"]).decode("utf-8", "surrogateescape") if "name_raw" in entry else entry["name"]
            content = files[raw]
            assert len(content) == entry["size"]
            assert base64.b64decode(entry["payload"]) == crc64(content).to_bytes(8, "big")
            parts.append(content)
    return b"".join(parts)


def record_of(tar: bytes) -> bytes:
    with tempfile.TemporaryFile() as file:
        return layer.read(io.BytesIO(tar), Writer(file.fileno()), [])[1]  # type: ignore[arg-type]


ODD = [
    archive.File("n" * 255, b"long name"),
    archive.File(b"\xff\xfe".decode("utf-8", "surrogateescape"), b"odd name"),
    archive.File("some.wh.thing", b"looks like a whiteout"),
    archive.File(".wh.gone"),
    archive.File("exactly", bytes(512)),
    archive.File("large", os.urandom(300_001)),
]


@pytest.mark.parametrize("tar", [lower(), upper(), archive.layer(ODD), archive.layer([]), lower() + bytes(3 << 20)],
                         ids=["lower", "upper", "odd", "empty", "padded"])  # fmt: skip
def test_a_tar_comes_back(tar: bytes) -> None:
    record = record_of(tar)
    assert reassembled(tar, record) == tar
    assert record == record_of(tar)
    assert len(record) < 60_000


@pytest.mark.parametrize("format", ["gnu", "ustar", "v7", "posix"])
def test_tars_of_gnu_tar_come_back(tmp_path: "os.PathLike[str]", format: str) -> None:
    from fcvm import process

    directory = os.fspath(tmp_path)
    with open(f"{directory}/sparse", "wb") as file:
        file.truncate(1 << 20)
        file.seek(500_000)
        file.write(b"data")
    with open(f"{directory}/plain", "wb") as file:
        file.write(os.urandom(10_000))
    sparse = ["--sparse"] if format in ("gnu", "posix") else []
    tar = process.run(["tar", "-c", f"--format={format}", *sparse, "-C", directory, "."]).stdout
    assert reassembled(tar, record_of(tar)) == tar
