"""Create networks by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from gatewise.catalog.checkpoint import load_checkpoint
from gatewise.catalog.registry import Family, family_of
from gatewise.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import nn

_TOO_LARGE = re.compile(r"can't allocate memory|Storage size calculation overflowed|Overflow when unpacking|too large")
"""PyTorch's error messages for sizes that exceed any memory."""


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Build the network registered under `name`, with fields of its configuration replaced by `overrides`.

    Args:
        name: a registered name; see `list_models()`.
        pretrained: load the published weights, with their number of classes unless `num_classes` is given. If it is
            given and differs, the head stays freshly initialized. (The same holds for a language model's `vocab_size`.)
        **overrides: fields of the family's configuration, such as `num_classes` or `drop_path_rate`.
    Raises:
        UnknownNameError: if a name or field is unknown. The message suggests the closest one.
        UserError: if `pretrained` is set for a variant without published weights.
        ValueError: if the configuration rejects a value, or the network does not fit into memory.
    """
    family = family_of(name)
    variant = family.variants[name]
    if not pretrained:
        return _build(family, name, override(variant.config, overrides))
    weights = variant.weights
    if weights is None:
        raise UserError(f"no weights are published for {name!r}; create it without pretrained=True")
    width = "num_classes" if hasattr(variant.config, "num_classes") else "vocab_size"
    published = weights.num_classes or getattr(variant.config, width)
    network = _build(family, name, override(variant.config, {width: published, **overrides}))
    load_checkpoint(network, weights.source, replace_head=getattr(network.config, width) != published)
    return network


def _build(family: Family, name: str, config: Any) -> Any:
    try:
        network = family.network(config)
    except (RuntimeError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        if not _TOO_LARGE.search(reason):
            raise
        raise UserError(f"{name} with these fields does not fit into memory: {reason}") from error
    network.variant = name
    return network


def override(config: Any, overrides: dict[str, Any]) -> Any:
    """Return the configuration with these fields replaced.

    Plain data, as in YAML, is converted to the fields' types: lists to tuples, mappings to dataclasses.
    """
    return replace(config, **_typed(type(config), overrides))


def _typed(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert plain values to the fields of this dataclass.

    Raises:
        UnknownNameError: if it has no such field. The message suggests the closest one.
    """
    known = [field.name for field in fields(config)]
    for name in values:
        if name not in known:
            raise unknown_name(f"field of {config.__name__}", name, known)
    types = get_type_hints(config) if any(isinstance(value, Mapping) for value in values.values()) else {}
    return {name: _as_field(value, types.get(name)) for name, value in values.items()}


def _as_field(value: Any, annotation: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_as_field(item, None) for item in value)
    if isinstance(value, Mapping):
        options = [annotation, *get_args(annotation)]
        for nested in options:
            if isinstance(nested, type) and is_dataclass(nested):
                return nested(**_typed(nested, value))
    return value
