"""From a name to a network."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from gatewise.catalog.checkpoint import load_checkpoint
from gatewise.catalog.registry import family_of
from gatewise.errors import UserError, unknown_name

if TYPE_CHECKING:
    from torch import nn


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """The network registered under `name`, with fields of its configuration replaced by `overrides`.

    Args:
        name: a registered name; `list_models()` has them all.
        pretrained: load the published weights. Their number of classes holds unless `num_classes` is given; where it
            is given and differs, the head stays fresh. (The same goes for a language model's `vocab_size`.)
        **overrides: fields of the family's configuration, such as `num_classes` or `drop_path_rate`.
    Raises:
        UnknownNameError: for an unknown name or field; suggests the closest.
        UserError: if `pretrained` is asked of a variant without published weights.
        ValueError: for a value that the configuration refuses.
    """
    family = family_of(name)
    variant = family.variants[name]
    if not pretrained:
        network = family.network(override(variant.config, overrides))
        network.variant = name
        return network
    weights = variant.weights
    if weights is None:
        raise UserError(f"no weights are published for {name!r}; create it without pretrained=True")
    width = "num_classes" if hasattr(variant.config, "num_classes") else "vocab_size"
    published = weights.num_classes or getattr(variant.config, width)
    network = family.network(override(variant.config, {width: published, **overrides}))
    network.variant = name
    load_checkpoint(network, weights.source, replace_head=getattr(network.config, width) != published)
    return network


def override(config: Any, overrides: dict[str, Any]) -> Any:
    """The configuration with these fields replaced; lists (as YAML has them) become tuples."""
    known = [field.name for field in fields(config)]
    for field_name in overrides:
        if field_name not in known:
            raise unknown_name(f"field of {type(config).__name__}", field_name, known)
    return replace(config, **{key: _as_tuple(value) for key, value in overrides.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list | tuple) else value
