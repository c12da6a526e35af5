"""Key layout of the published OverLoCK weights."""

from __future__ import annotations

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.layers.dilated_reparam import reparam_rules

_MLP = ("expand", "", "depthwise", "grn", "project")


def _unit(theirs: str, ours: str, first: int = 0) -> tuple[Rule, ...]:
    """Return rules for a convolution and a norm, numbered from `first`."""
    return (f"{theirs}.{first}", f"{ours}.conv"), (f"{theirs}.{first + 1}", f"{ours}.norm")


MIXING: tuple[Rule, ...] = (
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
"""Rules within a block with context mixing."""

LARGE: tuple[Rule, ...] = (
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
"""Rules within a block of Base-Net and Overview-Net."""


def _within(place: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Restrict rules to modules under `place`."""
    return tuple((f"^{place}.{theirs}", f"^{place}.{ours}") for theirs, ours in rules)


# Covers both the training and the merged form: parts that a form lacks have no keys.
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
        *_within("stages.{i}.blocks.{j}", LARGE),
        ("^sub_blocks{i+3}.{j}", "^focus.{i}.blocks.{j}"),
        *_within("focus.{i}.blocks.{j}", MIXING),
    ),
)
"""Layout for both classification and dense prediction."""
