"""Validate records read from a file: all fields must be present, typed and in range, without others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gatewise.errors import UserError

Record = TypeVar("Record")
Limits = Mapping[str, tuple[float, float]]

SMALLEST = 1e-45
"""Smallest positive float32: the lower limit of values that must be positive."""

_ANY = (-1.7e308, 1.7e308)
_PLAIN = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def read_fields(kind: type[Record], content: Any, what: str, limits: Limits | None = None) -> Record:
    """Rebuild a record from the JSON of `dataclasses.asdict`.

    Args:
        kind: dataclass of plain values, tuples, mappings and other such dataclasses.
        content: parsed JSON.
        what: the record's name in error messages.
        limits: smallest and largest value of fields by name, at any depth; other numbers must be finite.
    Raises:
        UserError: if a field is missing, unknown, of the wrong type or out of range. The message names the field.
    """
    return _record(kind, content, what, limits or {})


def _record(kind: Any, content: Any, what: str, limits: Limits) -> Any:
    if not isinstance(content, dict):
        raise UserError(f"{what} must be a mapping, not {content!r:.80}")
    known = {field.name: field for field in fields(kind)}
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := sorted(needed - content.keys()):
        raise UserError(f"{what} has no field {missing[0]!r}")
    if unknown := sorted(content.keys() - known.keys()):
        raise UserError(f"{what} has an unknown field {unknown[0]!r:.80}")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{what}.{name}", name, limits) for name, value in content.items()})


def _value(hint: Any, value: Any, where: str, name: str, limits: Limits) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r:.80}")
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in arguments:
            return None
        (rest,) = [part for part in arguments if part is not type(None)]
        return _value(rest, value, where, name, limits)
    if is_dataclass(hint):
        return _record(hint, value, where, limits)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} must be a list, not {value!r:.80}")
        return tuple(_value(arguments[0], part, f"{where}[{index}]", name, limits) for index, part in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, not {value!r:.80}")
        return {key: _value(arguments[1], part, f"{where}[{key!r:.80}]", name, limits) for key, part in value.items()}
    return _plain(hint, value, where, limits.get(name, _ANY))


def _plain(hint: Any, value: Any, where: str, limits: tuple[float, float]) -> Any:
    if hint is float and type(value) is int and abs(value) < 2**53:
        value = float(value)
    if type(value) is not hint:
        raise UserError(f"{where} must be {_PLAIN[hint]}, not {value!r:.80}")
    # NaN fails every range check.
    if hint in (int, float) and not limits[0] <= value <= limits[1]:
        low, high = (limit if math.isfinite(limit) else "any" for limit in limits)
        rule = "a finite number" if limits is _ANY else f"in {low}..{high}"
        raise UserError(f"{where} must be {rule}, not {value!r:.80}")
    return value
