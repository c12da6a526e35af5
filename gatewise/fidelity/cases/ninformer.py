"""Digest records of the NiNformer reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.fidelity.cases._patches import patch_case
from gatewise.networks.image.ninformer import OFFICIAL, Ninformer, NinformerBlock, NinformerConfig

_BLOCK = {"d_model": "dim", "d_ffn": "hidden_dim", "seq_len": "num_tokens", "dropout": "drop_rate"}


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a network, or of one block on tokens."""
    config = {key: value for key, value in record["config"].items() if key != "what"}
    block = translate_config(config, NinformerBlock, _BLOCK)
    if block is not None:
        return Case(NinformerBlock(**block), OFFICIAL)
    return patch_case({**record, "config": config}, Ninformer, NinformerConfig, OFFICIAL, {"seq_len": "num_tokens"})


CASES: Cases = {"ninformer": (reference_case,)}
