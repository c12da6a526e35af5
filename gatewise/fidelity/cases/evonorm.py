"""Digest records of the EvoNorm reference as cases of our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.layers.evonorm import EVONORMS
from gatewise.networks.image.evonorm import (
    EvoNormMobile,
    EvoNormMobileConfig,
    EvoNormResNet,
    EvoNormResNetConfig,
    EvoNormVoVNet,
    EvoNormVoVNetConfig,
    regnet,
)
from gatewise.networks.image.evonorm.resnet import layouts
from gatewise.networks.image.evonorm.vovnet import layouts as vovnet_layouts


def vovnet_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of timm's network."""
    reference = dict(record["config"])
    base = registered_config(str(reference.pop("factory", "")))
    fields = translate_config(reference, EvoNormVoVNetConfig)
    if fields is None or not isinstance(base, EvoNormVoVNetConfig):
        return None
    config = replace(base, **fields)
    layout = vovnet_layouts(config)[0]
    last = {f"stages.{stage}": f"stages.{stage}.{depth - 1}" for stage, depth in enumerate(config.depths)}

    def tap(path: str) -> Tap:
        return last.get(path) or layout.to_ours(path), unchanged

    return Case(EvoNormVoVNet(config), layout, tap=tap)


def resnet_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of timm's networks or of one of its layers."""
    reference = dict(record["config"])
    if str(reference.get("cls", "")).startswith("EvoNorm2d"):
        return _layer_case(reference)
    if "factory" in reference:
        base = registered_config(reference.pop("factory"))
        fields = translate_config(reference, EvoNormResNetConfig)
        if fields is None or not isinstance(base, EvoNormResNetConfig):
            return None
        return _network_case(replace(base, **fields))
    if reference.pop("cls", None) != "ResNetV2":
        return None
    norm = norm_of_reference(str(reference.pop("norm_layer", "")))
    deep = reference.pop("stem_type", "") == "deep"
    renamed = {"layers": "depths", "stem_chs": "stem_channels"}
    fields = translate_config(reference, EvoNormResNetConfig, renamed, ignored=("conv_layer",))
    if norm is None or fields is None or not fields.setdefault("preact", True):
        return None
    return _network_case(EvoNormResNetConfig(**fields, deep_stem=deep, **norm))


def _network_case(config: EvoNormResNetConfig) -> Case:
    layout = layouts(config)[0]
    # A stage's output is that of its last block.
    last = {f"stages.{stage}": f"stages.{stage}.{depth - 1}" for stage, depth in enumerate(config.depths)}

    def tap(path: str) -> Tap:
        return last.get(path) or layout.to_ours(path), unchanged

    return Case(EvoNormResNet(config), layout, tap=tap)


def _layer_case(reference: dict[str, Any]) -> Case | None:
    kind = EVONORMS.get(reference.pop("cls").removeprefix("EvoNorm2d"))
    if kind is None:
        return None
    fields = translate_config(reference, kind, {"num_features": "dim", "apply_act": "act"})
    return None if fields is None else Case(kind(**fields), KeyLayout("timm"))


def mobile_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of timm's RegNetZ with EvoNorm."""
    reference = dict(record["config"])
    base = registered_config(str(reference.pop("factory", "")))
    fields = translate_config(reference, EvoNormMobileConfig)
    if fields is None or not isinstance(base, EvoNormMobileConfig):
        return None
    config = replace(base, **fields)
    layout = regnet(config)
    special = {"stem": f"stem.{2 if config.tiered_stem else 0}"}
    special |= {f"stages.{row}": f"stages.{row}.{repeats - 1}" for row, repeats in enumerate(config.repeats)}

    def tap(path: str) -> Tap:
        return special.get(path) or layout.to_ours(path), unchanged

    return Case(EvoNormMobile(config), layout, tap=tap)


def norm_of_reference(text: str) -> dict[str, Any] | None:
    """Convert a timm layer's description, such as "EvoNorm2dS0 (32 groups, eps 1e-5)", to fields of our config."""
    name = re.match(r"EvoNorm2d(\w+)", text)
    if name is None or name[1] not in EVONORMS:
        return None
    numbers: dict[str, Any] = {
        "norm_groups": (int, r"(\d+) groups"),
        "norm_group_size": (int, r"group.size[ =](\d+)"),
        "norm_eps": (float, r"eps[ =]([\d.e+-]+)"),
    }
    found = {field: (kind, re.search(pattern, text)) for field, (kind, pattern) in numbers.items()}
    return {"norm_layer": name[1]} | {field: kind(match[1]) for field, (kind, match) in found.items() if match}


CASES: Cases = {
    "evonorm": (
        vovnet_case,
        resnet_case,
        mobile_case,
    )
}
