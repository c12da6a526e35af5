"""Inert descriptions of the tensors, storages and names in a PyTorch pickle, and checks of the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEEPEST = 100
"""Largest accepted nesting depth of containers."""
MOST_VALUES = 20_000_000
"""Largest number of values in a file, counting shared ones at each reference."""


class DamagedPickleError(Exception):
    """The pickle is truncated, or its instructions are inconsistent."""


class RefusedPickleError(Exception):
    """The pickle asks for something other than plain data. The message begins with what it wants or holds."""


@dataclass(frozen=True)
class Global:
    """Name in a module, which is not imported."""

    path: str


@dataclass(frozen=True)
class Storage:
    """Memory that the file claims to have: `count` elements of `item_size` bytes under a key."""

    key: str
    item_size: int
    count: int


@dataclass(frozen=True, eq=False)
class TensorLike:
    """Tensor that the file describes. `odd` says what is unusual about it, if anything."""

    nbytes: int = 0
    odd: str | None = None


@dataclass(eq=False)
class Holder:
    """Object with attributes: an argparse.Namespace."""

    attributes: dict[Any, Any] = field(default_factory=dict)


def require_plain(content: Any) -> None:
    """Check that a scanned value has bounded depth, no cycles and no unusual tensors.

    Raises:
        RefusedPickleError: if a check fails. The message names the place.
    """
    _Walk().visit(content, ())


class _Walk:
    """Traversal that visits each container once and computes its depth and number of values."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}
        self._open: set[int] = set()

    def visit(self, value: Any, place: tuple[Any, ...]) -> tuple[int, int]:
        """Return height and number of values."""
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
