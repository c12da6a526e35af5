"""Translate hyper-parameters of published constructors and configuration files to our names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any


def translate_config(
    reference: Mapping[str, Any],
    target: Callable[..., Any],
    renamed: Mapping[str, str] | None = None,
    ignored: tuple[str, ...] = (),
) -> dict[str, Any] | None:
    """Convert the reference constructor's hyper-parameters to arguments of `target` (our configuration, or a module).

    Args:
        reference: hyper-parameters by the reference's names.
        renamed: our names by theirs, where they differ.
        ignored: names of theirs that do not affect the computation (an image size that only sizes a table).
    Returns:
        The arguments, with lists as tuples. None if `reference` holds a name that `target` does not know, since the
        record then describes something else.
    """
    names = {name: name for name in signature(target).parameters} | dict(renamed or {})
    if not set(reference) <= {*names, *ignored}:
        return None
    return {
        names[key]: tuple(value) if isinstance(value, list) else value
        for key, value in reference.items()
        if key not in ignored
    }
