"""Names of published HorNet weights, and the published constructors' arguments in our terms."""

from __future__ import annotations

from gatewise.catalog.keys import KeyLayout, Rule

GNCONV_RULES: tuple[Rule, ...] = (
    ("proj_in", "project_in"),
    ("proj_out", "project_out"),
    ("pws.{m}", "widen.{m}"),
    ("dwconv", "spatial"),
    ("spatial.dw", "spatial.local"),
    ("spatial.complex_weight", "spatial.spectrum"),
)

OFFICIAL = KeyLayout(
    "official",
    (
        ("^downsample_layers.0", "stem"),
        ("^stem.0", "stem.conv"),
        ("^stem.1", "stem.norm"),
        ("^downsample_layers.{i}", "stages.{i}.downsample"),
        ("downsample.0", "downsample.norm"),
        ("downsample.1", "downsample.conv"),
        ("^norm{i}", "level_norms.{i}"),
        ("^stages.{i}.{j}", "stages.{i}.blocks.{j}"),
        ("blocks.{j}.gamma{k}", "blocks.{j}.scale{k}"),
        ("blocks.{j}.pwconv{k}", "blocks.{j}.mlp.fc{k}"),
        *GNCONV_RULES,
    ),
)
"""Classification and dense prediction alike."""
