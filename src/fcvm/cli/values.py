"""Values on the command line: KEY=VALUE lists, env files, sizes, command strings."""

import os
import re
from collections.abc import Iterable, Mapping

from fcvm import config
from fcvm.errors import NotFoundError, UsageError

# In a comma-separated list a new item begins where a comma is followed by a variable name and '='.
_NEXT_ITEM = r",(?=[A-Za-z_][A-Za-z0-9_.]*=)"
_KEY = r"[A-Za-z_][A-Za-z0-9_.-]*"


def pairs(texts: Iterable[str], option: str, *, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """``K=V`` and ``K=V,K2=V2`` to a dict; later ones win.

    A comma separates only when ``NAME=`` follows it, so ``C=x,y`` keeps its comma; a value that holds ``,NAME=``
    itself is given in an env file, or quoted: ``C="a,B=c"`` (the double quotes are the value's own and are removed).

    Arguments:
        environ: with it, a bare ``NAME`` takes its value from there (and is left out when it is not set).

    Raises:
        UsageError: an item has no key, or no ``=`` and no ``environ`` to look into.
    """
    result: dict[str, str] = {}
    for text in texts:
        for item in _split(text):
            key, equals, value = item.partition("=")
            if not re.fullmatch(_KEY, key):
                raise UsageError(f"{option} {text!r}: {item!r} is not KEY=VALUE.", hint=f"{option} KEY=VALUE")
            if equals:
                quoted = len(value) >= 2 and value[0] == value[-1] == '"'
                result[key] = value[1:-1] if quoted else value
            elif environ is None:
                raise UsageError(f"{option} {text!r}: {item!r} has no value.", hint=f"{option} {key}=VALUE")
            elif key in environ:
                result[key] = environ[key]
    return result


def _split(text: str) -> list[str]:
    """Items of a list; a comma inside double quotes that open right after ``=`` does not separate."""
    if re.fullmatch(r'[^=,]+="[^"]*"', text):
        return [text]
    return re.split(_NEXT_ITEM, text)


def env_file(path: str) -> dict[str, str]:
    """Variables of a file as Podman reads it: ``K=V`` lines, ``K`` alone from our environment, ``#`` comments.

    Raises:
        NotFoundError: it cannot be read. UsageError: a line is wrong; the message names it.
    """
    try:
        with open(path) as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(
            f"The environment file {path} cannot be read: {getattr(error, 'strerror', error)}.", hint=f"ls -l {path}"
        ) from error
    result = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.lstrip().partition("=")
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
