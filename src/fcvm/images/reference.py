"""Image references: every way to name an image that skopeo and Podman know, parsed and checked without any I/O.

    nginx, nginx:1.25, library/nginx@sha256:...     short names, resolved as Podman does (registries.py)
    quay.io/org/name:tag, docker://...              a registry
    localhost/name                                  loaded by `fcvm images load`, or in the user's own Podman storage
    docker-archive:FILE[:NAME|:@INDEX]              what `docker save` and `podman save` write
    oci-archive:FILE[:NAME], oci:DIRECTORY[:NAME]   the OCI image layout, in a tar or a directory
    dir:DIRECTORY                                   what `skopeo copy ... dir:` writes
    docker-daemon:NAME                              an image of the local Docker daemon
    containers-storage:NAME                         an image of the user's own Podman storage

The grammar of names is that of the OCI distribution specification.
"""

import os
import re

from fc_agent.structs import Struct, replace
from fcvm.errors import UsageError

REGISTRY = "docker"  # skopeo's name of the transport
FILE_TRANSPORTS = ("docker-archive", "oci-archive", "oci", "dir")
STORAGE_TRANSPORTS = ("docker-daemon", "containers-storage")

DEFAULT_REGISTRY = "docker.io"
LOCALHOST = "localhost"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_NAME = re.compile(
    rf"(?:(?P<domain>{_DOMAIN})/)??(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[a-f0-9]{64}))?"
)
_ID = re.compile(r"(?:sha256:)?[a-f0-9]{4,64}")


class Reference(Struct):
    """A parsed reference.

    Attributes:
        transport: ``docker`` for a registry, else skopeo's transport.
        location: of a registry: ``domain/path[:tag][@digest]``, or without domain for a short name; of a file:
            its absolute path and what follows it; of a storage: what follows the transport, unchanged.
        path: for files, the absolute path alone.
    """

    transport: str
    location: str
    path: str = ""

    def __str__(self) -> str:
        return self.location if self.transport == REGISTRY else f"{self.transport}:{self.location}"

    @property
    def source(self) -> str:
        """The reference as skopeo takes it."""
        return f"docker://{self.location}" if self.transport == REGISTRY else f"{self.transport}:{self.location}"

    @property
    def is_short(self) -> bool:
        """Whether it is a name without a registry."""
        return self.transport == REGISTRY and _domain(self.location) is None

    @property
    def is_localhost(self) -> bool:
        """Whether it is a ``localhost/`` name, which no registry has."""
        return self.transport == REGISTRY and _domain(self.location) == LOCALHOST

    @property
    def domain(self) -> str:
        """The registry's host and port; empty if there is none."""
        return (self.transport == REGISTRY and _domain(self.location)) or ""

    @property
    def repository(self) -> str:
        """A name without tag and digest."""
        return re.sub(r":[\w][\w.-]*$", "", self.location.partition("@")[0])

    @property
    def digest(self) -> str:
        """The digest in the name: it then always means the same image; empty if there is none."""
        return self.location.partition("@")[2] if self.transport == REGISTRY else ""

    def at(self, domain: str) -> "Reference":
        """This short name in the registry ``domain``; the Docker Hub's own images are under ``library/``."""
        library = "library/" if domain == DEFAULT_REGISTRY and "/" not in self.repository else ""
        return replace(self, location=f"{domain}/{library}{self.location}")

    def with_digest(self, digest: str) -> "Reference":
        """Exactly this image of the repository."""
        return replace(self, location=f"{self.repository}@{digest}")


def parse(text: str, *, cwd: str | None = None) -> Reference:
    """The reference that ``text`` is.

    Arguments:
        cwd: what relative paths start from; the current directory by default.

    Raises:
        UsageError: it is none.
    """
    transport, colon, rest = text.partition(":")
    if colon and transport in FILE_TRANSPORTS:
        path, colon, suffix = rest.partition(":")
        if not path:
            raise UsageError(f"The image reference {text} names no file.", hint=f"{transport}:PATH")
        absolute = os.path.normpath(os.path.join(cwd or os.getcwd(), path))
        return Reference(transport, absolute + colon + suffix, absolute)
    if colon and transport in STORAGE_TRANSPORTS:
        if not rest:
            raise UsageError(f"The image reference {text} names no image.", hint=f"{transport}:NAME")
        return Reference(transport, rest)
    if text.startswith("docker://"):
        full = name(text.removeprefix("docker://"))
        return full.at(DEFAULT_REGISTRY) if full.is_short else full  # as skopeo: whoever names a registry's API means no short name
    return name(text)


def name(text: str) -> Reference:
    """The reference that an image's name is: with the tag ``latest`` if it has neither tag nor digest.

    Raises:
        UsageError: it is not a name.
    """
    matched = _NAME.fullmatch(text)
    if matched is None:
        raise UsageError(f"{text!r} is not an image reference.", hint=_mistake(text))
    domain, path, tag, digest = matched["domain"], matched["path"], matched["tag"], matched["digest"]
    first, slash, others = path.partition("/")
    if domain is None and slash and _looks_like_domain(first):
        domain, path = first, others
    elif domain is not None and not _looks_like_domain(domain):
        domain, path = None, f"{domain}/{path}"
    if domain in ("index.docker.io", "registry-1.docker.io"):
        domain = DEFAULT_REGISTRY
    if digest:
        tag = None  # as Podman: the digest decides
    suffix = f"@{digest}" if digest else f":{tag or 'latest'}"
    short = Reference(REGISTRY, path + suffix)
    return short.at(domain) if domain else short


def is_id(text: str) -> bool:
    """Whether ``text`` may be an image's id, or the start of one."""
    return _ID.fullmatch(text) is not None


def _domain(location: str) -> str | None:
    first, slash, _ = location.partition("/")
    return first if slash and _looks_like_domain(first) else None


def _looks_like_domain(word: str) -> bool:
    return word == LOCALHOST or "." in word or ":" in word or word != word.lower()


def _mistake(text: str) -> str:
    if not text:
        return "fcvm podman run IMAGE"
    if "@" in text and not re.search(r"@sha256:[a-f0-9]{64}$", text):
        return "a digest is written @sha256: and 64 hex digits"
    if re.match(r"[a-z-]+:/", text):
        return "files are named docker-archive:PATH, oci-archive:PATH, oci:DIRECTORY or dir:DIRECTORY"
    if text != text.lower():
        return f"names are lower case: {text.lower()}"
    return "a name is [REGISTRY/]NAME[:TAG]; files are named docker-archive:PATH, oci-archive:PATH, oci:DIRECTORY, dir:DIRECTORY"
