"""Digest records of the parameter-free layers reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.pflayer import (
    PfPiT,
    PfPiTConfig,
    PfResNet,
    PfResNetConfig,
    PfViT,
    PfViTConfig,
    layouts,
    pit_layouts,
    vit_layouts,
)


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the published code's residual networks."""
    # The published code uses None for an omitted option.
    reference = {name: value for name, value in record["config"].items() if value is not None}
    base = registered_config(reference.pop("factory", record["variant"]))
    renamed = {
        "layer_setting": "depths",
        "width_per_group": "base_width",
        "replace_stride_with_dilation": "dilated_stages",
    }
    fields = translate_config(reference, PfResNetConfig, renamed, ignored=("zero_init_residual",))
    if not isinstance(base, PfResNetConfig) or fields is None:
        return None
    config = replace(base, **fields)
    layout = layouts(config)[0]
    # A stage's output is that of its last block.
    stages = {f"layer{i + 1}": f"stages.{i}.{depth - 1}" for i, depth in enumerate(config.depths)}
    special = {"conv1": "stem", "fc": "head"} | stages
    return Case(PfResNet(config), layout, tap=lambda path: (special.get(path) or layout.to_ours(path), unchanged))


def vit_reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the published code's ViT."""
    config = reference_config(record, PfViTConfig, {"img_size": "image_size"})
    return None if config is None else Case(PfViT(config), vit_layouts(config)[0], tap=vit_tap(config))


def pit_reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the published code's PiT."""
    renamed = {"base_dims": "head_dims", "depth": "depths", "heads": "num_heads"}
    config = reference_config(record, PfPiTConfig, renamed)
    return None if config is None else Case(PfPiT(config), pit_layouts(config)[0], tap=pit_tap(config))


Config = TypeVar("Config", bound=ImageConfig)


def vit_tap(config: PfViTConfig) -> Callable[[str], Tap]:
    """Return a function from paths of the published ViT, which has tokens throughout, to our taps."""
    layout = vit_layouts(config)[0]

    def tap(path: str) -> Tap:
        if path == "patch_embed":
            return "stem.proj", lambda x: x.flatten(2).transpose(1, 2)
        return layout.to_ours(path), _as_tokens

    return tap


def pit_tap(config: PfPiTConfig) -> Callable[[str], Tap]:
    """Return a function from paths of the published PiT, maps between stages and tokens within, to our taps."""
    layout = pit_layouts(config)[0]
    maps = {"patch_embed": "stem.proj"} | {f"pools.{i}": f"downsamples.{i}" for i in range(len(config.depths) - 1)}
    # A stage's output is that of its last block, as a map.
    stages = {f"transformers.{i}": f"stages.{i}.{depth - 1}" for i, depth in enumerate(config.depths)}

    def tap(path: str) -> Tap:
        if path in maps:
            return maps[path], unchanged
        if path in stages:
            return stages[path], lambda x: x.permute(0, 3, 1, 2)
        return layout.to_ours(path), _as_tokens

    return tap


def reference_config(record: Mapping[str, Any], target: type[Config], renamed: Mapping[str, str]) -> Config | None:
    """Return our configuration for a record, or None if it is about something else."""
    # The published code uses None for an omitted option.
    reference = {name: value for name, value in record["config"].items() if value is not None}
    base = registered_config(reference.pop("factory", ""))
    stated = reference.pop("attn_type", None)
    fields = translate_config(reference, target, renamed)
    if fields is None or not isinstance(base or target(), target):
        return None
    found = _odd_mixer(record["keys"])
    # The published code's kinds besides max pooling and attention look like max pooling but are not.
    if stated is not None and (stated == "max") != (found == "max"):
        return None
    return replace(base or target(), **fields | {"odd_mixer": found})


def _odd_mixer(keys: Mapping[str, list[int]]) -> str:
    """Return the mixer of odd blocks, from the shape of the second block's last linear layer."""
    projections = [shape for key, shape in keys.items() if key.endswith("blocks.1.attn.proj.weight")]
    return "attention" if projections and projections[0][0] == projections[0][1] else "max"


def _as_tokens(x: Tensor) -> Tensor:
    """Flatten a channels-last map to a sequence of tokens."""
    return x.flatten(1, 2) if x.ndim == 4 else x


CASES: Cases = {
    "pflayer": (
        reference_case,
        vit_reference_case,
        pit_reference_case,
    )
}
