"""Digest records of the Activator reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.fidelity.cases._patches import patch_case
from gatewise.networks.image.activator import OFFICIAL, Activator, ActivatorBlock, ActivatorConfig, GatingUnit

_BLOCK = {"d_model": "dim", "d_ffn": "hidden_dim", "dropout": "drop_rate"}


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a network, of a gating unit, or of a block on tokens."""
    config = {key: value for key, value in record["config"].items() if key != "what"}
    unit = translate_config(config, GatingUnit)
    if unit is not None:
        return Case(GatingUnit(**unit), OFFICIAL)
    if "in_channels" not in config and "d_model" in config:
        mlp = config.pop("block", "full") == "full"
        block = translate_config(config, ActivatorBlock, _BLOCK, ignored=("num_layers",))
        return None if block is None else Case(ActivatorBlock(**block, mlp=mlp), OFFICIAL)
    return patch_case({**record, "config": config}, Activator, ActivatorConfig, OFFICIAL, {})


CASES: Cases = {"activator": (reference_case,)}
