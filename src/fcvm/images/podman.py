"""Looks into the user's own Podman storage: which image does a name stand for there?

Only the index is read (containers/storage keeps it as JSON), which takes a millisecond and changes nothing; the image
itself is then copied by skopeo.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

CONFIGURATION = (Path("/etc/containers/storage.conf"), Path("/usr/share/containers/storage.conf"))


def find(name: str, env: Mapping[str, str] = os.environ) -> str | None:
    """The id (hex digits) of the image called ``name`` (in full, with its tag) in the storage of this user, or None."""
    for index in graph_root(env).glob("*-images/images.json"):
        try:
            entries = json.loads(index.read_bytes())
            for entry in entries:
                if name in (entry.get("names") or ()):
                    return str(entry["id"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def graph_root(env: Mapping[str, str] = os.environ) -> Path:
    """Where this user's images are, by storage.conf or by Podman's defaults; it need not exist."""
    import tomllib

    rootless = os.geteuid() != 0
    home = Path(env.get("HOME", "/"))
    files = [Path(env["CONTAINERS_STORAGE_CONF"])] if env.get("CONTAINERS_STORAGE_CONF") else []
    if rootless:
        files.append(Path(env.get("XDG_CONFIG_HOME") or home / ".config") / "containers/storage.conf")
    for path in (*files, *CONFIGURATION):
        try:
            storage = tomllib.loads(path.read_text())["storage"]
            # The system's graphroot is root's; a user's own file may set it for that user.
            key = "rootless_storage_path" if rootless and path in CONFIGURATION else "graphroot"
            return Path(str(storage[key]).replace("$HOME", str(home)).replace("$UID", str(os.getuid())))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if rootless:
        return Path(env.get("XDG_DATA_HOME") or home / ".local/share") / "containers/storage"
    return Path("/var/lib/containers/storage")
