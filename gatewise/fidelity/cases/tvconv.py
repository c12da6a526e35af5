"""Digest records of the TVConv reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.layers.tvconv import TVConv, TVConvInvertedResidual, TVConvOptions
from gatewise.networks.dense.tvconv_deeplab import ATOMS, LOW_LEVEL, TVConvDeepLabConfig, TVConvDeepLabV3Plus, layouts
from gatewise.networks.image.tvconv import (
    ShuffleUnit,
    TVConvMobileNetV2,
    TVConvShuffleNetV2,
    block_rules,
    layout,
    mobilenet_layouts,
    operator_rules,
    shufflenet_layouts,
    unit_rules,
)


def deeplab_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the segmentation network."""
    given = dict(record.get("config", {}))
    base: Any = registered_config("tvconv_deeplabv3plus")
    atom = ATOMS.get(str(given.get("atom", "base")).lower())
    if given.get("factory") != "deeplabv3plus_mobilenet" or base is None or atom is None:
        return None
    operator = read_options(given, SEGMENTATION_DEFAULTS)
    shape = {name: given[name] for name in ("num_classes", "output_stride") if name in given}
    size = tuple(next(iter(record["inputs"].values()))["shape"][2:])
    config = replace(base, atom=atom, operator=operator, input_size=size, **shape)
    chosen = layouts(config)[0]
    return Case(TVConvDeepLabV3Plus(config), chosen, tap=lambda path: _tap(config, chosen, path))


def _tap(config: TVConvDeepLabConfig, chosen: KeyLayout, path: str) -> Tap:
    # The output of one of their parts is that of the last of its modules here.
    special = {
        "backbone.low_level_features": f"stages.{LOW_LEVEL - 1}",
        "backbone.high_level_features": f"stages.{len(config.backbone.rows) - 1}",
        "classifier": "head",
    }
    return special.get(path) or chosen.to_ours(path), unchanged


_OPTIONS = {
    "TVConv_k": "kernel_size",
    "TVConv_posi_chans": "affinity_channels",
    "TVConv_inter_chans": "hidden",
    "TVConv_inter_layers": "hidden_layers",
    "TVConv_Bias": "bias",
}

_FACE_DEFAULTS = TVConvOptions(hidden=16, hidden_layers=1)

SEGMENTATION_DEFAULTS = TVConvOptions(hidden=64, hidden_layers=3)
"""Defaults of the published operators; both training scripts request the latter."""


def mobilenet_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a MobileNetV2 for faces, of its block, or of the operator."""
    reference = dict(record.get("config", {}))
    if "channels" in reference and "h" in reference:
        return _operator_case(reference, _defaults(record))
    if "InvertedResidual" in str(reference.get("cls")) and "shufflenet" not in record["source"].lower():
        return _block_case(reference, _defaults(record)) if "dilation" not in reference else None
    config = _face_config(reference, "mobilenet_v2")
    return None if config is None else Case(TVConvMobileNetV2(config), mobilenet_layouts(config)[0])


def shufflenet_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a ShuffleNetV2 for faces, or of its unit."""
    reference = dict(record.get("config", {}))
    if "InvertedResidual" in str(reference.get("cls")) and "shufflenet" in record["source"].lower():
        options, size = read_options(reference, _defaults(record)), _size(reference.get("h_w", 1))
        operator = options if _is_tvconv(reference) else None
        unit = ShuffleUnit(reference["inp"], reference["oup"], reference["stride"], operator, size)
        return Case(unit, KeyLayout("official part", (*unit_rules(""), *operator_rules(options))))
    config = _face_config(reference, "shufflenet_v2")
    return None if config is None else Case(TVConvShuffleNetV2(config), shufflenet_layouts(config)[0])


def _face_config(reference: dict[str, Any], family: str) -> Any:
    base: Any = registered_config(f"tvconv_{reference.get('factory')}")
    if base is None or not str(reference["factory"]).startswith(family):
        return None
    options = read_options(reference, _FACE_DEFAULTS) if _is_tvconv(reference) else None
    fields: dict[str, Any] = {"operator": options}
    if "input_size" in reference:
        fields["input_size"] = _size(reference["input_size"])
    if "drop_ratio" in reference:
        fields["drop_rate"] = reference["drop_ratio"]
    return replace(base, **fields)


def _operator_case(reference: dict[str, Any], defaults: TVConvOptions) -> Case:
    options = read_options(reference, defaults)
    operator = TVConv(reference["channels"], (reference["h"], reference["w"]), reference.get("stride", 1), options)
    return Case(operator, layout("official part", operator_rules(options), lambda: operator))


def _block_case(reference: dict[str, Any], defaults: TVConvOptions) -> Case:
    options, expand = read_options(reference, defaults), reference["expand_ratio"]
    shape = reference["inp"], reference["oup"], reference["stride"], expand
    block = (
        TVConvInvertedResidual(*shape, _size(reference["h_w"]), options)
        if _is_tvconv(reference)
        else InvertedResidual(*shape)
    )
    rules = [*block_rules("", expand != 1), *operator_rules(options)]
    return Case(block, KeyLayout("official part", tuple(rules)))


def read_options(reference: Mapping[str, Any], defaults: TVConvOptions) -> TVConvOptions:
    """Return the arguments of the published operator, with those that are not given taken from `defaults`."""
    return replace(defaults, **{ours: reference[theirs] for theirs, ours in _OPTIONS.items() if theirs in reference})


def _defaults(record: Mapping[str, Any]) -> TVConvOptions:
    return SEGMENTATION_DEFAULTS if "od_oc_segmentation" in record["source"] else _FACE_DEFAULTS


def _is_tvconv(reference: Mapping[str, Any]) -> bool:
    return "tvconv" in str(reference.get("atom", reference.get("cls"))).lower()


def _size(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


CASES: Cases = {
    "tvconv": (
        mobilenet_case,
        shufflenet_case,
        deeplab_case,
    )
}
