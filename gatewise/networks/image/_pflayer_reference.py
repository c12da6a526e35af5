"""Names of published PfLayer transformer weights, and the published configuration in our terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.reference import Path, translate_config, unchanged
from gatewise.catalog.registry import registered_config
from gatewise.layers.positions import row_of_positions
from gatewise.networks.image._base import ImageConfig

if TYPE_CHECKING:
    from gatewise.networks.image.pflayer_transformers import PfPiTConfig, PfViTConfig

Config = TypeVar("Config", bound=ImageConfig)


def vit_layouts(config: PfViTConfig) -> list[KeyLayout]:
    """The official layout: positions are one row of tokens."""
    rules = (
        ("^pos_embed", "stem.positions"),
        ("^patch_embed.proj", "stem.proj"),
        ("^blocks", "stages.0"),
        ("attn", "mixer"),
    )

    to_ours, to_theirs = row_of_positions("pos_embed", config.grid)
    return [KeyLayout("official", rules, tensor_to_ours=to_ours, tensor_to_theirs=to_theirs)]


def pit_layouts(config: PfPiTConfig) -> list[KeyLayout]:
    """The official layout: positions are a map with its channels first."""
    rules = (
        ("^pos_embed", "stem.positions"),
        ("^patch_embed.conv", "stem.proj"),
        ("^transformers.{s}.blocks", "stages.{s}"),
        ("^pools.{s}.conv", "downsamples.{s}"),
        ("attn", "mixer"),
    )

    def to_ours(key: str, tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1) if key == "pos_embed" else tensor

    def to_theirs(key: str, tensor: Tensor) -> Tensor:
        return tensor.permute(0, 3, 1, 2) if key == "pos_embed" else tensor

    return [KeyLayout("official", rules, tensor_to_ours=to_ours, tensor_to_theirs=to_theirs)]


def vit_tap(config: PfViTConfig) -> Callable[[str], Path]:
    """Where outputs of the published ViT, tokens throughout, come up here."""
    layout = vit_layouts(config)[0]

    def tap(path: str) -> Path:
        if path == "patch_embed":
            return "stem.proj", lambda x: x.flatten(2).transpose(1, 2)
        return layout.to_ours(path), _as_tokens

    return tap


def pit_tap(config: PfPiTConfig) -> Callable[[str], Path]:
    """Where outputs of the published PiT, maps between stages and tokens within, come up here."""
    layout = pit_layouts(config)[0]
    maps = {"patch_embed": "stem.proj"} | {f"pools.{i}": f"downsamples.{i}" for i in range(len(config.depths) - 1)}
    # A stage gives what its last block gives, as a map.
    stages = {f"transformers.{i}": f"stages.{i}.{depth - 1}" for i, depth in enumerate(config.depths)}

    def tap(path: str) -> Path:
        if path in maps:
            return maps[path], unchanged
        if path in stages:
            return stages[path], lambda x: x.permute(0, 3, 1, 2)
        return layout.to_ours(path), _as_tokens

    return tap


def reference_config(record: Mapping[str, Any], target: type[Config], renamed: Mapping[str, str]) -> Config | None:
    """Our configuration for a record, or None if it is about something else."""
    # The published code leaves an option out by None.
    reference = {name: value for name, value in record["config"].items() if value is not None}
    base = registered_config(reference.pop("factory", ""))
    stated = reference.pop("attn_type", None)
    fields = translate_config(reference, target, renamed)
    if fields is None or not isinstance(base or target(), target):
        return None
    found = _odd_mixer(record["keys"])
    # Kinds that the published code has beside max pooling and attention look like the first and are not.
    if stated is not None and (stated == "max") != (found == "max"):
        return None
    return replace(base or target(), **fields | {"odd_mixer": found})


def _odd_mixer(keys: Mapping[str, list[int]]) -> str:
    """What stands in odd blocks, by the shape of the second one's last linear map."""
    projections = [shape for key, shape in keys.items() if key.endswith("blocks.1.attn.proj.weight")]
    return "attention" if projections and projections[0][0] == projections[0][1] else "max"


def _as_tokens(x: Tensor) -> Tensor:
    """Tokens of a map with its channels last, in one row."""
    return x.flatten(1, 2) if x.ndim == 4 else x
