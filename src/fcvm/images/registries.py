"""Which registries a short name stands for: the same configuration files that Podman and skopeo read.

``nginx`` is looked up in the aliases (registries.conf and its drop-ins, and those that Podman has learned), then in the
``unqualified-search-registries``; where there is no such configuration it is the Docker Hub's. containers-registries.conf(5)
describes the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fc_agent.structs import Struct, replace
from fcvm.errors import UsageError
from fcvm.images.reference import DEFAULT_REGISTRY, LOCALHOST, Reference, name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SYSTEM_FILES = (Path("/etc/containers/registries.conf"), Path("/usr/share/containers/registries.conf"))
SYSTEM_DROP_INS = Path("/etc/containers/registries.conf.d")


class Registries(Struct):
    """``aliases``: short name without tag -> repository; ``search``: the registries that are asked for other short names."""

    aliases: Mapping[str, str]
    search: tuple[str, ...]

    def local(self, reference: Reference) -> list[Reference]:
        """Under which names ``reference`` may already be here, in the order in which Podman looks."""
        if not reference.is_short:
            return [reference]
        names = [
            *self._alias(reference),
            *(reference.at(domain) for domain in (LOCALHOST, *self.search, DEFAULT_REGISTRY)),
        ]
        return list(dict.fromkeys(names))

    def remote(self, reference: Reference) -> list[Reference]:
        """Where ``reference`` is fetched from: one name, or for a short name each of the registries to search."""
        if not reference.is_short:
            return [reference]
        searched = [reference.at(domain) for domain in self.search or (DEFAULT_REGISTRY,)]
        return self._alias(reference) or list(dict.fromkeys(searched))

    def _alias(self, reference: Reference) -> list[Reference]:
        target = self.aliases.get(reference.repository)
        if not target:
            return []
        suffix = reference.location.removeprefix(reference.repository)
        return [replace(reference, location=name(target).repository + suffix)]


def load(env: Mapping[str, str] = os.environ) -> Registries:
    """The configuration in force for this user.

    Raises:
        UsageError: a file is damaged.
    """
    aliases: dict[str, str] = {}
    search: tuple[str, ...] = ()
    for path in _files(env):
        values = _read(path)
        if isinstance(values.get("aliases"), dict):
            aliases |= {k: v for k, v in values["aliases"].items() if isinstance(v, str)}
        if isinstance(values.get("unqualified-search-registries"), list):
            search = tuple(str(registry) for registry in values["unqualified-search-registries"])
    return Registries(aliases, search)


def _files(env: Mapping[str, str]) -> Iterable[Path]:
    """The files that exist; a later one overrides the ones before it."""
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config") / "containers"
    cache = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME", "/")) / ".cache")
    named = [Path(env["CONTAINERS_REGISTRIES_CONF"])] if env.get("CONTAINERS_REGISTRIES_CONF") else []
    yield from [path for path in (*named, home / "registries.conf", *SYSTEM_FILES) if path.is_file()][:1]
    for directory in (SYSTEM_DROP_INS, home / "registries.conf.d"):
        yield from sorted(directory.glob("*.conf"))
    learned = (Path("/var/cache") if os.geteuid() == 0 else cache) / "containers/short-name-aliases.conf"
    if learned.is_file():
        yield learned


def _read(path: Path) -> dict[str, Any]:
    import tomllib  # takes longer than all the rest of starting from an image that is here

    try:
        return tomllib.loads(path.read_text())
    except PermissionError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"The registry configuration {path} cannot be read: {error}.") from error
