"""Digest records of the OverLoCK reference as cases of our networks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.published import translate_config
from gatewise.catalog.registry import registered_config
from gatewise.fidelity.case import Case, Cases, Outputs
from gatewise.layers.dilated_reparam import DilatedReparam, reparam_rules
from gatewise.networks.image.overlock import (
    BRANCHES,
    LARGE,
    MIXING,
    OFFICIAL,
    ContextMixingBlock,
    FocusBlock,
    OverLoCK,
    OverLoCKConfig,
    RepConvBlock,
)
from gatewise.ops.context_mixing import neighborhood_sum_reference, relative_bias


def _from_start(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return the rules for a standalone block."""
    return tuple((f"^{theirs}", f"^{ours}") for theirs, ours in rules)


_MIXING_BLOCK = KeyLayout("official block", (("^block", ""), *_from_start(MIXING)))

_LARGE_BLOCK = KeyLayout("official block", (("^block", ""), *_from_start(LARGE)))

_CONVOLUTION = KeyLayout("official convolution", tuple((theirs[1:], ours[1:]) for theirs, ours in reparam_rules("")))
"""Standalone blocks, and the re-parameterized convolution."""

_RENAMED = {
    "depth": "depths",
    "sub_depth": "focus_depths",
    "embed_dim": "embed_dims",
    "kernel_size": "kernel_sizes",
    "mlp_ratio": "mlp_ratios",
    "sub_num_heads": "focus_num_heads",
    "sub_mlp_ratio": "focus_mlp_ratios",
    "ls_init_value": "layer_scale_inits",
    "res_scale": "scale_identity",
    "smk_size": "small_kernel_size",
    "use_ds": "auxiliary_head",
    "projection": "projection_dim",
    "drop_path": "drop_path_rate",
}

_BLOCK_RENAMED = {
    "smk_size": "small_kernel_size",
    "ls_init_value": "scale_init",
    "res_scale": "scale_identity",
    "drop_path": "drop_path_rate",
}

_WITHOUT_EFFECT = ("use_gemm", "use_checkpoint", "norm_layer", "img_size", "pretrained", "is_last")


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the network, a block or a part of the operator."""
    reference = {key: value for key, value in record["config"].items() if key not in _WITHOUT_EFFECT}
    if "attn" in record["inputs"]:
        return Case(nn.Identity(), OFFICIAL, run=_sum_windows)
    if "rpb" in record["inputs"]:
        return Case(nn.Identity(), OFFICIAL, run=_bias_of_size(reference["H"], reference["W"]))
    if "channels" in reference:
        fields = translate_config(reference, DilatedReparam, {"channels": "dim"})
        return None if fields is None else Case(DilatedReparam(table=BRANCHES, **fields), _CONVOLUTION)
    if "dim" in reference:
        return _block_case(record, reference)
    return _network_case(record, reference)


def _sum_windows(module: nn.Module, kernels: Tensor, values: Tensor) -> Outputs:
    return neighborhood_sum_reference(kernels.softmax(-1), values)


def _bias_of_size(height: int, width: int) -> Callable[[nn.Module, Tensor], Outputs]:
    return lambda module, table: relative_bias(table, height, width)[None]


def _block_case(record: Mapping[str, Any], reference: dict[str, Any]) -> Case | None:
    if "ctx_dim" in reference:
        return _focus_case(record, reference | {"context_dim": reference.pop("ctx_dim") // 4})
    is_mixing = any(key.endswith("rpb1") for key in record["keys"])
    block, layout = (ContextMixingBlock, _MIXING_BLOCK) if is_mixing else (RepConvBlock, _LARGE_BLOCK)
    fields = translate_config(reference, block, _BLOCK_RENAMED)
    return None if fields is None else Case(block(**fields), layout)


def _focus_case(record: Mapping[str, Any], reference: dict[str, Any]) -> Case | None:
    fields = translate_config(reference, FocusBlock, _BLOCK_RENAMED)
    if fields is None:
        return None
    name, is_last = record["variant"], record["config"].get("is_last", False)

    def run(block: nn.Module, x: Tensor) -> Outputs:
        shape = (x.shape[0], fields["context_dim"], *x.shape[2:])
        h, r = (_reference_input(f"{name}:{argument}", shape) for argument in "hr")
        z = block(torch.cat([x, h], dim=1), r)
        return [z] if is_last else list(z.split([x.shape[1], shape[1]], dim=1))

    return Case(FocusBlock(**fields), _MIXING_BLOCK, run=run)


def _reference_input(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the second or third argument of a block, which records name in their notes instead of their inputs."""
    draw = np.random.RandomState(zlib.crc32(f"input:{name}".encode()))
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


def _network_case(record: Mapping[str, Any], reference: dict[str, Any]) -> Case | None:
    dense = any(key.startswith("extra_norm.") for key in record["keys"])
    fields = translate_config(reference, OverLoCKConfig, _RENAMED)
    if fields is None:
        return None
    if dense:
        fields |= {"num_classes": 0, "pyramid_norm": True}
    base = registered_config(record["variant"]) or OverLoCKConfig()
    made = OverLoCK(replace(base, **fields))
    if dense:
        return Case(made, OFFICIAL, run=OverLoCK.forward_pyramid)
    if "aux" in record["outputs"]:
        # The digest was taken from a wrapper around the network.
        layout = replace(OFFICIAL, rules=(("^net", ""), *OFFICIAL.rules))
        return Case(made, layout, run=OverLoCK.forward_with_auxiliary)
    return Case(made, OFFICIAL)


CASES: Cases = {"overlock": (reference_case,)}
