"""Structs in JSON files: read so that a file which is damaged, whatever is in it, costs its reader one kind of error."""

from __future__ import annotations

import os

from fc_agent.jsontext import loads
from fc_agent.structs import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    S = TypeVar("S", bound=Struct)

LATEST = 253402300799  # 9999-12-31T23:59:59Z

# How fields are annotated -> what JSON has there. What is not listed may be anything.
KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict, "Mapping": dict, "None": type(None),
}  # fmt: skip


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else.
    """
    with open(path, encoding="utf-8") as file:
        return parse(file.read())


def parse(text: str | bytes) -> dict[str, Any]:
    """The JSON object that a text is; raises ValueError."""
    try:
        values = loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is not an object")
    return values


def checked(kind: type[S], values: dict[str, Any]) -> S:
    """The struct with these fields; raises ValueError: one is missing, not known, or of another type than annotated."""
    for name, value in values.items():
        annotation = kind.__annotations__.get(name)
        if not _fits(value, getattr(annotation, "__name__", str(annotation))):
            raise ValueError(f"{name} is {value!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(str(error)) from error


def read(kind: type[S], path: str | os.PathLike[str]) -> S:
    """The struct in a file that holds nothing else; raises what ``load`` and ``checked`` do."""
    return checked(kind, load(path))


def is_time(seconds: float) -> bool:
    """Whether a calendar has this time, in seconds since the epoch."""
    return 0 <= seconds <= LATEST


def _fits(value: object, annotation: str) -> bool:
    """Whether ``value`` may be in a field that is annotated ``int``, ``str | None``, ``dict[str, int]`` ..."""
    kinds = [KINDS.get(part.partition("[")[0].strip(), object) for part in annotation.split("|")]
    return any(isinstance(value, kind) for kind in kinds)
