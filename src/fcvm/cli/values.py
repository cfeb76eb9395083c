"""Values on the command line: KEY=VALUE lists, env files, sizes, command strings."""

import os
import re
from collections.abc import Iterable, Mapping

from fcvm import config
from fcvm.errors import NotFoundError, UsageError

_KEY = r"[^\s=,]+"  # for Podman a space or a comma may be in it too, but they are mistakes: `export A=1` in a file, `--env A,B`
# In a list a new item begins where a comma is followed by a usual name and "="; not inside double quotes that are the value.
_NEXT = ",(?=[A-Za-z_][A-Za-z0-9_.-]*=)"
_ITEM = re.compile(rf'(?:\A|{_NEXT})({_KEY}="[^"]*"(?={_NEXT}|\Z)|.*?(?={_NEXT}|\Z))', re.DOTALL)


def pairs(texts: Iterable[str], option: str, *, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """``K=V`` and ``K=V,K2=V2`` to a dict; later ones win.

    A comma separates only when ``NAME=`` follows it, so ``C=x,y`` keeps its comma; a value that holds ``,NAME=``
    itself is given in an env file, or quoted: ``C="a,B=c"``. These quotes are removed, all others are the value's own.

    Arguments:
        environ: with it, a bare ``NAME`` takes its value from there (and is left out when it is not set).

    Raises:
        UsageError: an item has no key, or no ``=`` and no ``environ`` to look into.
    """
    result: dict[str, str] = {}
    for text in texts:
        for item in _ITEM.findall(text):
            key, equals, value = item.partition("=")
            if not re.fullmatch(_KEY, key):
                raise UsageError(f"{option} {text!r}: {item!r} is not KEY=VALUE.", hint=f"{option} KEY=VALUE")
            if equals:
                quoted = re.fullmatch('"([^"]*)"', value)
                result[key] = quoted[1] if quoted and re.search(_NEXT, value) else value
            elif environ is None:
                raise UsageError(f"{option} {text!r}: {item!r} has no value.", hint=f"{option} {key}=VALUE")
            elif key in environ:
                result[key] = environ[key]
    return result


def labels(texts: Iterable[str], option: str) -> dict[str, str]:
    """Labels as Podman takes them, one a text: ``KEY=VALUE`` with any key, or ``KEY`` alone, whose value is empty.

    Raises:
        UsageError: one has no key.
    """
    result = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key:
            raise UsageError(f"{option} {text!r} has no key.", hint=f"{option} KEY=VALUE")
        result[key] = value
    return result


def env_file(path: str) -> dict[str, str]:
    """Variables of a file as Podman reads it: ``K=V`` lines, ``K`` alone from our environment, ``#`` comments.

    Raises:
        NotFoundError: it cannot be read. UsageError: it is not UTF-8, or a line is wrong; the message names it.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().decode().split("\n")  # splitlines would take a form feed or U+2028 in a value for a line's end
    except OSError as error:
        raise NotFoundError(
            f"The environment file {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The environment file {path} is not UTF-8: {error.reason} at byte {error.start}.",
                         hint=f"iconv -f latin1 -t utf-8 {path}") from error  # fmt: skip
    result = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.removesuffix("\r").lstrip().partition("=")
        if not re.fullmatch(_KEY, key.strip()):
            raise UsageError(f"Line {number} of {path} is not KEY=VALUE: {line.strip()!r}.", hint=f"sed -n {number}p {path}")
        if equals:
            result[key.strip()] = value
        elif key.strip() in os.environ:
            result[key.strip()] = os.environ[key.strip()]
    return result


def size(text: str, option: str) -> int:
    """MiB from ``512``, ``512m`` or ``2g``; raises UsageError."""
    try:
        return config.size(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.", hint=f"{option} 2g") from error


def number(text: str, option: str, *, least: int = 0) -> int:
    """A whole number of at least ``least``; raises UsageError."""
    try:
        return config.count(least)(text)
    except ValueError as error:
        raise UsageError(
            f"{option} takes a whole number from {least} on, not {text!r}.", hint=f"{option} {max(least, 1)}"
        ) from error


def moment(text: str, option: str) -> int:
    """Nanoseconds since the epoch from how long ago (``90s``, ``1h30m``) or a date and time, local if it names no zone.

    Raises:
        UsageError: it is neither.
    """
    import datetime
    import time

    ago = re.fullmatch(r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?", text)
    if ago is not None and text:
        days, hours, minutes, seconds = (int(part or 0) for part in ago.groups())
        return time.time_ns() - (((days * 24 + hours) * 60 + minutes) * 60 + seconds) * 10**9
    try:
        return int(datetime.datetime.fromisoformat(text).timestamp() * 10**6) * 1000
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"{option} {text!r} is no time.", hint=f"{option} 10m, or {option} 2026-01-31T12:00:00") from error


def words(text: str, option: str) -> list[str]:
    """A command line in one string, split as a shell splits words; raises UsageError on an open quote."""
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} cannot be split into words: {str(error).lower()}.", hint=f"{option} \"echo 'two words'\""
        ) from error
