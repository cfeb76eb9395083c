"""Writes a container image to a file, byte for byte the same for the same input.

The file is an OCI archive (``oci-archive:``) and what ``docker save`` writes (``docker-archive:``) at once, as the two do
not get in each other's way: both are tars, with ``index.json`` and ``manifest.json`` as the way in to the same blobs.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EPOCH = "1970-01-01T00:00:00Z"
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # uname -m -> OCI


@dataclass(frozen=True, slots=True)
class File:
    """One file of a layer; ``kind`` is a type of tarfile. Everything is root's unless it says otherwise."""

    name: str
    content: bytes = b""
    mode: int = 0o644
    kind: bytes = tarfile.REGTYPE
    link: str = ""
    uid: int = 0
    gid: int = 0
    pax: dict[str, str] = field(default_factory=dict)
    device: tuple[int, int] = (0, 0)

    def member(self) -> tarfile.TarInfo:
        """Its header in a tar, without anything that depends on when or by whom it was made."""
        member = tarfile.TarInfo(self.name)
        member.type, member.mode, member.linkname = self.kind, self.mode, self.link
        member.uid, member.gid, member.size = self.uid, self.gid, len(self.content)
        member.devmajor, member.devminor = self.device
        member.pax_headers = self.pax
        return member


def directory(name: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> File:
    return File(name, mode=mode, kind=tarfile.DIRTYPE, uid=uid, gid=gid)


def symlink(name: str, target: str) -> File:
    return File(name, mode=0o777, kind=tarfile.SYMTYPE, link=target)


def layer(files: Iterable[File]) -> bytes:
    """The tar of a layer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file in files:
            tar.addfile(file.member(), io.BytesIO(file.content))
    return buffer.getvalue()


def write(path: Path, layers: list[bytes], config: dict[str, Any], *, names: list[str], architecture: str) -> None:
    """Write the image to ``path``.

    Arguments:
        layers: uncompressed tars, the lowest first.
        config: how its containers run, in Docker's words: Env, Cmd, Healthcheck, ...
        names: what ``load`` calls it, as ``localhost/demo:latest``.
        architecture: as OCI calls it: amd64, arm64.
    """
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    described = [blob(content, "layer.v1.tar") for content in layers]
    document = {
        "architecture": architecture,
        "os": "linux",
        "created": EPOCH,
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [entry["digest"] for entry in described]},
        "history": [{"created": EPOCH, "created_by": "examples/build"} for _ in layers],
    }
    settings = blob(_json(document), "config.v1+json")
    manifest = blob(_json({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                           "config": settings, "layers": described}), "manifest.v1+json")  # fmt: skip
    index = [{**manifest, "annotations": {"org.opencontainers.image.ref.name": name}} for name in names] or [manifest]
    paths = {entry["digest"]: f"blobs/sha256/{entry['digest'][7:]}" for entry in (settings, *described)}
    docker = [
        {"Config": paths[settings["digest"]], "RepoTags": names, "Layers": [paths[e["digest"]] for e in described]}
    ]
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": index}),
        "manifest.json": _json(docker),
        **blobs,
    }
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            tar.addfile(File(name, content).member(), io.BytesIO(content))


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
