"""Fetches an image and makes it into a disk in the store.

skopeo fetches it into a scratch directory (skopeo.py), it becomes a disk there (disk.py), and is renamed into the store
together with its name (store.py). A lock for each source keeps two of us from fetching the same image twice; a kill
leaves a scratch directory, which the next of us removes.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fcvm.errors import ImageError
from fcvm.images import disk, oci_archive, skopeo, store, work
from fcvm.images.reference import Reference
from fcvm.images.store import Image
from fcvm.storage.layout import Layout, locked

if TYPE_CHECKING:
    from fcvm.setup.progress import Progress, Step


def image(
    source: Reference,
    layout: Layout,
    progress: "Progress | None",
    *,
    name: str,
    stamp: str = "",
    size: int | None = None,
) -> Image:
    """Fetch ``source``, convert it, and put it into the store as ``name``.

    Arguments:
        stamp: how the source is now, if it can change without us.
        size: bytes that will be fetched, if that is known.
    """
    # One of 256 locks: sources seldom share one, and then they wait for each other.
    lock = layout.cache / "locks" / hashlib.sha256(os.fsencode(str(source))).hexdigest()[:2]
    with _errors(name, layout), locked(lock), work.directory(layout) as scratch:
        entry = store.names(layout).get(name)  # somebody may have made it while we waited
        same = entry and (entry.stamp == stamp if stamp else entry.key == store.key(source.digest))
        if entry and same and (here := store.get(layout, entry.key, name)):
            return here
        with _shown(progress) as shown:
            fetched = scratch / "image"
            with shown.step(f"Fetching {name}") as step:
                skopeo.copy(
                    _readable(source, scratch), fetched, lambda done: step.update(done, size), step.note, name=source
                )
            manifest = disk.parse_manifest((fetched / "manifest.json").read_bytes())
            if not store.set_name(layout, name, manifest.key, stamp=stamp):
                with shown.step(f"Converting {name}") as step:
                    target, metadata = _convert(fetched, manifest, scratch / "disk.img", name, step)
                store.put(layout, manifest.key, target, metadata, name=name, stamp=stamp)
        return cast(Image, store.get(layout, manifest.key, name))


def _readable(source: Reference, scratch: Path) -> Reference:
    return oci_archive.unpack(source, scratch / "layout") if source.transport == "oci-archive" else source


def _convert(
    fetched: Path, manifest: disk.Manifest, target: Path, name: str, step: "Step"
) -> tuple[Path, store.Metadata]:
    raw = (fetched / manifest.id).read_bytes()
    settings = disk.parse_config(raw, manifest)
    theirs, ours = settings.get("architecture") or skopeo.architecture(), skopeo.architecture()
    system = settings.get("os") or "linux"
    if (system, theirs) != ("linux", ours):
        raise skopeo.wrong_architecture(name, f"{system}/{theirs}", ours)
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        step.update(done, manifest.size)

    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        size = disk.write(fd, fetched, manifest, raw, count)
        os.fsync(fd)  # or a power cut could leave the name with another content
    finally:
        os.close(fd)
    config = {key: value for key, value in (settings.get("config") or {}).items() if value}
    return target, store.Metadata(
        manifest.digest, f"sha256:{manifest.id}", theirs, size, str(settings.get("created") or ""), config
    )


@contextmanager
def _shown(progress: "Progress | None") -> Iterator["Progress"]:
    if progress is not None:
        yield progress
        return
    from fcvm.setup import progress as default

    with default.open() as shown:
        yield shown


@contextmanager
def _errors(name: str, layout: Layout) -> Iterator[None]:
    """What the file system says while an image is made, as an ImageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ImageError(f"There is no space left in {layout.base} for the image {name}.",
                             hint=f"fcvm images prune; df -h {layout.base}") from error  # fmt: skip
        where = f" ({error.filename})" if error.filename else ""
        raise ImageError(f"The image {name} cannot be stored: {error.strerror or error}{where}.",
                         hint=f"ls -ld {layout.images}") from error  # fmt: skip
