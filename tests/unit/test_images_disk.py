"""The image disk: what Podman reads in it, what is refused, and that it is the same every time."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from images_support import CONFIG, image, lower, read_erofs, upper

from fcvm import process
from fcvm.errors import ImageError
from fcvm.images import compression, disk, users


def unpack(archive: Path, directory: Path, compress: Callable[[bytes], bytes] = lambda data: data) -> disk.Manifest:
    """An image as skopeo leaves it in a directory, with its layers compressed."""
    directory.mkdir()
    with tarfile.open(archive) as tar:
        blobs = {os.path.basename(m.name): tar.extractfile(m).read() for m in tar if m.name.startswith("blobs/")}  # type: ignore[union-attr]
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
    manifest = json.loads(blobs[index["manifests"][0]["digest"][7:]])
    (directory / manifest["config"]["digest"][7:]).write_bytes(blobs[manifest["config"]["digest"][7:]])
    for entry in manifest["layers"]:
        blob = compress(blobs[entry["digest"][7:]])
        entry |= {"digest": "sha256:" + hashlib.sha256(blob).hexdigest(), "size": len(blob)}
        (directory / entry["digest"][7:]).write_bytes(blob)
    return disk.parse_manifest(json.dumps(manifest).encode())


def write(directory: Path, manifest: disk.Manifest) -> bytes:
    path = directory.with_suffix(".img")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    read = []
    try:
        size = disk.write(fd, directory, manifest, (directory / manifest.id).read_bytes(), read.append)
    finally:
        os.close(fd)
    data = path.read_bytes()
    assert len(data) == size
    assert sum(read) == manifest.size
    return data


def zstd(data: bytes) -> bytes:
    return process.run(["zstd", "-q"], input=data).stdout


COMPRESSIONS = {
    compression.NONE: lambda data: data,
    compression.GZIP: gzip.compress,
    compression.BZIP2: bz2.compress,
    compression.XZ: lzma.compress,
    compression.ZSTD: zstd,
}


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_layers_of_every_compression(tmp_path: Path, kind: int) -> None:
    if kind == compression.ZSTD and shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a", COMPRESSIONS[kind])
    seen = read_erofs(write(tmp_path / "a", manifest))
    records = json.loads(seen["/overlay-layers/layers.json"].content)
    assert [record.get("compression", 0) for record in records] == [kind] * 2
    assert seen[f"/overlay/{records[0]['id']}/diff/large"].content.endswith(b"end")


def test_what_podman_reads(tmp_path: Path) -> None:
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a")
    seen = read_erofs(write(tmp_path / "a", manifest))
    below, above = json.loads(seen["/overlay-layers/layers.json"].content)
    digest = hashlib.sha256(lower()).hexdigest()
    assert below["id"] == digest  # the ids that containers/image gives layers
    assert above["id"] == hashlib.sha256(f"{digest}+{hashlib.sha256(upper()).hexdigest()}".encode()).hexdigest()
    assert (above["parent"], above["diff-size"]) == (below["id"], len(upper()))
    assert seen[f"/overlay/{above['id']}/lower"].content == b"l/0"
    assert seen["/overlay/l/1"].content == f"../{above['id']}/diff".encode()
    assert stat.S_ISDIR(seen[f"/overlay/{below['id']}/empty"].mode)
    [record] = json.loads(seen["/overlay-images/images.json"].content)
    assert (record["id"], record["digest"], record["layer"]) == (manifest.id, manifest.digest, above["id"])
    assert "names" not in record
    assert seen[f"/overlay-images/{manifest.id}/manifest"].content == manifest.raw
    for lock in ("/overlay-layers/layers.lock", "/overlay-images/images.lock"):
        assert len(seen[lock].content) == 64
    diff = f"/overlay/{above['id']}/diff"
    assert (stat.S_IFMT(seen[f"{diff}/etc/gone"].mode), seen[f"{diff}/etc/gone"].device) == (stat.S_IFCHR, 0)
    assert seen[f"{diff}/replaced"].xattrs == ((b"trusted.overlay.opaque", b"y"),)
    assert stat.S_IMODE(seen[f"{diff}/etc"].mode) == 0o750
    assert CONFIG.items() <= json.loads((tmp_path / "a" / manifest.id).read_bytes())["config"].items()


def test_the_same_image_gives_the_same_disk(tmp_path: Path) -> None:
    disks = []
    for name in ("a", "b"):
        manifest = unpack(image(tmp_path / f"{name}.tar"), tmp_path / name)
        disks.append((manifest.key, write(tmp_path / name, manifest)))
    assert disks[0] == disks[1]


def test_an_image_without_layers(tmp_path: Path) -> None:
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    id = hashlib.sha256(config).hexdigest()
    manifest = disk.parse_manifest(json.dumps({"config": {"digest": f"sha256:{id}"}, "layers": []}).encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / id).write_bytes(config)
    assert json.loads(read_erofs(write(tmp_path / "a", manifest))["/overlay-layers/layers.json"].content) == []


def test_the_key_depends_on_the_manifest(tmp_path: Path) -> None:
    plain = unpack(image(tmp_path / "a.tar"), tmp_path / "a")
    packed = unpack(tmp_path / "a.tar", tmp_path / "b", gzip.compress)
    assert plain.id == packed.id
    assert plain.key != packed.key


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda data: data])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-600] + b"x" + data[-599:]])
def test_a_damaged_layer(tmp_path: Path, compress: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]) -> None:
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a", compress)
    for blob in manifest.layers[:1]:
        path = tmp_path / "a" / blob.digest[7:]
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError, match="damaged"):
        write(tmp_path / "a", manifest)


def test_xz_may_have_several_streams(tmp_path: Path) -> None:
    def pieces(data: bytes) -> bytes:  # as pxz writes it, and padded
        return lzma.compress(data[:1000]) + bytes(8) + lzma.compress(b"") + lzma.compress(data[1000:]) + bytes(4)

    write(tmp_path / "a", unpack(image(tmp_path / "a.tar"), tmp_path / "a", pieces))


def test_a_dictionary_larger_than_any_image_has(tmp_path: Path) -> None:
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a", lzma.compress)
    path = tmp_path / "a" / manifest.layers[0].digest[7:]
    packed = bytearray(path.read_bytes())
    packed[16] = 34  # the block's header, with 512 MiB in LZMA2's only property, and its checksum
    length = (packed[12] + 1) * 4
    packed[8 + length : 12 + length] = zlib.crc32(packed[12 : 8 + length]).to_bytes(4, "little")
    path.write_bytes(packed)
    assert lzma.decompress(packed) == lower()
    with pytest.raises(ImageError, match="cannot be decompressed"):
        write(tmp_path / "a", manifest)


def test_a_window_of_zstd_larger_than_any_image_has(tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    packed = process.run(["zstd", "-q", "--ultra", "-1", "--long=28", "--zstd=wlog=28", "-"], input=lower()).stdout
    assert process.run(["zstd", "-dcq", "--long=31"], input=packed).stdout == lower()
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a", lambda data: packed if data == lower() else zstd(data))
    with pytest.raises(ImageError, match="damaged"):
        write(tmp_path / "a", manifest)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"config":{"digest":"x"},"layers":[]}', b'{"config":{},"layers":[]}',
                                 b'{"config":{"digest":"sha256:../../x"},"layers":[]}'])  # fmt: skip
def test_a_manifest_that_makes_no_sense(raw: bytes) -> None:
    with pytest.raises(ImageError, match="manifest"):
        disk.parse_manifest(raw)


def test_an_artifact_is_no_image() -> None:
    document = {"config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": "sha256:" + "0" * 64}, "layers": []}
    with pytest.raises(ImageError, match="artifact"):
        disk.parse_manifest(json.dumps(document).encode())


def test_a_configuration_of_another_image(tmp_path: Path) -> None:
    manifest = unpack(image(tmp_path / "a.tar"), tmp_path / "a")
    other = (tmp_path / "a" / manifest.id).read_bytes() + b" "
    with pytest.raises(ImageError, match="does not belong"):
        disk.parse_config(other, manifest)
    with pytest.raises(ImageError, match="damaged"):
        disk.parse_config(b"{", manifest)


@pytest.mark.parametrize("change", [{"rootfs": {"diff_ids": ["md5:0"]}}, {"rootfs": {"diff_ids": [5]}}, {"config": [1]}, {"rootfs": []}])
def test_a_configuration_that_makes_no_sense(change: dict[str, object]) -> None:
    raw = json.dumps({"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}, **change}).encode()
    id = hashlib.sha256(raw).hexdigest()
    manifest = disk.Manifest(b"", "sha256:" + "1" * 64, id, (disk.Blob("sha256:" + "2" * 64, 1),))
    with pytest.raises(ImageError, match="damaged"):
        disk.parse_config(raw, manifest)


PASSWD = {
    "root:x:0:0:root:/root:/bin/sh\nnode:x:1000:1001::/home/node:/bin/sh\n": "etc/passwd",
    "node:x:7:7::/:\n": "etc/passwd-",
    "root:x:0:\nstaff:x:50:node\n": "etc/group",
}


def layer_of(files: dict[str, str]) -> bytes:
    """A layer with these files: content -> name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for content, name in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("node", "1000:1001"),
        ("1000", "1000:1001"),
        ("node:staff", "1000:50"),
        ("node:8", "1000:8"),
        ("4000", "4000:0"),
        ("4000:staff", "4000:50"),
        ("nobody-knows", "0:0"),
        ("", "0:0"),
    ],
)
def test_a_containers_user_in_numbers(tmp_path: Path, user: str, expected: str) -> None:
    """By the passwd of the uppermost layer that has one; a layer above has a large /etc."""
    many = {f"{n}": f"etc/{'long' * 20}-{n}" for n in range(200)}
    lowest = layer_of({"node:x:1:1::/:\n": "etc/passwd"})
    archive = image(tmp_path / "image.tar", layers=[lowest, layer_of(PASSWD), layer_of(many)])
    write(tmp_path / "image", unpack(archive, tmp_path / "image"))
    assert users.numbers(tmp_path / "image.img", user) == expected


def test_a_user_in_an_image_without_users(tmp_path: Path) -> None:
    write(tmp_path / "image", unpack(image(tmp_path / "image.tar"), tmp_path / "image"))
    assert users.numbers(tmp_path / "image.img", "node") == "0:0"
    (tmp_path / "empty").touch()
    assert users.numbers(tmp_path / "empty", "1000:node") == "1000:0"
