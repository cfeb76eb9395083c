"""Makes the image disk: one container image as a read-only store that Podman uses in place.

The disk is an EROFS file system laid out as containers/storage lays out the overlay driver's directory, so the guest only
mounts it and names it in ``additionalimagestores`` of storage.conf: nothing is pulled, loaded or unpacked there.

    overlay/<layer>/diff, link, lower, empty     the layer's files; its short name; those of the layers under it
    overlay/l/<short name>                       -> ../<layer>/diff
    overlay-layers/layers.json, layers.lock      what the layers are
    overlay-layers/<layer>.tar-split.gz          how each layer's tar was put together (tar_split.py)
    overlay-images/images.json, images.lock      what the images are
    overlay-images/<image>/                      manifest and configuration, byte for byte

The store holds the image under no name: it is run by its id (the digest of its configuration). So the disk depends on
nothing but the image, the same image gives the same bytes, and its key can be told from the manifest alone.
"""

import base64
import hashlib
import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fc_agent.structs import Struct
from fcvm.errors import ImageError
from fcvm.images import compression, layer, store
from fcvm.images.erofs import Directory, Node, Symlink, Writer

DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"


class Blob(Struct):
    """A layer as the manifest names it: the digest and size of its (mostly compressed) tar."""

    digest: str
    size: int


class Manifest(Struct):
    """An image's manifest: ``raw`` bytes, ``digest`` of them, ``id`` (hex digest of the configuration) and layers."""

    raw: bytes
    digest: str
    id: str
    layers: tuple[Blob, ...]

    @property
    def key(self) -> str:
        """What the image's disk is called."""
        return store.key(self.digest)

    @property
    def size(self) -> int:
        """Bytes of all layers as they are fetched."""
        return sum(blob.size for blob in self.layers)


def parse_manifest(raw: bytes) -> Manifest:
    """Read an image manifest (OCI, or Docker's schema 2).

    Raises:
        ImageError: it is of another kind or makes no sense.
    """
    try:
        document = json.loads(raw)
        kind = document["config"].get("mediaType", OCI_CONFIG)
        if kind not in (DOCKER_CONFIG, OCI_CONFIG):
            raise ImageError(f"This is not a container image but an artifact of type {kind}.")
        layers = tuple(Blob(_digest(entry["digest"]), int(entry["size"])) for entry in document["layers"])
        id = _digest(document["config"]["digest"]).removeprefix("sha256:")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(
            "The manifest of the image cannot be read: it is damaged, or of a kind that is no longer used.",
            hint="skopeo copy --format=oci IMAGE oci:DIRECTORY converts old ones",
        ) from error
    return Manifest(raw, "sha256:" + hashlib.sha256(raw).hexdigest(), id, layers)


def parse_config(raw: bytes, manifest: Manifest) -> dict[str, Any]:
    """Read and check the image's configuration against its manifest.

    Raises:
        ImageError: it is damaged or does not belong to the manifest.
    """
    try:
        config = json.loads(raw)
        matches = len([_digest(diff_id) for diff_id in config["rootfs"]["diff_ids"]]) == len(manifest.layers)
        dict(config.get("config") or {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError("The configuration of the image is damaged.") from error
    if hashlib.sha256(raw).hexdigest() != manifest.id or not matches:
        raise ImageError("The image is damaged: its configuration does not belong to its manifest.")
    return dict(config)


def write(fd: int, source: Path, manifest: Manifest, config: bytes, progress: Callable[[int], object]) -> int:
    """Write the image disk to ``fd`` and return its size in bytes.

    Arguments:
        source: a directory with the layers, each called by the hex digits of its digest (skopeo's ``dir:``).
        progress: called with the number of bytes of layers read since the last call.

    Raises:
        ImageError: a layer is damaged.
        OSError: the disk could not be written.
    """
    settings = parse_config(config, manifest)
    time = _time(settings.get("created"))
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ")
    writer = Writer(fd)
    overlay, links = _directory(0o700), _directory(0o755)
    overlay.entries[b"l"] = links
    chain: list[str] = []  # layer ids, the lowest first
    trees: list[Directory] = []  # the nearest first
    layers = []
    tar_splits: dict[bytes, Node] = {}
    for number, (blob, diff_id) in enumerate(zip(manifest.layers, settings["rootfs"]["diff_ids"], strict=True)):
        path = source / blob.digest.removeprefix("sha256:")
        with compression.open_layer(path, progress) as stream:
            tree, record = layer.read(stream, writer, trees)
            diff_size = stream.finish(expected=diff_id)
        id = layer_id(chain[-1] if chain else None, diff_id)
        short = f"{number:X}"
        # Each layer knows those under it by their short names; podman joins them to one mount option of 4 KiB at most.
        lower = ":".join(f"l/{n:X}" for n in range(number - 1, -1, -1)).encode()
        overlay.entries[id.encode()] = _directory(0o700, {
            b"diff": tree,
            b"link": _file(writer, short.encode()),
            **({b"lower": _file(writer, lower)} if lower else {b"empty": _directory(0o700)}),
        })  # fmt: skip
        links.entries[short.encode()] = _symlink(writer, f"../{id}/diff".encode())
        tar_splits[f"{id}.tar-split.gz".encode()] = _file(writer, record)
        description = {"id": id, "parent": chain[-1] if chain else "", "created": created, "compressed-diff-digest": blob.digest,
                  "compressed-size": blob.size, "diff-digest": diff_id, "diff-size": diff_size,
                  "compression": stream.kind}  # fmt: skip
        layers.append({name: value for name, value in description.items() if value not in ("", 0)})
        chain.append(id)
        trees.insert(0, tree)
    lock = manifest.digest.removeprefix("sha256:").encode()  # what the store takes as "written by": any 64 bytes
    root = _directory(0o755, {
        b"overlay": overlay,
        b"overlay-layers": _directory(0o700, {
            b"layers.json": _file(writer, _json(layers)),
            b"layers.lock": _file(writer, lock, 0o644),
            **tar_splits,
        }),
        b"overlay-images": _images(writer, manifest, config, chain[-1] if chain else "", created, lock),
    })  # fmt: skip
    return writer.finish(root, uuid=bytes.fromhex(manifest.key), time=int(time.timestamp()))


def layer_id(parent: str | None, diff_id: str) -> str:
    """The id that containers/image gives a layer: the digest of its content, chained to those under it."""
    hexadecimal = diff_id.removeprefix("sha256:")
    return hashlib.sha256(f"{parent}+{hexadecimal}".encode()).hexdigest() if parent else hexadecimal


def _images(writer: Writer, manifest: Manifest, config: bytes, top: str, created: str, lock: bytes) -> Directory:
    """overlay-images/: one image, with the data that containers/image keeps beside it."""
    data = {"sha256:" + manifest.id: config, "manifest-" + manifest.digest: manifest.raw, "manifest": manifest.raw}
    record = {
        "id": manifest.id,
        "digest": manifest.digest,
        "layer": top,
        "metadata": "{}",
        "big-data-names": list(data),
        "big-data-sizes": {name: len(content) for name, content in data.items()},
        "big-data-digests": {n: "sha256:" + hashlib.sha256(content).hexdigest() for n, content in data.items()},
        "created": created,
    }
    files: dict[bytes, Node] = {_big_data_name(n): _file(writer, content) for n, content in data.items()}
    return _directory(0o700, {
        b"images.json": _file(writer, _json([{n: v for n, v in record.items() if v != ""}])),
        b"images.lock": _file(writer, lock, 0o644),
        manifest.id.encode(): _directory(0o700, files),
    })  # fmt: skip


def _big_data_name(name: str) -> bytes:
    """The file name of a piece of data: names that are not plain are encoded."""
    return b"manifest" if name == "manifest" else b"=" + base64.b64encode(name.encode())


def _digest(text: str) -> str:
    """``text`` if it is a sha256 digest; it becomes part of file names, so nothing else may pass."""
    algorithm, _, hexadecimal = text.partition(":")
    if algorithm != "sha256" or len(hexadecimal) != 64 or set(hexadecimal) - set("0123456789abcdef"):
        raise ValueError(f"{text!r} is not a sha256 digest")
    return text


def _time(created: object) -> datetime:
    """When the image says that it was made; the epoch if it does not, or makes no sense."""
    epoch = datetime.fromtimestamp(0, UTC)
    try:
        return max(epoch, datetime.fromisoformat(str(created)).astimezone(UTC))
    except (ValueError, OverflowError):
        return epoch


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _directory(mode: int, entries: dict[bytes, Node] | None = None) -> Directory:
    return Directory(stat.S_IFDIR | mode, entries=entries if entries is not None else {})


def _file(writer: Writer, content: bytes, mode: int = 0o600) -> Node:
    node = Node(stat.S_IFREG | mode)
    writer.add_bytes(node, content)
    return node


def _symlink(writer: Writer, target: bytes) -> Symlink:
    node = Symlink(stat.S_IFLNK | 0o777, target=target)
    writer.add_bytes(node, target)
    return node
