"""Reading untrusted JSON, with bounded nesting, strict numbers and one-line errors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gatewise.errors import UserError
from gatewise.files.regular import read_text

DEEPEST = 100
"""Largest accepted nesting depth, because Python's parser recurses."""

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def read_json(path: str | Path, what: str = "file", *, allow_nonfinite: bool = False) -> Any:
    """Return the content of a JSON file.

    Args:
        path: path of the file.
        what: role of the file in error messages, such as "digest record".
        allow_nonfinite: accept NaN and Infinity, which are not valid JSON.
    Raises:
        UserError: if the file cannot be read or is not JSON, with the line of the mistake.
    """
    return parse_json(read_text(path, what), f"{what} {str(path)!r}", allow_nonfinite=allow_nonfinite)


def parse_json(text: str | bytes, what: str, *, allow_nonfinite: bool = False, distinct_names: bool = False) -> Any:
    """Return the content of JSON text, with the checks of `read_json`.

    Args:
        text: JSON document.
        what: name of the document in error messages.
        distinct_names: reject objects with a repeated name, of which otherwise the last one counts.
    """
    try:
        document = text.decode("utf-8") if isinstance(text, bytes) else text
        _require_shallow(document, what)
        return json.loads(
            document,
            parse_constant=None if allow_nonfinite else _refuse_constant,
            object_pairs_hook=_distinct if distinct_names else None,
        )
    # Includes UnicodeDecodeError, and integers with more digits than Python converts.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} is not valid JSON: {error}") from error


def finite_or_null(value: Any) -> Any:
    """Return nested mappings and sequences with every NaN and infinity replaced by None, for JSON."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _require_shallow(text: str, what: str) -> None:
    depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        token = found[0]
        if token in ("[", "{"):
            depth += 1
            if depth > DEEPEST:
                raise UserError(f"{what} is not accepted: its JSON is nested more than {DEEPEST} levels deep")
        elif token in ("]", "}"):
            depth -= 1


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")
