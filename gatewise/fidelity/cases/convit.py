"""Digest records of the ConViT reference as cases of our networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.fidelity.case import Case, Cases
from gatewise.networks.image.convit import Convit, ConvitConfig, GatedPositionalSelfAttention, layouts

_RENAMED = {"img_size": "image_size", "attn_drop": "attn_drop_rate"}


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of a whole network, or of one layer that starts local, on a square grid."""
    layer = translate_config(record["config"], GatedPositionalSelfAttention)
    if layer is not None:
        return Case(GatedPositionalSelfAttention(**layer), KeyLayout("official"), run=_run_local)
    fields = translate_config(record["config"], ConvitConfig, _RENAMED)
    if fields is None:
        return None
    config = ConvitConfig(**fields)
    return Case(Convit(config), layouts(config)[0])


def _run_local(layer: GatedPositionalSelfAttention, tokens: Tensor) -> dict[str, Tensor]:
    """Return attention and output of a layer whose gates, queries, keys and projection are filled, the rest initial."""
    gates = layer.gating_param.detach().clone()
    layer.start_local()
    with torch.no_grad():
        layer.gating_param.copy_(gates)
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(1, (side, side))
    return {"attention": layer.attention(x), "output": layer(x).flatten(1, 2)}


CASES: Cases = {"convit": (reference_case,)}
