"""Fetches an image from a registry: which one is it, and is it here already?"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fcvm.errors import ImageError
from fcvm.images import disk, make, skopeo, store
from fcvm.images.reference import Reference
from fcvm.images.skopeo import Unavailable as Unavailable  # what callers catch
from fcvm.images.store import Image
from fcvm.storage.layout import Layout

if TYPE_CHECKING:
    from fcvm.setup.progress import Progress


def first(candidates: Sequence[Reference], layout: Layout, progress: "Progress | None") -> Image:
    """The image of the first of ``candidates`` that can be had.

    Raises:
        Unavailable: none can; it says what is the matter with the first.
        ImageError: one is there but cannot be used.
    """
    failures = []
    for candidate in candidates:
        try:
            return image(candidate, layout, progress)
        except Unavailable as error:
            failures.append(error)
    raise failures[0]


def image(wanted: Reference, layout: Layout, progress: "Progress | None") -> Image:
    """Ask the registry what ``wanted`` is now, and fetch that unless it is here.

    It is fetched by its digest, so a tag that moves meanwhile does not matter.
    """
    manifest = skopeo.inspect(wanted)
    chosen = choose(manifest, str(wanted))
    digest = chosen or "sha256:" + hashlib.sha256(manifest).hexdigest()
    key = store.key(digest)
    if store.set_name(layout, str(wanted), key) and (here := store.get(layout, key, str(wanted))):
        return here
    exact = wanted.with_digest(digest)
    size = disk.parse_manifest(skopeo.inspect(exact) if chosen else manifest).size
    return make.image(exact, layout, progress, name=str(wanted), size=size)


def choose(raw: bytes, name: str) -> str | None:
    """The digest of this host's image in a list of manifests; None if ``raw`` is no list.

    Raises:
        ImageError: the list has none for this host.
    """
    try:
        document: dict[str, Any] = json.loads(raw)
        if "manifests" not in document:
            return None
        ours = skopeo.architecture()
        entries = [(dict(entry.get("platform") or {}), str(entry["digest"])) for entry in document["manifests"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(
            f"The registry delivers no manifest for {name}.", hint="FCVM_LOG=debug shows the command"
        ) from error
    fitting = [
        (p.get("variant", ""), digest)
        for p, digest in entries
        if p.get("os") == "linux" and p.get("architecture") == ours
    ]
    if not fitting:  # attestations have the platform unknown/unknown
        have = sorted(
            {
                f"{p.get('os')}/{p.get('architecture')}"
                for p, _ in entries
                if p.get("architecture") not in (None, "unknown")
            }
        )
        raise skopeo.wrong_architecture(name, ", ".join(have) or "no known platform", ours)
    # Higher variants (amd64 v2, v3) may use instructions that this host lacks; v8 is all of arm64.
    return min(fitting, key=lambda entry: entry[0] not in ("", "v1", "v8"))[1]
