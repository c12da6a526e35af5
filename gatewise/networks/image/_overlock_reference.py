"""Names of published OverLoCK weights, and the published constructors' arguments in our terms."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.reference import Case, Outputs, translate_config
from gatewise.catalog.registry import registered_config
from gatewise.layers.dilated_reparam import DilatedReparam, reparam_rules
from gatewise.networks.image.overlock_blocks import BRANCHES, ContextMixingBlock, FocusBlock, RepConvBlock
from gatewise.ops.context_mixing import neighbourhood_sum_reference, relative_bias

_MLP = ("expand", "", "depthwise", "grn", "project")


def _unit(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    """A convolution and a norm, numbered from `first` on."""
    return (f"{theirs}.{first}", f"{ours}.conv"), (f"{theirs}.{first + 1}", f"{ours}.norm")


_MIXING: tuple[Rule, ...] = (
    ("rpb1", "mixing.mixer.small_table"),
    ("rpb2", "mixing.mixer.large_table"),
    *_unit("weight_query", "mixing.mixer.query"),
    *_unit("weight_key", "mixing.mixer.key", 1),
    *_unit("weight_value", "mixing.mixer.value"),
    ("weight_proj", "mixing.mixer.kernels"),
    *_unit("fusion_proj", "mixing.mixed"),
    *_unit("dyconv_proj", "mixing.mixed"),
    ("lepe.0", "mixing.local"),
    *reparam_rules("mixing.local"),
    ("lepe.1", "mixing.local_norm"),
    ("se_layer.proj.1", "mixing.se.reduce"),
    ("se_layer.proj.3", "mixing.se.expand"),
    *_unit("gate", "mixing.gate"),
    ("proj.0", "mixing.norm"),
    ("proj.1", "mixing.project"),
    ("x_scale", "kept_scale"),
    ("h_scale", "overview_scale"),
    ("dwconv1", "depthwise"),
    ("norm1", "norm"),
    ("fusion.0", "fusion.depthwise"),
    ("fusion.1", "fusion.norm"),
    ("fusion.3", "fusion.project"),
    ("fusion.4", "fusion.grn"),
    ("ls1", "refine.residual1.affine"),
    ("ls2", "refine.residual2.affine"),
    ("dwconv2", "refine.depthwise"),
    ("norm2", "refine.norm"),
    *((f"mlp.{n}", f"refine.mlp.{name}") for n, name in enumerate(_MLP) if name),
    *((f"{place}.gamma", f"{place}.weight") for place in ("fusion.grn", "refine.mlp.grn")),
    *((f"{place}.beta", f"{place}.bias") for place in ("fusion.grn", "refine.mlp.grn")),
)
"""Within a block with context mixing."""

_LARGE: tuple[Rule, ...] = (
    ("proj.0", "norm"),
    ("proj.1", "large"),
    *reparam_rules("large"),
    ("proj.2", "large_norm"),
    ("proj.3.proj.1", "se.reduce"),
    ("proj.3.proj.3", "se.expand"),
    *((f"proj.{4 + n + (n > 0)}", f"mlp.{name}") for n, name in enumerate(filter(None, _MLP))),
    ("mlp.grn.gamma", "mlp.grn.weight"),
    ("mlp.grn.beta", "mlp.grn.bias"),
    ("dwconv", "depthwise"),
    ("ls", "residual.affine"),
)
"""Within a block of Base-Net and Overview-Net."""


def _within(place: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules for what stands in one kind of place alone."""
    return tuple((f"^{place}.{theirs}", f"^{place}.{ours}") for theirs, ours in rules)


def _from_start(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Rules for a block by itself."""
    return tuple((f"^{theirs}", f"^{ours}") for theirs, ours in rules)


# Training and merged form alike: what a form lacks has no keys.
OFFICIAL = KeyLayout(
    "official",
    (
        *(rule for n in range(4) for rule in _unit("^patch_embed1", f"^stem.{n}", 3 * n)),
        *_unit("^patch_embed{i+1}", "^stages.{i}.downsample"),
        *_unit("^patch_embedx.x_proj", "^focus.1.downsample.features"),
        *_unit("^patch_embedx.h_proj", "^focus.1.downsample.context"),
        ("^high_level_proj", "^context"),
        ("^extra_norm.{i}", "^level_norms.{i}"),
        ("^aux_head.0", "^auxiliary.norm"),
        ("^aux_head.2", "^auxiliary.classifier"),
        *_unit("^head", "^project"),
        ("^head.4", "^head"),
        ("^blocks{i+1}.{j}", "^stages.{i}.blocks.{j}"),
        *_within("stages.{i}.blocks.{j}", _LARGE),
        ("^sub_blocks{i+3}.{j}", "^focus.{i}.blocks.{j}"),
        *_within("focus.{i}.blocks.{j}", _MIXING),
    ),
)
"""Classification and dense prediction alike."""

_MIXING_BLOCK = KeyLayout("official block", (("^block", ""), *_from_start(_MIXING)))
_LARGE_BLOCK = KeyLayout("official block", (("^block", ""), *_from_start(_LARGE)))
_CONVOLUTION = KeyLayout("official convolution", tuple((theirs[1:], ours[1:]) for theirs, ours in reparam_rules("")))
"""Blocks, and the re-parameterised convolution, by themselves."""

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


def reference_case(network: type[Any], config: type[Any]) -> Callable[[Mapping[str, Any]], Case | None]:
    """What turns a digest record of the network, a block or a part of the operator into a case."""

    def case(record: Mapping[str, Any]) -> Case | None:
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
        return _network_case(record, reference, network, config)

    return case


def _sum_windows(module: nn.Module, kernels: Tensor, values: Tensor) -> Outputs:
    return neighbourhood_sum_reference(kernels.softmax(-1), values)


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
    """The second and third arguments of a block, which records name in their notes and not among their inputs."""
    draw = np.random.RandomState(zlib.crc32(f"input:{name}".encode()))
    return torch.from_numpy(draw.standard_normal(shape).astype(np.float32))


def _network_case(
    record: Mapping[str, Any], reference: dict[str, Any], network: type[Any], config: type[Any]
) -> Case | None:
    dense = any(key.startswith("extra_norm.") for key in record["keys"])
    fields = translate_config(reference, config, _RENAMED)
    if fields is None:
        return None
    if dense:
        fields |= {"num_classes": 0, "pyramid_norm": True}
    base = registered_config(record["variant"]) or config()
    made = network(replace(base, **fields))
    if dense:
        return Case(made, OFFICIAL, run=network.forward_pyramid)
    if "aux" in record["outputs"]:
        # The digest is of a wrapper around the network.
        layout = replace(OFFICIAL, rules=(("^net", ""), *OFFICIAL.rules))
        return Case(made, layout, run=network.forward_with_auxiliary)
    return Case(made, OFFICIAL)
