"""Reading untrusted YAML, with limits on nesting and aliases.

A few hundred bytes of nested aliases can expand to more values than fit in memory, and a C parser overflows its stack
on deep nesting. So the events of the document are counted before anything is constructed.
"""

from __future__ import annotations

from typing import Any

import yaml

from gatewise.errors import UserError

DEEPEST = 50
"""Largest accepted nesting depth."""

MOST_VALUES = 200_000
"""Largest number of values in a document, with aliases expanded."""


def parse_yaml(text: str, what: str) -> Any:
    """Return the content of a YAML document: mappings, lists and scalars. Tags construct nothing.

    Numbers such as `1e-3`, which PyYAML's own loader takes for strings, are read as numbers.

    Args:
        text: YAML document.
        what: name of the document in error messages.
    Raises:
        UserError: if it is not YAML, is nested too deeply, or its aliases stand for too many values.
    """
    from jsonargparse import get_loader

    try:
        _require_bounded(text, what)
        return get_loader("yaml")(text)
    except yaml.YAMLError as error:
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error
    # An integer of too many digits, a key that cannot be hashed.
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from error


def _require_bounded(text: str, what: str) -> None:
    """Check nesting and the number of values, with aliases expanded. The event parser does not recurse."""
    values = 0
    anchored: dict[str | None, int] = {}
    # For each open collection: its anchor, and the count before it.
    opened: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            values += anchored.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                anchored[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                anchored[anchor] = values - before
        if isinstance(event, yaml.AliasEvent) and any(anchor == event.anchor for anchor, _ in opened):
            raise UserError(f"{what} is not accepted: its alias *{event.anchor} stands inside its own anchor")
        if len(opened) > DEEPEST:
            raise UserError(f"{what} is not accepted: its YAML is nested more than {DEEPEST} levels deep")
        if values > MOST_VALUES:
            raise UserError(f"{what} is not accepted: its YAML stands for more than {MOST_VALUES:,} values")
