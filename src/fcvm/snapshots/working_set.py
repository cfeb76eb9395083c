"""Which pages a clone needs soon after it starts: recorded once, brought in at once for every later clone.

Recorded from a clone whose faults bring in single pages, so it is exactly what was touched. As JSON beside the
snapshot: a list of ``[first page, number of pages]``, ascending.
"""

import json
from pathlib import Path

from fcvm.errors import SnapshotError
from fcvm.snapshots import store
from fcvm.snapshots.store import Snapshot

MOST = 1 << 28  # pages: the largest memory that a VM can have (vm/spec.py)
GAP = 8  # pages; two ranges that are nearer are one: copying eight pages costs less than another system call


def path(snapshot: Snapshot) -> Path:
    """Where the snapshot's working set lies, if it was recorded."""
    return snapshot.path / store.WORKING_SET


def save(snapshot: Snapshot, used: list[tuple[int, int]], *, name: str = store.WORKING_SET, gap: int = GAP) -> int:
    """Keep what a clone has used (``MemoryServer.used``) as the file ``name``; returns the number of pages that it makes up.

    Raises:
        FcvmError: it cannot be written.
    """
    ranges = joined(used, gap)
    try:
        store.add(snapshot, name, json.dumps(ranges))
    except OSError as error:
        raise store.write_error(error, snapshot.path) from error
    return sum(count for _, count in ranges)


def load(file: Path) -> list[tuple[int, int]]:
    """The ranges in ``file``; none when there is no such file.

    Raises:
        SnapshotError: it is damaged.
    """
    try:
        ranges = [(int(first), int(count)) for first, count in json.loads(file.read_text())]
        if any(first < 0 or count < 1 or first + count > MOST for first, count in ranges):
            raise ValueError("no memory has such pages")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise SnapshotError(f"The working set {file} is damaged: {error}.", hint=f"rm {file}") from error
    return ranges


def joined(ranges: list[tuple[int, int]], gap: int = GAP) -> list[tuple[int, int]]:
    """Ascending ranges with those at most ``gap`` pages apart made one."""
    result: list[tuple[int, int]] = []
    for first, count in sorted(ranges):
        if result and first - sum(result[-1]) <= gap:
            start = result[-1][0]
            result[-1] = (start, max(sum(result[-1]), first + count) - start)
        else:
            result.append((first, count))
    return result
