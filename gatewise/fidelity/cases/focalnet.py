"""Digest records of the FocalNet reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.focalnet import OFFICIAL, FocalModulation, FocalNet, FocalNetConfig

_WITHOUT_EFFECT = ("img_size", "pretrain_img_size", "use_layerscale", "use_checkpoint", "frozen_stages", "norm_layer")


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the classification network, a dense-prediction backbone, or only the operator."""
    reference = dict(record["config"])
    if {"focal_level", "focal_window"} <= set(reference):
        return _operator_case(reference)
    renamed = {"layerscale_value": "layer_scale_init"}
    fields = translate_config(reference, FocalNetConfig, renamed, _WITHOUT_EFFECT)
    if fields is None:
        return None
    if "use_layerscale" in reference:
        init = reference.get("layerscale_value", 1e-4)
        fields["layer_scale_init"] = init if reference["use_layerscale"] else None
    if "classification" in record["source"]:
        base = registered_config(record["variant"]) or FocalNetConfig()
        return Case(FocalNet(replace(base, **fields)), OFFICIAL)
    stem_padding = 2 if "DINO" in record["source"] else 3
    config = FocalNetConfig(**{"num_classes": 0, "pyramid_norm": True, "stem_padding": stem_padding} | fields)
    return Case(FocalNet(config), OFFICIAL, run=FocalNet.forward_pyramid)


def _operator_case(reference: Mapping[str, Any]) -> Case | None:
    renamed = {"proj_drop": "drop_rate", "use_postln_in_modulation": "use_postln"}
    fields = translate_config(reference, FocalModulation, renamed, ignored=("bias",))
    prefix = "layers.0.blocks.0.modulation."
    return Case(FocalModulation(**fields), OFFICIAL, prefix) if fields is not None else None


CASES: Cases = {"focalnet": (reference_case,)}
