"""Structs behave as frozen dataclasses do."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from fc_agent import structs
from fc_agent.structs import Struct, field


class Point(Struct):
    """A struct with defaults; one of them is a container."""

    x: int
    y: int = 2
    tags: list[str] = field(default_factory=list)


class Named(Point):
    """One that inherits fields."""

    name: str = "p"


class Line(Struct):
    """One that holds others."""

    ends: tuple[Point, ...]
    by_name: dict[str, Point]


@dataclasses.dataclass(frozen=True)
class Model:
    """What ``Point`` is to be like."""

    x: int
    y: int = 2
    tags: list[str] = dataclasses.field(default_factory=list)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1,), {}), ((1, 3), {}), ((1, 3, ["a"]), {}), ((1,), {"tags": ["b"]}), ((), {"y": 5, "x": 4})]
)
def test_made_as_a_dataclass_is(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    made, model = Point(*args, **kwargs), Model(*args, **kwargs)
    assert structs.asdict(made) == dataclasses.asdict(model)
    assert repr(made) == repr(model).replace("Model", "Point")


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((), {"y": 1}), ((1, 2, [], 4), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((1,), {"_fields": 1})]
)
def test_wrong_fields_are_refused_as_a_dataclass_does(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for kind in (Point, Model):
        with pytest.raises(TypeError):
            kind(*args, **kwargs)


def test_a_struct_cannot_be_changed() -> None:
    point = Point(1)
    with pytest.raises(AttributeError, match="x"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="other"):
        point.other = 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="x"):
        del point.x
    assert point == Point(1)


def test_a_container_is_each_structs_own() -> None:
    one = Point(1)
    one.tags.append("a")
    assert Point(1).tags == []


def test_equality_is_of_the_same_kind_with_the_same_values() -> None:
    assert Point(1) == Point(1, 2)
    assert Point(1) != Point(2)
    assert Point(1) != Named(1)
    assert Point(1) != 1
    with pytest.raises(TypeError, match="unhashable"):  # as a dataclass with a list in it
        hash(Point(1))


def test_hash_follows_equality() -> None:
    class Pair(Struct):
        a: int
        b: str = ""

    assert len({Pair(1), Pair(1, ""), Pair(b="", a=1), Pair(2)}) == 2


def test_inherited_fields_come_first() -> None:
    assert structs.fields(Named) == ("x", "y", "tags", "name")
    assert Named(1, name="q") == Named(1, 2, [], "q")


def test_replace_copies() -> None:
    before = Point(1, tags=["a"])
    assert structs.replace(before, y=7) == Point(1, 7, ["a"])
    assert before.y == 2
    with pytest.raises(TypeError, match="Point"):
        structs.replace(before, z=1)


def test_asdict_goes_down_and_copies() -> None:
    point = Point(1, tags=["a"])
    line = Line((point, Point(2)), {"a": point})
    plain = structs.asdict(line)
    assert plain == {
        "ends": ({"x": 1, "y": 2, "tags": ["a"]}, {"x": 2, "y": 2, "tags": []}),
        "by_name": {"a": {"x": 1, "y": 2, "tags": ["a"]}},
    }
    plain["by_name"]["a"]["tags"].append("b")
    assert point.tags == ["a"]


def test_copies_and_pickles() -> None:
    point = Point(1, tags=["a"])
    assert copy.deepcopy(point) == point
    assert pickle.loads(pickle.dumps(point)) == point
