"""What a pickle of PyTorch describes: tensors, storages and names, none of which is there; and checks of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEEPEST = 100
"""Levels of nesting of containers that are read."""
MOST_VALUES = 20_000_000
"""Values that a file may stand for, those that are referred to more than once counted each time."""


class DamagedPickleError(Exception):
    """The pickle breaks off, or its instructions do not fit together."""


class RefusedPickleError(Exception):
    """The pickle asks for something that is not plain data; the message begins with what it wants or holds."""


@dataclass(frozen=True)
class Global:
    """A name in a module, which is not imported."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Memory that the file says it has: `count` elements of `item_size` bytes under a key."""

    key: str
    item_size: int
    count: int


@dataclass(frozen=True, eq=False)
class TensorLike:
    """A tensor that the file describes; `odd` says what is unusual about it, if anything."""

    nbytes: int = 0
    odd: str | None = None


@dataclass(eq=False)
class Holder:
    """An object with attributes: an argparse.Namespace."""

    attributes: dict[Any, Any] = field(default_factory=dict)


def require_plain(content: Any) -> None:
    """Check that a scanned value is nested to a bounded depth, holds no cycle, and no tensor that is odd.

    Raises:
        RefusedPickleError: names the place of what is not accepted.
    """
    _Walk().visit(content, ())


class _Walk:
    """Visits each container once, and knows afterwards how deep it is and for how many values it stands."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def visit(self, value: Any, place: tuple[Any, ...]) -> tuple[int, int]:
        """Height and number of values."""
        if isinstance(value, TensorLike) and value.odd is not None:
            raise RefusedPickleError(f"it holds a {value.odd} tensor at {_named(place)}")
        parts = _parts(value)
        if parts is None:
            return 0, 1
        if id(value) in self._open:
            raise RefusedPickleError(f"its {_named(place)} contains itself")
        if len(place) >= DEEPEST:
            raise RefusedPickleError(f"it is nested more than {DEEPEST} levels deep")
        if id(value) not in self._known:
            self._open.add(id(value))
            height, count = 0, 1
            for name, part in parts:
                inner_height, inner_count = self.visit(part, (*place, name))
                height, count = max(height, inner_height + 1), count + inner_count
            self._open.discard(id(value))
            if count > MOST_VALUES:
                raise RefusedPickleError(f"it stands for more than {MOST_VALUES:,} values")
            self._known[id(value)] = height, count
        height, count = self._known[id(value)]
        if len(place) + height > DEEPEST:
            raise RefusedPickleError(f"it is nested more than {DEEPEST} levels deep")
        return height, count


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, dict):
        return [*dict.items(value), *(getattr(value, "__dict__", {}) or {}).items()]
    if isinstance(value, Holder):
        return list(value.attributes.items())
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    return None


def _named(place: tuple[Any, ...]) -> str:
    return repr(".".join(map(str, place))[:200]) if place else "top"
