"""From an image reference to the image's disk: the one entry point of `fcvm podman run`, ``ensure``.

What is here already costs a look at ``names.json``: no other program runs, and the modules that fetch and convert are not
even imported. Else ``make`` does the work.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fcvm import log
from fcvm.errors import ImageError, UsageError
from fcvm.images import podman, reference, registries, store
from fcvm.images.reference import REGISTRY, STORAGE_TRANSPORTS, Reference
from fcvm.images.store import Image
from fcvm.storage.layout import Layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.setup.progress import Progress

PULL = ("always", "missing", "newer", "never")


def ensure(
    text: str, *, pull: str = "missing", layout: Layout, further: Layout | None = None, progress: Progress | None = None
) -> Image:
    """The image that ``text`` names, fetched and converted if it is not here.

    Arguments:
        pull: as for ``podman run --pull``. ``missing``: fetch it only if there is none of that name; ``always``: ask the
            registry, and fail if it cannot be asked; ``newer``: ask it, and use what is here if it cannot be asked;
            ``never``: use what is here. Files and local storages are read again whenever they have changed, unless
            ``never``.
        further: another data directory, only read: where ``layout`` has no image of that name, its is used.
        progress: shows what takes long; without it, on stderr.

    Raises:
        UsageError: ``text`` is no reference, or ``pull`` no policy.
        ImageError: there is no such image, it cannot be fetched, is damaged, or made for another architecture.
        HostError: skopeo is not installed.
    """
    if pull not in PULL:
        raise UsageError(f"{pull!r} is no pull policy.", hint=f"--pull takes {', '.join(PULL)}")
    wanted = reference.parse(text)
    if wanted.transport == REGISTRY:
        return _named(text, wanted, pull, layout, further, progress)
    known = store.names(layout).get(str(wanted))
    if pull == "never":
        image = store.get(layout, known.key, str(wanted)) if known else None
        if image is None:
            raise missing(text)
        return image
    if wanted.path and not os.path.exists(wanted.path):
        raise ImageError(f"There is no image at {wanted.path}.", hint=f"ls -l {os.path.dirname(wanted.path)}")
    stamp = _stamp(wanted)
    if known and stamp and known.stamp == stamp and (image := store.get(layout, known.key, str(wanted))):
        return image
    return _make(wanted, layout, progress, name=str(wanted), stamp=stamp)


def _named(
    text: str, wanted: Reference, pull: str, layout: Layout, further: Layout | None, progress: Progress | None
) -> Image:
    configured = registries.load() if wanted.is_short else registries.Registries({}, ())
    image = _local(configured.local(wanted), layout, progress)
    if image is None and (found := store.by_id(layout, text)):
        return found[0]
    if image is None and further is not None:
        image = _lent(text, configured.local(wanted), further)
    if image is not None and (
        pull in ("missing", "never") or wanted.digest or reference.name(image.reference).is_localhost
    ):
        return image
    if pull == "never" or wanted.is_localhost:
        if image is None:
            raise missing(text)
        return image
    from fcvm.images import pull as registry

    try:
        return registry.first(configured.remote(wanted), layout, progress)
    except registry.Unavailable as error:
        if pull == "newer" and image is not None:
            log.info(f"using the image that is here: {error.message}")
            return image
        raise


def _local(candidates: list[Reference], layout: Layout, progress: Progress | None) -> Image | None:
    """The first of ``candidates`` that is here: in the store, or (``localhost/``) in the user's Podman storage."""
    known = store.names(layout)
    for candidate in candidates:
        name = str(candidate)
        entry = known.get(name)
        image = store.get(layout, entry.key, name) if entry else None
        if image and entry and not entry.stamp:
            return image
        if candidate.is_localhost and (id := podman.find(name)):
            if image and entry and entry.stamp == id:
                return image
            return _make(Reference("containers-storage", name), layout, progress, name=name, stamp=id)
        if image:  # it came from Podman's storage, where it is no more
            return image
    return None


def _lent(text: str, candidates: list[Reference], further: Layout) -> Image | None:
    """The first of ``candidates`` that another data directory has; it is copied when a VM uses it (adopt.py)."""
    if not (further.base / "images").is_dir():
        log.warning(f"{further.base}, which the setting further_images names, has no images")
        return None
    known = store.names(further)
    for name in map(str, candidates):
        if name in known and (image := store.get(further, known[name].key, name)):
            return image
    found = store.by_id(further, text)
    return found[0] if found else None


def _make(source: Reference, layout: Layout, progress: Progress | None, *, name: str, stamp: str) -> Image:
    from fcvm.images import make

    return make.image(source, layout, progress, name=name, stamp=stamp)


def _stamp(wanted: Reference) -> str:
    """What changes when the image at a local source does; empty if that cannot be told cheaply."""
    if wanted.transport in ("docker-archive", "oci-archive"):
        status = os.stat(wanted.path)
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ino} {status.st_dev}"
    if wanted.transport in ("oci", "dir"):
        try:
            index = Path(wanted.path, "index.json" if wanted.transport == "oci" else "manifest.json").read_bytes()
        except OSError:
            return ""
        return hashlib.sha256(index).hexdigest()
    if wanted.transport == "containers-storage":
        from fcvm.images import skopeo

        return hashlib.sha256(skopeo.inspect(wanted)).hexdigest()
    from fcvm.images import docker

    return docker.image_id(wanted.location)


def missing(text: str) -> ImageError:
    """The error for an image that is not here and will not be fetched; the hint says how to get it."""
    hint = f"fcvm images pull {text}"
    if text.startswith(f"{reference.LOCALHOST}/"):
        hint = f"fcvm images load FILE --name {text}, or podman build -t {text} ."
    elif ":" in text and text.partition(":")[0] in (*reference.FILE_TRANSPORTS, *STORAGE_TRANSPORTS):
        hint = "leave out --pull=never"
    return ImageError(f"There is no image {text} here.", hint=hint)
