"""Mapping from the published harness: names of the weights and options of its decoder and mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatewise.catalog.keys import KeyLayout, Rule

if TYPE_CHECKING:
    from gatewise.networks.sequence.zoology.network import ZoologyConfig


@dataclass(frozen=True)
class Published:
    """Correspondence of a mixer of the harness to ours.

    Args:
        mixer: our name of the mixer.
        renamed: mapping from their option to our field.
        fixed: options for which we support a single value, with that value.
        ignored: options that do not affect the result.
    """

    mixer: str
    renamed: Mapping[str, str]
    fixed: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


_SKELETON: tuple[Rule, ...] = (
    ("embeddings.word_embeddings", "embedding"),
    ("embeddings.position_embeddings", "positions"),
    ("ln_f", "norm"),
    ("layers.{i}", "blocks.{i}"),
)
_RULES: dict[str, tuple[Rule, ...]] = {
    "attention": (("Wqkv", "qkv"),),
    "sliding": (("Wqkv", "qkv"),),
    "base_conv": (
        # The filter is a tensor if its taps are parameters; this rule comes before those that build paths with it.
        ("conv.filter", "long_conv.filter.taps"),
        ("conv.pos_emb.z", "long_conv.filter.positions"),
        ("conv.mlp", "long_conv.filter.mlp"),
        ("conv.conv", "short_conv"),
    ),
    "h3": (
        ("ssm_k_kernel.kernel", "shift"),
        ("kernel.kernel", "diagonal"),
        ("ssm_k_D", "shift_skip"),
        ("D", "diagonal_skip"),
        ("output_linear", "o_proj"),
    ),
    "based": (("proj_q", "q_proj"), ("proj_k", "k_proj"), ("proj_v", "v_proj"), ("proj_o", "o_proj")),
    "mamba": (("conv1d", "conv"), ("dt_proj.bias", "dt_bias")),
    "retnet": (("g_proj", "gate_proj"), ("g_norm_swish_gate", "norm")),
    "gla": (("g_proj", "gate_proj"), ("gk_proj", "decay"), ("g_norm_swish_gate", "norm")),
}


def reference_layout(config: ZoologyConfig) -> KeyLayout:
    """Return the harness's layout. Mixer rules are tied to a layer, as two mixers may use one name differently."""
    # A wrapper's prefix "backbone." may have been stripped; the long form is written.
    rules: list[Rule] = [
        (f"^{prefix}{theirs}", f"^{ours}") for prefix in ("", "backbone.") for theirs, ours in _SKELETON
    ]
    rules += [("^lm_head", "^head"), ("norm1", "mixer_norm"), ("norm2", "state_norm")]
    if config.state_mixer == "none":
        rules.append(("blocks.{i}.norm", "blocks.{i}.mixer_norm"))
    # A hybrid wraps its mixers once more. Both forms are read if all mixers are of one kind.
    rules.append(("sequence_mixer.mixer", "mixer"))
    if len(config.pattern) == 1:
        rules.append(("sequence_mixer", "mixer"))
    for layer, name in enumerate(config.layer_mixers):
        prefix = f"blocks.{layer}.mixer"
        published = _hyena_rules(config.filter_layers) if name == "hyena" else _RULES.get(name, ())
        rules += [(f"{prefix}.{theirs}", f"{prefix}.{ours}") for theirs, ours in published]
    return KeyLayout("official", tuple(rules), dropped="|".join(_dropped(config)))


def _dropped(config: ZoologyConfig) -> list[str]:
    """Return patterns of computed tensors and of duplicates: the tied projection and the shared sine."""
    dropped = [r".*\.pos_emb\.t", r".*\.modulation\.deltas"]
    if config.tie_embeddings:
        dropped.append(r"lm_head\.weight")
    return dropped + [rf".*\.implicit_filter\.{2 * i + 1}\.freq" for i in range(1, config.filter_layers + 1)]


def _hyena_rules(inner_layers: int) -> tuple[Rule, ...]:
    """Return rules for a filter's MLP: linear layers at even places, one shared sine at odd places."""
    return (
        ("short_filter", "short_conv"),
        ("filter_fn.pos_emb.z", "filter.positions"),
        ("filter_fn.bias", "filter.bias"),
        ("filter_fn.implicit_filter.1.freq", "filter.frequency"),
        *((f"filter_fn.implicit_filter.{2 * i}", f"filter.linears.{i}") for i in range(inner_layers + 2)),
    )
