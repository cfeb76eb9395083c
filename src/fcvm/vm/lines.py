"""The container's log as lines: the newest of them, those since a moment, each behind the time at which it was begun.

A record of the log (``output``) is a chunk as it was written: several lines, or a part of one. A `Place` in the log is
a record's time and how many of its pieces (a line's rest, lines, a line's beginning) stand before it.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fcvm.vm.output import Stream

    Record = tuple[int, Stream, bytes]
    Place = tuple[int, int]


def pieces(data: bytes) -> list[bytes]:
    r"""A chunk cut behind every ``\n``."""
    *whole, rest = data.split(b"\n")
    return [line + b"\n" for line in whole] + ([rest] if rest else [])


def newest(records: Iterable[Record], count: int) -> Place:
    """Where the newest ``count`` lines of both streams begin; for 0, where the next would."""
    begun: deque[Place] = deque(maxlen=count)
    within = {"stdout": False, "stderr": False}  # a line has begun there
    for when, stream, data in records:
        for number, piece in enumerate(pieces(data)):
            if not within[stream]:
                begun.append((when, number))
            within[stream] = not piece.endswith(b"\n")
    if count == 0:
        return time.time_ns(), 0
    return begun[0] if len(begun) == count else (0, 0)


def since(place: Place, records: Iterable[Record]) -> Iterator[Record]:
    """``records`` from ``place`` on, whatever the clock did after it."""
    when, number = place
    rest = itertools.dropwhile(lambda record: record[0] < when, records)
    for first, stream, data in itertools.islice(rest, 1):
        yield first, stream, b"".join(pieces(data)[number:]) if first == when else data
    yield from rest


def stamped(records: Iterable[Record]) -> Iterator[Record]:
    """Every line behind the time of its beginning, as Docker has it: UTC, to the nanosecond."""
    within = {"stdout": False, "stderr": False}
    for when, stream, data in records:
        seconds, nanoseconds = divmod(when, 10**9)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{nanoseconds:09}Z "
        lines = pieces(data)
        marks = [b"" if within[stream] else stamp.encode(), *[stamp.encode()] * (len(lines) - 1)]
        within[stream] = not data.endswith(b"\n")
        yield when, stream, b"".join(mark + line for mark, line in zip(marks, lines, strict=True))
