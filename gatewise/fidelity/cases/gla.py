"""Digest records of the gated linear attention reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.sequence.gla import GLA, GatedLinearAttention, GLAConfig, layouts

_RENAMED = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "tie_word_embeddings": "tie_embeddings",
    "intermediate_size": "hidden_dim",
    "use_output_gate": "output_gate",
    "gate_logit_normalizer": "gate_divisor",
    "gate_low_rank_dim": "gate_rank",
    "conv_size": "conv_width",
}

_WITHOUT_EFFECT = (
    "use_short_conv",
    "hidden_ratio",
    "mode",
    "attn_mode",
    "hidden_act",
    "fuse_norm",
    "fuse_swiglu",
    "fuse_cross_entropy",
    "layer_idx",
    "max_position_embeddings",
    "use_cache",
    "initializer_range",
)


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the language model or of one layer."""
    reference = dict(record["config"])
    fields = translate_config(reference, GLAConfig, _RENAMED, _WITHOUT_EFFECT)
    if fields is None:
        return None
    fields["conv_width"] = fields.get("conv_width", 4) if reference.get("use_short_conv") else None
    fields["feature_map"] = fields.get("feature_map") or "identity"
    if "vocab_size" in reference:
        config = GLAConfig(**{"tie_embeddings": False} | fields)
        return Case(GLA(config), layouts(config)[0])
    # A standalone layer has another default than the layer in a model.
    config = GLAConfig(**{"norm_eps": 1e-5} | fields)
    return Case(
        GatedLinearAttention(config), layouts(config)[0], "model.layers.0.attn.", run=lambda layer, x: layer(x)[0]
    )


CASES: Cases = {"gla": (reference_case,)}
