"""How the published harness names the weights and the options of its decoder and mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gatewise.catalog.keys import KeyLayout, Rule

if TYPE_CHECKING:
    from gatewise.networks.sequence.zoology.network import ZoologyConfig


@dataclass(frozen=True)
class Published:
    """A mixer of the harness in our terms.

    Args:
        mixer: our name.
        renamed: their option -> our field.
        fixed: their options that we have one value for, and that value.
        ignored: their options that change nothing in what is computed.
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
        # The filter is a tensor where its taps are parameters; this rule comes before those that make paths with it.
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
    """The harness's names. Rules about a mixer are tied to its layer: two mixers may call different things alike."""
    # A wrapper's prefix "backbone." may have been peeled; written is the long form.
    rules: list[Rule] = [
        (f"^{prefix}{theirs}", f"^{ours}") for prefix in ("", "backbone.") for theirs, ours in _SKELETON
    ]
    rules += [("^lm_head", "^head"), ("norm1", "mixer_norm"), ("norm2", "state_norm")]
    if config.state_mixer == "none":
        rules.append(("blocks.{i}.norm", "blocks.{i}.mixer_norm"))
    # A hybrid wraps its mixers once more. Both forms are read where the mixers are all of a kind.
    rules.append(("sequence_mixer.mixer", "mixer"))
    if len(config.pattern) == 1:
        rules.append(("sequence_mixer", "mixer"))
    for layer, name in enumerate(config.layer_mixers):
        prefix = f"blocks.{layer}.mixer"
        published = _hyena_rules(config.filter_layers) if name == "hyena" else _RULES.get(name, ())
        rules += [(f"{prefix}.{theirs}", f"{prefix}.{ours}") for theirs, ours in published]
    return KeyLayout("official", tuple(rules), dropped="|".join(_dropped(config)))


def _dropped(config: ZoologyConfig) -> list[str]:
    """What is computed, and what is stored once more under each of its names: the tied projection, the shared sine."""
    dropped = [r".*\.pos_emb\.t", r".*\.modulation\.deltas"]
    if config.tie_embeddings:
        dropped.append(r"lm_head\.weight")
    return dropped + [rf".*\.implicit_filter\.{2 * i + 1}\.freq" for i in range(1, config.filter_layers + 1)]


def _hyena_rules(inner_layers: int) -> tuple[Rule, ...]:
    """The perceptron of a filter alternates maps (even places) with one shared sine (odd places)."""
    return (
        ("short_filter", "short_conv"),
        ("filter_fn.pos_emb.z", "filter.positions"),
        ("filter_fn.bias", "filter.bias"),
        ("filter_fn.implicit_filter.1.freq", "filter.frequency"),
        *((f"filter_fn.implicit_filter.{2 * i}", f"filter.linears.{i}") for i in range(inner_layers + 2)),
    )
