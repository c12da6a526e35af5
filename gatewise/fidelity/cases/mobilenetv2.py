"""Digest records of the MobileNetV2 reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.networks.image.mobilenetv2 import MobileNetV2, MobileNetV2Config, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of torchvision's network or block, or of timm's network or feature extractor."""
    reference = dict(record["config"])
    if reference.get("cls") == "InvertedResidual":
        return _block_case(reference)
    if "factory" in reference:
        return _timm_case(reference)
    renamed = {"inverted_residual_setting": "rows", "round_nearest": "channel_divisor", "dropout": "drop_rate"}
    fields = translate_config(reference, MobileNetV2Config, renamed)
    if fields is None or "torchvision" not in record["source"] or {"padding", "output_stride"} & set(reference):
        return None
    if "rows" in fields:
        fields["rows"] = tuple(tuple(row) for row in fields["rows"])
    config = MobileNetV2Config(**fields)
    return Case(MobileNetV2(config), layouts(config)[0])


def _block_case(reference: dict[str, Any]) -> Case:
    fields = {"inp": "in_dim", "oup": "dim", "stride": "stride", "expand_ratio": "expand_ratio"}
    block = InvertedResidual(**{ours: reference[theirs] for theirs, ours in fields.items()})
    row = (reference["expand_ratio"], reference["oup"], 1, reference["stride"])
    return Case(block, layouts(MobileNetV2Config(rows=(row,)))[0], prefix="features.1.")


def _timm_case(reference: dict[str, Any]) -> Case | None:
    base = registered_config(reference.pop("factory"))
    features_only = reference.pop("features_only", False)
    fields = translate_config(reference, MobileNetV2Config)
    if base is None or fields is None:
        return None
    if features_only:
        levels = fields.pop("out_indices", tuple(range(len(base.level_rows))))
        fields |= {"num_classes": 0, "features_only": True, "out_indices": levels}
    config = replace(base, **fields)
    run = MobileNetV2.forward_pyramid if features_only else MobileNetV2.forward
    return Case(MobileNetV2(config), layouts(config)[1], run=run, tap=_timm_tap(config))


def _timm_tap(config: MobileNetV2Config) -> Callable[[str], Tap]:
    layout = layouts(config)[1]
    # timm's norm layers include the activation; a stage's output is that of its last block.
    special = {"bn1": "stem", "bn2": "head_conv"}
    special |= {f"blocks.{row}": f"stages.{row}.{repeats - 1}" for row, repeats in enumerate(config.repeats)}
    return lambda path: (special.get(path) or layout.to_ours(path), unchanged)


CASES: Cases = {"mobilenetv2": (reference_case,)}
