"""Names of published FocalNet weights."""

from __future__ import annotations

from gatewise.catalog.keys import KeyLayout, Rule, as_pointwise

_BLOCK_RULES: tuple[Rule, ...] = (
    ("modulation.f", "modulation.project_in"),
    ("modulation.h", "modulation.mix_context"),
    ("modulation.focal_layers.{l}.0", "modulation.levels.{l}"),
    ("modulation.proj", "modulation.project_out"),
)


OFFICIAL = KeyLayout(
    "official",
    (
        ("^patch_embed", "stem"),
        ("^norm{i}", "level_norms.{i}"),
        ("layers.{i}", "stages.{i}"),
        *_BLOCK_RULES,
        ("modulation.ln", "modulation.norm"),
        ("gamma_{k}", "scale{k}"),
    ),
    tensor_to_theirs=as_pointwise(r".*\.modulation\.h\.weight"),
)


def timm_layout(use_postln: bool) -> KeyLayout:
    """timm's names, for norms behind the branches or before them."""
    post = (("norm1_post", "norm1"), ("norm2_post", "norm2")) if use_postln else ()
    return KeyLayout(
        "timm",
        (
            ("layers.{i}", "stages.{i}"),
            ("stages.{i+1}.downsample", "stages.{i}.downsample"),
            ("^head.fc", "head"),
            *_BLOCK_RULES,
            ("ls{k}.gamma", "scale{k}"),
            *post,
        ),
        tensor_to_theirs=as_pointwise(r".*\.(modulation\.(f|h|proj)|mlp\.fc[12])\.weight"),
    )
