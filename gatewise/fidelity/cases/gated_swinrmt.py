"""Digest records of the Gated SwinRMT reference as cases of our networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Tap, unchanged
from gatewise.networks.image.gated_swinrmt import FORMS, GatedSwinRMT, GatedSwinRMTConfig, layouts


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a whole network, in either form or RMT's.

    Options that the record does not state are those of the size that it is named after, or of the base size.
    """
    form, fields = reference_fields(record, GatedSwinRMTConfig)
    if fields is None:
        return None
    size = "tiny" if "tiny" in record["variant"] else "base"
    published = re.match(r"rmt_([tsbl])(_|$)", record["variant"])
    base = registered_config(f"rmt_{published[1]}" if published else f"gated_swinrmt_{size}_{form}")
    if base is None:
        raise LookupError(f"no configuration is registered for {record['variant']}")
    config = replace(base, **fields)
    layout = layouts(config)[0]
    return Case(GatedSwinRMT(config), layout, tap=tap(layout, config.depths))


def tap(layout: KeyLayout, depths: tuple[int, ...]) -> Callable[[str], Tap]:
    """Return a function from a reference path to our tap. There, maps between blocks have their channels last.

    A stage of the reference ends with the downsampling that starts the next stage here.
    """

    def channels_last(output: Tensor) -> Tensor:
        return output.permute(0, 2, 3, 1)

    def path(theirs: str) -> Tap:
        if match := re.fullmatch(r"layers\.(\d+)", theirs):
            stage = int(match[1])
            is_last = stage == len(depths) - 1
            ours = f"stages.{stage}.blocks.{depths[stage] - 1}" if is_last else f"stages.{stage + 1}.downsample"
            return ours, channels_last
        if theirs == "patch_embed":
            return "stem", channels_last
        is_map = re.fullmatch(r"layers\.\d+\.(blocks\.\d+|downsample|blocks\.\d+\.(pos|ffn\.dwconv))", theirs)
        return layout.to_ours(theirs), channels_last if is_map else unchanged

    return path


_RENAMED = {
    "init_values": "decay_inits",
    "heads_ranges": "decay_ranges",
    "chunkwise_recurrents": "decomposed",
    "layerscales": "layer_scales",
    "layer_init_values": "layer_scale_init",
    "projection": "projection_dim",
    "window_size": "window",
    "base_window": "window",
}

_WITHOUT_EFFECT = ("norm_layer", "patch_norm", "use_checkpoint", "use_checkpoints", "img_size")


def reference_fields(record: Mapping[str, Any], target: type[GatedSwinRMTConfig]) -> tuple[str, dict[str, Any] | None]:
    """Return the form that a digest record is about, and fields of our configuration (None if about something else)."""
    reference = dict(record["config"])
    form = reference.pop("variant", "rmt")
    fields = translate_config(reference, target, _RENAMED, _WITHOUT_EFFECT) if form in FORMS else None
    return form, fields


CASES: Cases = {"gated-swinrmt": (reference_case,)}
