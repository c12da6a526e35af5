"""Digest records of the AutoNeural's MobileNetV5 reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.mobilenetv5 import MobileNetV5, MobileNetV5Config, layouts

_RENAMED = {
    "arch_def": "blocks",
    "stem_size": "stem_dim",
    "num_features": "fused_dim",
    "msfa_indices": "fused_stages",
    "msfa_output_resolution": "grid_size",
}

_FIXED = ("pad_type", "fix_stem", "norm", "act", "layer_scale_init_value", "class")


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the encoder's fused grid."""
    reference = dict(record["config"])
    base = registered_config(reference.pop("model", "mobilenetv5_300m_enc"))
    if "arch_def" in reference:
        reference["arch_def"] = tuple(tuple(stage) for stage in reference["arch_def"])
    fields = translate_config(reference, MobileNetV5Config, _RENAMED, ignored=_FIXED)
    if not isinstance(base, MobileNetV5Config) or not fields:
        return None
    network = MobileNetV5(replace(base, **fields))
    return Case(network, layouts(network.config)[0], run=lambda module, x: module.forward_features(x))


CASES: Cases = {"autoneural": (reference_case,)}
