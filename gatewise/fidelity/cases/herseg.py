"""Digest records of the HER-Seg reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.herseg import ATTENTION, CEEncoder, CEEncoderConfig, DualGatedAttention, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the encoder (its tokens, in one sequence) or of dual-gated attention."""
    reference = dict(record["config"])
    if "input_resolution" in reference:
        # A worked example with its full outputs is not a digest.
        digests = all(isinstance(stored, Mapping) for stored in record["outputs"].values())
        return attention_case(reference) if digests else None
    if reference.pop("module", None) != "LGViT":
        return None
    fields = translate_config(
        reference, CEEncoderConfig, {"img_size": "", "drop_path": "drop_path_rate"}, ("img_size",)
    )
    if fields is None:
        return None
    network = CEEncoder(CEEncoderConfig(**fields))
    return Case(network, layouts(network.config)[0], run=lambda module, x: _row(module.forward_features(x)))


def _row(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def attention_case(reference: Mapping[str, Any]) -> Case | None:
    """Return a case for dual-gated attention on tokens in one sequence, from the published code's arguments."""
    fields = translate_config(reference, DualGatedAttention, ignored=("input_resolution",))
    if fields is None:
        return None
    size = tuple(reference["input_resolution"])

    def run(attention: nn.Module, tokens: Tensor) -> Tensor:
        return attention(tokens.unflatten(1, size)).flatten(1, 2)

    return Case(DualGatedAttention(**fields), KeyLayout("official", ATTENTION), run=run)


CASES: Cases = {"herseg": (reference_case,)}
