"""JSON without ``import json``, which compiles regular expressions: 7 ms, where a bare interpreter starts in 9.

``loads`` and ``dumps`` are those of ``json`` with its defaults, but ``dumps`` leaves no spaces. They are made of the same
parts, which CPython writes in C (``_json``); an interpreter that has none of them gets ``json`` itself.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SPACE = " \t\n\r"
CONSTANTS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class _Defaults:
    """What ``json.JSONDecoder()`` tells its scanner."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = CONSTANTS.__getitem__


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} cannot be JSON")


try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner
except ImportError:
    import json

    _scan: Any = vars(json.JSONDecoder())["scan_once"]

    def dumps(value: object) -> str:
        return json.dumps(value, separators=(",", ":"))

else:
    _scan = make_scanner(_Defaults)  # type: ignore[arg-type] # any object with these attributes will do

    def dumps(value: object) -> str:
        """``value`` as JSON in ASCII, without spaces.

        Raises:
            TypeError: something in it has no JSON. ValueError: it contains itself.
        """
        encode = make_encoder({}, _refuse, encode_basestring_ascii, None, ":", ",", False, False, True)
        return "".join(encode(value, 0))


def loads(text: "str | bytes | bytearray") -> "Any":
    """What the JSON in ``text`` says; bytes are UTF-8.

    Raises:
        ValueError: it is not one JSON value. RecursionError: it is nested too deeply.
    """
    if not isinstance(text, str):
        text = text.decode("utf-8", "surrogatepass")
    start = len(text) - len(text.lstrip(SPACE))
    try:
        value, end = _scan(text, start)
    except StopIteration as stop:
        raise ValueError(f"no value at character {stop.value}") from None
    if text[end:].strip(SPACE):
        raise ValueError(f"more than one value, from character {end} on")
    return value
