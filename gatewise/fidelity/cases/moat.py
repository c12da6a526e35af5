"""Digest records of the MOAT reference as cases of our networks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.moat import Moat, MoatConfig, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the classification network, or of the endpoints of the network without head."""
    fields = reference_fields(record, MoatConfig)
    if fields is None:
        return None
    published = re.match(r"((?:tiny_)?moat)_?(\d)", record["variant"])
    base = registered_config("_".join(published.groups())) if published else None
    config = replace(base or MoatConfig(), **fields)
    names = list(record["outputs"])

    def endpoints(model: Moat, x: Tensor) -> dict[str, Tensor]:
        found = model.forward_endpoints(x)
        return {name: found[name] for name in names}

    return Case(Moat(config), layouts(config)[0], run=endpoints if config.features_only else Moat.forward)


_RENAMED = {
    "stem_size": "stem_dims",
    "block_type": "block_types",
    "num_blocks": "depths",
    "hidden_size": "embed_dims",
    "stage_stride": "stage_strides",
    "expansion_rate": "expand_ratio",
    "expansion_ratio": "expand_ratio",
    "head_size": "head_dim",
    "window_size": "windows",
    "position_embedding_size": "position_sizes",
    "global_attention_at_end_of_moat_stage": "global_at_end",
    "use_checkpointing_for_attention": "checkpoint_attention",
    "build_classification_head_with_class_num": "num_classes",
}

_WITHOUT_EFFECT = ("survival_prob", "survival_rate", "kernel_initializer", "bias_initializer", "input_shape", "name")


def reference_fields(record: Mapping[str, Any], target: type[MoatConfig]) -> dict[str, Any] | None:
    """Convert a digest record to fields of our configuration; None if the record is about something else.

    Networks without a classification head have pooling windows of 3 unless stated otherwise.
    """
    reference = {key: _with_pairs(value) for key, value in record["config"].items()}
    classes = reference.get("build_classification_head_with_class_num")
    reference |= {"build_classification_head_with_class_num": classes or 0, "features_only": not classes}
    reference.setdefault("pool_size", 2 if classes else 3)
    if "relative_position_embedding_type" in reference:
        reference["relative_position"] = reference.pop("relative_position_embedding_type") is not None
    if "position_embedding_size" in reference:
        sizes = enumerate(reference["position_embedding_size"])
        reference["position_embedding_size"] = [size or _stored_size(record["keys"], stage) for stage, size in sizes]
    return translate_config(reference, target, _RENAMED, _WITHOUT_EFFECT)


def _with_pairs(value: Any) -> Any:
    """Convert lists within a list to tuples, which are windows."""
    return [tuple(entry) if isinstance(entry, list) else entry for entry in value] if isinstance(value, list) else value


def _stored_size(keys: Mapping[str, list[int]], stage: int) -> tuple[int, int] | None:
    """Return the window that a stage's tables are stored for, if the configuration derives it from the input map."""
    shape = keys.get(f"block_{stage:02d}_00.attention.relative_position_embedding")
    return ((shape[1] + 1) // 2, (shape[2] + 1) // 2) if shape is not None else None


CASES: Cases = {"moat": (reference_case,)}
