"""Structs: what ``@dataclass(frozen=True)`` makes, without what that costs when fcvm, or the agent, starts.

Importing ``dataclasses`` takes 10 ms (it imports inspect), and every class that it decorates up to 1 ms, because it
compiles that class's methods; a whole `fcvm ls` may take 30 ms, and under emulation everything takes thirty times as long. The
functions have the names and meanings of those in ``dataclasses``, and a type checker sees a frozen dataclass.

    class Port(Struct):
        guest: int
        host: int = 0
        labels: dict[str, str] = field(default_factory=dict)
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar, dataclass_transform

    S = TypeVar("S", bound="Struct")
else:

    def dataclass_transform(**_):
        return lambda cls: cls


class _Factory:
    """A default that is made anew for every struct."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], Any]) -> Any:
    """The default of a field whose value can be changed, and so must not be shared."""
    return _Factory(default_factory)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Struct:
    """Base of a class whose annotations are its fields: given by position or name, compared by value, never changed."""

    _fields: tuple[str, ...] = ()
    _defaults: dict[str, object] = {}  # noqa: RUF012 - every subclass has its own

    def __init_subclass__(cls) -> None:
        own = cls.__annotations__
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls._defaults = cls._defaults | {name: vars(cls)[name] for name in own if name in vars(cls)}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(self._fields, args, strict=False))
        if len(args) > len(given) or given.keys() & kwargs.keys() or not (given.keys() | kwargs.keys()) <= {*self._fields}:
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(self._fields)}")
        given |= kwargs
        values = self.__dict__
        for name in self._fields:
            if name in given:
                values[name] = given[name]
            elif name in self._defaults:
                default = self._defaults[name]
                values[name] = default.make() if isinstance(default, _Factory) else default
            else:
                raise TypeError(f"{type(self).__name__} needs a value for {name}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is a struct: {name} cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is a struct: {name} cannot be removed")

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(self) is type(other) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self)[name] for name in self._fields))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._fields)})"


def fields(struct: Struct | type[Struct]) -> tuple[str, ...]:
    """The names of its fields, in order."""
    return struct._fields


def replace(struct: S, **changes: Any) -> S:
    """A copy of ``struct`` with other values for some of its fields."""
    return type(struct)(**{**vars(struct), **changes})


def asdict(struct: Struct) -> dict[str, Any]:
    """The fields and their values, down through lists, tuples, dicts and structs."""
    return {name: _plain(getattr(struct, name)) for name in struct._fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return asdict(value)
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
