"""Random sequences of operations on a mount and on a plain directory: every result and the whole tree must be the
same.
"""

from collections.abc import Iterator
from typing import Any

import fuse_support
import pytest
from fuse_support import Mount
from fuse_tree import OPERATIONS, PLANTED, Operation, Tree, difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPERATION = st.one_of(*(st.tuples(st.just(name), *map(st.sampled_from, arguments)) for name, *arguments in OPERATIONS))


@pytest.fixture(scope="module")
def shared() -> Iterator[Mount]:
    with fuse_support.scratch() as base, fuse_support.mount(base) as mounted:
        (base / "plain").mkdir()
        yield mounted


def compare(mounted: Mount, operations: list[Operation]) -> None:
    mounted.live_on()
    plain, guest = Tree(mounted.base / "plain" / "tree"), Tree(mounted.path / "tree")
    try:
        assert difference(guest, plain, operations) == ""
        assert Tree(mounted.host / "tree").everything() == plain.everything()
    finally:
        plain.remove()
        guest.remove()


COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=150, derandomize=True, **COMMON)
@given(operations=st.lists(OPERATION, min_size=5, max_size=60))
def test_random_operations(shared: Mount, operations: list[Operation]) -> None:
    compare(shared, operations)


@settings(max_examples=100, derandomize=True, **COMMON)
@given(operations=st.lists(OPERATION, min_size=10, max_size=60))
def test_random_operations_in_a_tree(shared: Mount, operations: list[Operation]) -> None:
    compare(shared, [*PLANTED, *operations])
