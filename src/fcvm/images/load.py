"""Loads images from files under names of the user's choice: `fcvm images load FILE [--name localhost/x]`."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fcvm.errors import ImageError, NotFoundError, UsageError
from fcvm.images import make, reference, store, tars
from fcvm.images.oci_archive import UNREADABLE
from fcvm.images.reference import FILE_TRANSPORTS, LOCALHOST, Reference
from fcvm.images.store import Image
from fcvm.storage.layout import Layout

if TYPE_CHECKING:
    from fcvm.setup.progress import Progress

MOST = 64 << 20  # bytes of a list of images

# Where the OCI layout, containers/image and Docker put an image's name among the annotations of an index.
NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


def load(source: str, layout: Layout, progress: "Progress | None" = None, *, name: str | None = None) -> list[Image]:
    """Put the image, or images, in a file or directory into the store.

    Arguments:
        source: a path (its kind is found out), or a reference with transport such as ``docker-archive:PATH:NAME``.
        name: what to call it; a name without registry is a ``localhost/`` name. Without it, every image is loaded under the
            names that the file gives it.

    Raises:
        UsageError: ``name`` is missing though the file has none, or is given though it has several images.
        NotFoundError, ImageError: the file does not exist; it holds no image, or one that cannot be used.
    """
    target = local_name(name) if name is not None else None
    if source.partition(":")[0] in FILE_TRANSPORTS:
        wanted = reference.parse(source)
        found = contents(Path(wanted.path), wanted.transport)
        if wanted.location != wanted.path:  # one of several was named
            suffix = wanted.location.removeprefix(wanted.path + ":")
            found = [(wanted, [suffix] if target is None and not suffix.startswith("@") else [])]
    else:
        found = contents(Path(os.path.abspath(source)))
    if target is not None and len(found) > 1:
        raise UsageError(f"{source} holds {len(found)} images, so --name is ambiguous.",
                         hint=f"fcvm images load {found[0][0]} --name {name}")  # fmt: skip
    images = []
    for wanted, called in found:
        targets = [target] if target is not None else [local_name(word) for word in called]
        if not targets:
            raise UsageError(
                f"{wanted} does not say what its image is called.",
                hint=f"fcvm images load {source} --name localhost/NAME",
            )
        image = make.image(wanted, layout, progress, name=targets[0])
        for more in targets[1:]:
            store.set_name(layout, more, image.key)
        images.append(image)
    return images


def local_name(text: str) -> str:
    """The full name for ``text``: what has no registry is ``localhost/``'s, and the tag is ``latest`` by default.

    Raises:
        UsageError: it is not a name, or has a digest, which cannot be chosen.
    """
    named = reference.name(text)
    if named.digest:
        raise UsageError(
            f"An image cannot be called {text}: its digest is what it is.", hint=f"--name {named.repository}"
        )
    return str(named.at(LOCALHOST) if named.is_short else named)


def contents(path: Path, transport: str | None = None) -> list[tuple[Reference, list[str]]]:
    """The images in a file or directory, each with the names that it gives them."""
    if not path.exists():
        raise NotFoundError(f"There is no file {path}.", hint=f"ls -l {path.parent}")
    if ":" in str(path):
        raise UsageError(
            f"{path} has a colon in its name, which would end it in a reference.", hint=f"mv '{path}' FILE"
        )
    try:
        found = _contents(path, transport or _kind(path))
    except (KeyError, TypeError, AttributeError) as error:  # its JSON is of another form
        raise _no_image(path) from error
    if not found:
        raise _no_image(path)
    return found


def _contents(path: Path, transport: str) -> list[tuple[Reference, list[str]]]:
    if transport == "docker-archive":
        entries = _document(path, "manifest.json")
        return [
            (_at(transport, path, f"@{i}" if len(entries) > 1 else ""), _texts(e.get("RepoTags") or []))
            for i, e in enumerate(entries)
        ]
    if transport == "dir":
        return [(_at(transport, path, ""), [])]
    found = []
    entries = _document(path, "index.json")["manifests"]
    for entry in entries:
        annotations = entry.get("annotations") or {}
        names = _texts([annotations[key] for key in NAME_ANNOTATIONS if key in annotations])
        # The reference name is often a tag alone, which is no name.
        named = [name for name in names if "/" in name or ":" in name]
        found.append((_at(transport, path, names[-1] if names and len(entries) > 1 else ""), named[:1]))
    return found


def _texts(values: object) -> list[str]:
    """``values`` if it is a list of strings; raises TypeError."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"{values!r} is no list of strings")
    return values


def _at(transport: str, path: Path, suffix: str) -> Reference:
    return Reference(transport, f"{path}:{suffix}" if suffix else str(path), str(path))


def _kind(path: Path) -> str:
    """What kind of image is at ``path``, by the files that every image of a kind has."""
    if path.is_dir():
        for marker, kind in (("oci-layout", "oci"), ("manifest.json", "dir")):
            if (path / marker).is_file():
                return kind
    else:
        members = _members(path)
        for marker, kind in (("manifest.json", "docker-archive"), ("oci-layout", "oci-archive")):
            if marker in members:
                return kind
    raise _no_image(path)


def _members(path: Path) -> set[str]:
    try:
        return {os.path.normpath(member.name) for member, _ in tars.archive(path)}
    except (*UNREADABLE, OSError) as error:
        raise _no_image(path) from error


def _document(path: Path, name: str) -> Any:
    """The JSON file ``name`` in the directory or tar ``path``."""
    try:
        if path.is_dir():
            return json.loads((path / name).read_bytes())
        for member, content in tars.archive(path):
            if os.path.normpath(member.name) == name:
                text = content.read(MOST + 1) if content else b""
                if len(text) > MOST:
                    raise ValueError(f"{name} is too long")
                return json.loads(text)
    except (*UNREADABLE, OSError) as error:
        raise _no_image(path) from error
    raise _no_image(path)


def _no_image(path: Path) -> ImageError:
    return ImageError(
        f"{path} is damaged, or not an image.",
        hint="images in files come from `docker save`, `podman save` or `skopeo copy`",
    )
