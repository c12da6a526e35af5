"""Digest records of the gated attention reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gatewise.fidelity.case import Case, Cases
from gatewise.networks.sequence.gated_attention import (
    GatedAttention,
    GatedAttentionConfig,
    GatedAttentionDecoder,
    layouts,
    translated,
)


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the language model, of one block or of one attention layer."""
    fields = translated(record["config"], GatedAttentionConfig)
    if fields is None:
        return None
    config = GatedAttentionConfig(**{"tie_embeddings": False} | fields)
    official = layouts(config)[0]
    if any(spec.get("kind") == "int" for spec in record["inputs"].values()):
        return Case(GatedAttentionDecoder(config), official, run=_logits_and_last_weights)
    if "input_layernorm.weight" in record["keys"]:
        block = GatedAttentionDecoder(replace(config, vocab_size=1, depth=1)).blocks[0]
        return Case(block, official, "model.layers.0.", run=lambda block, x: block(x, None, None)[0])
    return Case(
        GatedAttention(config),
        official,
        "model.layers.0.self_attn.",
        run=lambda layer, x: [layer(x)[0], layer.attention_weights(x)][: len(record["outputs"])],
    )


def _logits_and_last_weights(model: GatedAttentionDecoder, tokens: Tensor) -> dict[str, Tensor]:
    """Return logits, and the attention probabilities of the last layer (B, heads, T, T)."""
    mixer = model.blocks[-1].mixer
    weights: list[Tensor] = []
    handle = mixer.register_forward_pre_hook(lambda mixer, inputs: weights.append(mixer.attention_weights(inputs[0])))
    try:
        logits = model(tokens)
    finally:
        handle.remove()
    return {"logits": logits, "attention_last_layer": weights[0]}


CASES: Cases = {"gated-attention": (reference_case,)}
