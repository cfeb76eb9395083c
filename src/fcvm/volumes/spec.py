"""``--map HOST:GUEST[:ro]``: the option, checked where the user is, before anything is started."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable

from fc_agent.structs import Struct
from fcvm.errors import NotFoundError, UsageError, VolumeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MOST = 32  # volumes of one VM; each costs its guest two connections and five threads
OPTIONS = ("ro", "rw", "z", "Z")  # Podman's labels for SELinux (z, Z) have nothing to do here
HINT = r"--map HOST:GUEST[:ro]; a comma or colon in a path is written \, or \:"


class Volume(Struct):
    """A directory or file of the host in the guest.

    Attributes:
        host: path on the user's host, absolute, without symbolic links.
        guest: path in the container, absolute.
        file: it is a file.
    """

    host: str
    guest: str
    read_only: bool = False
    file: bool = False

    def public(self) -> dict[str, Any]:
        """As `fcvm ls --json` shows it."""
        return {"host": self.host, "guest": self.guest, "read_only": self.read_only}


def parse_all(texts: Iterable[str]) -> list[Volume]:
    """The volumes of all ``--map``; each may list several, separated by commas.

    Raises:
        UsageError: one is malformed, its guest path not absolute, or two have the same one.
        NotFoundError: the host has no such path. VolumeError: it cannot be mapped, or not into another one.
    """
    volumes: dict[str, Volume] = {}
    for text in texts:
        for fields in _items(text):
            volume = _volume(text, fields)
            if volume.guest in volumes:
                raise UsageError(f"Two volumes have the guest path {volume.guest}.", hint="give each its own")
            volumes[volume.guest] = volume
    if len(volumes) > MOST:
        raise UsageError(f"A VM has at most {MOST} volumes, not {len(volumes)}.", hint="map a directory above them")
    for volume in volumes.values():
        _check_place(volume, volumes)
    return list(volumes.values())


def owner(user: str) -> tuple[int, int]:
    """The numbers in a container's user, ``USER[:GROUP]``; 0 for names."""
    uid, _, gid = user.partition(":")
    return _number(uid), _number(gid)


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and int(text) < 1 << 32 else 0


def _items(text: str) -> list[list[str]]:
    """The items of a list, each its fields. A comma that no colon follows goes on with the options: ``/a:/b:ro,z``."""
    items: list[list[str]] = []
    for fields in _split(text):
        if len(fields) == 1 and items and len(items[-1]) == 3:
            items[-1][2] += f",{fields[0]}"
        else:
            items.append(fields)
    return items


def _split(text: str) -> list[list[str]]:
    """Split at commas, then at colons, where no backslash precedes them; ``\\\\`` is one backslash."""
    items = [[""]]
    characters = iter(text)
    for character in characters:
        if character == ",":
            items.append([""])
        elif character == ":":
            items[-1].append("")
        elif character == "\\":
            escaped = next(characters, "")
            items[-1][-1] += escaped if escaped and escaped in ",:\\" else f"\\{escaped}"
        else:
            items[-1][-1] += character
    return items


def _volume(text: str, fields: list[str]) -> Volume:
    if len(fields) not in (2, 3) or not all(fields):
        raise UsageError(f"--map {text!r}: {':'.join(fields)!r} is not HOST:GUEST.", hint=HINT)
    options = fields[2].split(",") if len(fields) == 3 else []
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"--map {text!r}: there is no option {option!r}.", hint=HINT)
    if {"ro", "rw"} <= set(options):
        raise UsageError(f"--map {text!r}: ro and rw contradict each other.", hint="leave one of them out")
    guest = _guest(text, fields[1])
    host = os.path.realpath(fields[0])
    return Volume(host, guest, read_only="ro" in options, file=_is_file(host))


def _guest(text: str, path: str) -> str:
    if not path.startswith("/"):
        raise UsageError(f"--map {text!r}: the guest path {path!r} is not absolute.", hint=f"/{path}, perhaps; {HINT}")
    normal = "/" + posixpath.normpath(path).lstrip("/")
    if normal == "/":
        raise UsageError(f"--map {text!r}: the container's root cannot be replaced.", hint=HINT)
    if any(0xD800 <= ord(character) < 0xE000 for character in normal):
        raise UsageError(f"--map {text!r}: the guest path is not UTF-8.")
    return normal


def _check_place(volume: Volume, volumes: dict[str, Volume]) -> None:
    """Whether a volume that lies inside another one can be shown there; the container runtime makes what is missing, if it may."""
    above = posixpath.dirname(volume.guest)
    while above not in volumes:
        if above == "/":
            return
        above = posixpath.dirname(above)
    outer = volumes[above]
    place = os.path.join(outer.host, posixpath.relpath(volume.guest, above))
    if outer.file:
        raise VolumeError(f"{volume.guest} cannot lie in {above}, which is a file.", hint="choose another guest path")
    if os.path.islink(place):  # leads somewhere in the container
        return
    kind = "file" if volume.file else "directory"
    if outer.read_only and not os.path.exists(place):
        make = f"mkdir -p {place}" if kind == "directory" else f"touch {place}"
        raise VolumeError(
            f"{volume.guest} lies in {above}, which is read-only and has no such {kind}.",
            hint=f"{make}; or leave out the ro of {above}",
        )
    if os.path.exists(place) and os.path.isdir(place) == volume.file:
        raise VolumeError(
            f"{volume.guest} is to show a {kind}, and {place}, where it lies in {above}, is none.",
            hint="choose another guest path",
        )


def _is_file(path: str) -> bool:
    """Whether the host's ``path`` is a file rather than a directory."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise NotFoundError(
            f"The host path {path} cannot be mapped: {error.strerror}.", hint=f"mkdir -p {path}; or {HINT}"
        ) from error
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise VolumeError(f"The host path {path} is neither a directory nor a file.", hint="map its directory")
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise VolumeError(f"You may not read the host path {path}.", hint=f"ls -ld {path}")
    return stat.S_ISREG(mode)
