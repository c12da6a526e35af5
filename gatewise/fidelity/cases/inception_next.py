"""Digest records of the InceptionNeXt reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.inception_next import (
    InceptionDepthwise,
    InceptionNeXt,
    InceptionNeXtConfig,
    PartialConvNeXt,
    PartialConvNeXtConfig,
)
from gatewise.networks.image.inception_next.ablation import OFFICIAL as ABLATION_OFFICIAL
from gatewise.networks.image.inception_next.network import OFFICIAL


def ablation_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the ablation's network."""
    renamed = {"dims": "embed_dims", "kernel_sizes": "kernel_size", "layer_scale_init_value": "layer_scale_init"}
    fields = translate_config(record["config"], PartialConvNeXtConfig, renamed)
    if fields is None or "convnext.py" not in record["source"]:
        return None
    return Case(PartialConvNeXt(PartialConvNeXtConfig(**fields)), ABLATION_OFFICIAL)


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the network, or of only the Inception depthwise convolution."""
    if "in_channels" in record["config"]:
        fields = translate_config(record["config"], InceptionDepthwise, {"in_channels": "dim"})
        prefix = "stages.0.blocks.0.token_mixer."
        return Case(InceptionDepthwise(**fields), OFFICIAL, prefix) if fields is not None else None
    renamed = {"dims": "embed_dims", "ls_init_value": "layer_scale_init"}
    fields = translate_config(record["config"], InceptionNeXtConfig, renamed)
    if fields is None or "convnext.py" in record["source"]:
        return None
    return Case(InceptionNeXt(InceptionNeXtConfig(**fields)), OFFICIAL)


CASES: Cases = {
    "inceptionnext": (
        ablation_case,
        reference_case,
    )
}
