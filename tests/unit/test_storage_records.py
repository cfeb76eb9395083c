"""Structs in JSON files: whatever is in the file, there is one kind of error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fc_agent.structs import Struct
from fcvm.storage import records


class Thing(Struct):
    name: str
    size: float
    parent: str | None = None
    labels: Mapping[str, str] = {}
    rest: Any = None


GOOD = {"name": "a", "size": 1}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / "thing").write_text(json.dumps({**GOOD, "labels": {"a": "b"}, "rest": [1]}))
    assert records.read(Thing, tmp_path / "thing") == Thing("a", 1, labels={"a": "b"}, rest=[1])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b"{}"] + [
    json.dumps({**GOOD, **wrong}).encode() for wrong in ({"size": "1"}, {"name": None}, {"labels": []}, {"parent": 1}, {"more": 1})
])  # fmt: skip
def test_anything_else_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "thing").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        records.read(Thing, tmp_path / "thing")
