"""The images on disk: ``images/<key>.img`` with ``<key>.json`` beside it, and ``names.json`` that says what is called what.

``<key>`` comes from the image's manifest (disk.py), so an image is there once whatever its names are. The disk and its
metadata are renamed in, metadata first: where there is a disk, there is all of it. ``names.json`` is replaced
atomically under a lock; a name is one word of the user's (``docker.io/library/nginx:latest``, ``localhost/x:latest``,
``docker-archive:/path``) and holds the key and, for what may change without us, a stamp of the source.

An image is in use while a VM or a snapshot has it as a disk. That is seen on the file itself or in their directories:
a hard link to the disk, or a symbolic link to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from fc_agent.structs import Struct, asdict, field
from fcvm.errors import ConflictError, ImageError, NotFoundError, UsageError
from fcvm.images import reference as references
from fcvm.images import registries
from fcvm.storage import records
from fcvm.storage.layout import Layout, linked, locked, remove

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VERSION = 1  # of names.json and <key>.json
# Count up whenever disk.py makes other bytes of the same image: a snapshot of a running VM relies on them.
DISK_FORMAT = 1


class Image(Struct):
    """An image that is here.

    Attributes:
        key: what its disk is called.
        reference: the name it was asked for by, in full; empty when it has none.
        digest: of its manifest, ``sha256:...``.
        id: the digest of its configuration, ``sha256:...``: what Podman runs.
        path: its disk.
        config: how its containers run, as in the image: Env, Entrypoint, Cmd, Healthcheck, StopSignal, User, WorkingDir,
            ExposedPorts, Labels, Volumes; only what the image sets.
        size_bytes: of the disk.
        created: when the image says it was made (RFC 3339), or empty.
    """

    key: str
    reference: str
    digest: str
    id: str
    path: Path
    config: dict[str, Any]
    architecture: str
    size_bytes: int
    created: str


class Name(Struct):
    """What a name stands for: the image's ``key``, and a ``stamp`` that changes when its local source does."""

    key: str
    stamp: str = ""


class Metadata(Struct):
    """The content of ``<key>.json``."""

    digest: str
    id: str
    architecture: str
    size_bytes: int
    created: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION


def key(digest: str) -> str:
    """What the disk of the image with this manifest is called; another manifest, or another format of ours, has another."""
    return hashlib.sha256(f"fcvm image disk {DISK_FORMAT} {digest}".encode()).hexdigest()[:32]


def disk_path(layout: Layout, key: str) -> Path:
    """Where the disk of the image ``key`` is, if it is here."""
    return layout.images / f"{key}.img"


def read_metadata(disk: Path) -> Metadata | None:
    """What ``<key>.json`` beside the disk says; None if one of them is missing or of another version."""
    try:
        metadata = records.read(Metadata, disk.with_suffix(".json"))
    except (OSError, ValueError):
        return None
    return metadata if metadata.version == VERSION and disk.exists() else None


def get(layout: Layout, key: str, reference: str = "") -> Image | None:
    """The image with this key, or None."""
    path = disk_path(layout, key)
    metadata = read_metadata(path)
    if metadata is None:
        return None
    return Image(key, reference, metadata.digest, metadata.id, path, metadata.config, metadata.architecture,
                 metadata.size_bytes, metadata.created)  # fmt: skip


def put(layout: Layout, key: str, disk: Path, metadata: Metadata, *, name: str = "", stamp: str = "") -> None:
    """Move a finished ``disk`` (on the same file system) to its place, and let ``name`` stand for it."""
    with locked(_lock(layout)):
        write_atomically(layout.images / f"{key}.json", json.dumps(asdict(metadata), indent=1) + "\n")
        os.replace(disk, disk_path(layout, key))
        if name:
            _write_names(layout, names(layout) | {name: Name(key, stamp)})


def names(layout: Layout) -> dict[str, Name]:
    """Every name."""
    try:
        values = records.load(layout.images / "names.json")
        return {name: Name(entry["key"], entry.get("stamp", "")) for name, entry in values["names"].items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageError(
            f"The list of image names {layout.images / 'names.json'} is damaged.",
            hint=f"rm {layout.images / 'names.json'}; the images' disks stay, only their names are lost",
        ) from error


def set_name(layout: Layout, name: str, key: str, *, stamp: str = "") -> bool:
    """Let ``name`` stand for the image ``key`` from now on; False if that image is not here."""
    with locked(_lock(layout)):
        if get(layout, key) is None:
            return False
        current = names(layout)
        if current.get(name) != Name(key, stamp):
            _write_names(layout, current | {name: Name(key, stamp)})
        return True


def images(layout: Layout) -> Iterator[tuple[Image, list[str]]]:
    """Every image with its names, sorted by name; those without a name come last."""
    by_key: dict[str, list[str]] = {}
    for name, target in sorted(names(layout).items()):
        by_key.setdefault(target.key, []).append(name)
    nameless = sorted({path.stem for path in layout.images.glob("*.img")} - set(by_key))
    for key in [*by_key, *nameless]:
        image = get(layout, key, by_key.get(key, [""])[0])
        if image is not None:
            yield image, by_key.get(key, [])


def find(layout: Layout, text: str) -> tuple[Image, list[str]]:
    """The image that ``text`` names (short names as Podman looks for them), or whose id, digest or start of it it is.

    Raises:
        NotFoundError: there is none.
        UsageError: it is the start of several.
    """
    known = names(layout)
    for name in _local_names(text):
        if name in known and (image := get(layout, known[name].key, name)):
            return image, sorted(n for n, target in known.items() if target.key == image.key)
    found = by_id(layout, text)
    if found is None:
        raise NotFoundError(f"There is no image {text}.", hint="fcvm images ls")
    return found


def by_id(layout: Layout, text: str) -> tuple[Image, list[str]] | None:
    """The image whose id or digest is ``text`` or starts with it (at least 4 hex digits), or None."""
    if not references.is_id(text):
        return None
    start = "sha256:" + text.removeprefix("sha256:")
    found = [
        (image, called)
        for image, called in images(layout)
        if image.id.startswith(start) or image.digest.startswith(start)
    ]
    if len({image.id for image, _ in found}) > 1:
        raise UsageError(
            f"{text} is the start of more than one image id.", hint="fcvm images ls --json shows whole ids"
        )
    return found[0] if found else None


def in_use(layout: Layout) -> set[str]:
    """The keys of the images that a VM or a snapshot has as a disk."""
    used = {path.stem for path in layout.images.glob("*.img") if path.stat().st_nlink > 1}
    return used | {Path(target).stem for directory in (layout.vms, layout.snapshots) for target in linked(directory)}


def untag(layout: Layout, text: str, *, used: Collection[str] = ()) -> tuple[str, bool]:
    """Remove a name, and its image with its last name; or an image by its id.

    Arguments:
        used: keys of images that must stay, besides ``in_use``.

    Returns:
        What was removed (a name or an id), and whether the image itself is gone.

    Raises:
        NotFoundError: there is no such name or image.
        ConflictError: the image is used by a VM or a snapshot, or was named by its id and has several names.
    """
    with locked(_lock(layout)):
        image, called = find(layout, text)
        current = names(layout)
        by_name = image.reference in _local_names(text)
        if not by_name and len(called) > 1:
            raise ConflictError(
                f"The image {image.id[7:19]} has several names: {', '.join(called)}.",
                hint="fcvm images rm " + " ".join(called),
            )
        removed = image.reference if by_name else called[0] if called else image.id
        last = len(called) <= 1
        if last and image.key in in_use(layout) | set(used):
            raise ConflictError(f"The image {removed} is used by a VM or a snapshot.", hint="fcvm ls; fcvm snapshot ls")
        if last:  # before the names: on a full disk that makes the space for them
            _delete(layout, image.key)
        _write_names(layout, {name: target for name, target in current.items() if name != removed})
        return removed, last


def prune(layout: Layout, *, everything: bool = False, used: Collection[str] = ()) -> list[Image]:
    """Remove the images that have no name (``everything``: whatever their names) and are not in use; returns them."""
    with locked(_lock(layout)):
        current = names(layout)
        keep = in_use(layout) | set(used)
        gone = [image for image, called in images(layout) if image.key not in keep and (everything or not called)]
        keys = {image.key for image in gone}
        for key in keys:  # before the names: on a full disk that makes the space for them
            _delete(layout, key)
        # A name whose disk is gone, however that came about, is of no use either.
        kept = {name: target for name, target in current.items() if disk_path(layout, target.key).exists()}
        if kept != current:
            _write_names(layout, kept)
        for path in layout.images.glob("*.json"):
            if path.name != "names.json" and not path.with_suffix(".img").exists():
                remove(path)
        return gone


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file; a reader sees the old or the new content, after a power cut as well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def _local_names(text: str) -> list[str]:
    try:
        return [str(candidate) for candidate in registries.load().local(references.parse(text))]
    except UsageError:
        return []


def _lock(layout: Layout) -> Path:
    return layout.images / ".lock"


def _delete(layout: Layout, key: str) -> None:
    remove(disk_path(layout, key))
    remove(layout.images / f"{key}.json")


def _write_names(layout: Layout, current: dict[str, Name]) -> None:
    values = {name: {"key": t.key, **({"stamp": t.stamp} if t.stamp else {})} for name, t in sorted(current.items())}
    write_atomically(layout.images / "names.json", json.dumps({"version": VERSION, "names": values}, indent=1) + "\n")
