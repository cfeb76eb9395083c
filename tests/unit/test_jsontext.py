"""fc_agent.jsontext beside json itself."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fc_agent.jsontext import dumps, loads

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_it_says_what_json_says(value: object) -> None:
    assert dumps(value) == json.dumps(value, separators=(",", ":"))
    assert loads(dumps(value)) == value
    assert loads(json.dumps(value, indent=1)) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")) == value


@given(st.text(alphabet='{}[]",:0123456789.eE-+ \t\n\r\x00\\utrefalsnN"', max_size=12) | st.binary(max_size=6))
def test_it_refuses_what_json_refuses(text: str | bytes) -> None:
    try:
        expected = json.loads(text if isinstance(text, str) else text.decode())
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 - of whatever kind
            loads(text)
    else:
        assert repr(loads(text)) == repr(expected)


def test_what_has_no_json() -> None:
    with pytest.raises(TypeError, match="set"):
        dumps({"a": {1}})
    with pytest.raises(RecursionError):
        loads("[" * 100_000)
