"""Key layouts of the published PfLayer transformer weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.layers.positions import row_of_positions

if TYPE_CHECKING:
    from gatewise.networks.image.pflayer.transformers import PfPiTConfig, PfViTConfig


def vit_layouts(config: PfViTConfig) -> list[KeyLayout]:
    """Return the official layout: positions are a sequence of tokens."""
    rules = (
        ("^pos_embed", "stem.positions"),
        ("^patch_embed.proj", "stem.proj"),
        ("^blocks", "stages.0"),
        ("attn", "mixer"),
    )

    to_ours, to_theirs = row_of_positions("pos_embed", config.grid)
    return [KeyLayout("official", rules, tensor_to_ours=to_ours, tensor_to_theirs=to_theirs)]


def pit_layouts(config: PfPiTConfig) -> list[KeyLayout]:
    """Return the official layout: positions are a map with channels first."""
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
