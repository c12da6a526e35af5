"""Digest records of the ConvFirst reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.convfirst import BLOCKS, MEMBERS, BenchmarkStage, below

_RENAMED = {"in_channels": "in_dim", "out_channels": "dim", "expansion_ratio": "expand_ratio", "num_channels": "dim"}


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a block, or of the stage that the published code measures."""
    reference = dict(record["config"])
    kind = reference.pop("class", None)
    reference["activation"] = str(reference.get("activation", "SiLU")).lower()
    if kind == "StackedBlocks":
        block = str(reference.pop("block", "ConvFirst")).lower()
        fields = translate_config(reference, BenchmarkStage, _RENAMED)
        if fields is None or block not in BLOCKS:
            return None
        rules = [*below("pre.{i}", "mlp"), *below("blocks.{i}", block), *below("post.{i}", "mlp")]
        return Case(BenchmarkStage(**fields, block=block), KeyLayout("official", tuple(rules)))
    name = str(kind).lower()
    if name not in BLOCKS:
        return None
    fields = translate_config(reference, BLOCKS[name], _RENAMED)
    return None if fields is None else Case(BLOCKS[name](**fields), KeyLayout("official", MEMBERS[name]))


CASES: Cases = {"convfirst": (reference_case,)}
