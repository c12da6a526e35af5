"""How the published harness names the weights and the options of its decoder and mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from gatewise.catalog.keys import KeyLayout, Rule

if TYPE_CHECKING:
    from gatewise.networks.sequence.zoology import ZoologyConfig


@dataclass(frozen=True)
class _Published:
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


_PUBLISHED = {
    "MHA": _Published("attention", {"num_heads": "num_heads", "dropout": "attention_dropout"}, {"bias": True}),
    "SlidingAttn": _Published("sliding", {"block_size": "window", "dropout": "attention_dropout"}, {"num_heads": 1}),
    "BaseConv": _Published(
        "base_conv",
        {
            "l_max": "max_length",
            "kernel_size": "kernel_size",
            "implicit_long_conv": "implicit_filter",
            "use_act": "use_act",
        },
        {},
    ),
    "Hyena": _Published(
        "hyena",
        {
            "l_max": "max_length",
            "filter_order": "filter_dim",
            "num_inner_mlps": "filter_layers",
            "emb_dim": "filter_positions",
            "w": "filter_frequency",
            "short_filter_order": "short_width",
        },
        {"order": 2, "num_heads": 1, "inner_factor": 1, "num_blocks": 1, "outer_mixing": False, "activation": "id"},
        ("dropout", "filter_dropout"),
    ),
    "H3": _Published(
        "h3",
        {"l_max": "max_length", "d_state": "h3_state", "head_dim": "h3_head_dim"},
        {},
        ("dropout", "use_fast_fftconv"),
    ),
    "Based": _Published(
        "based",
        {"feature_dim": "feature_dim", "num_heads": "linear_heads", "num_key_value_heads": "linear_heads"},
        {"feature_name": "taylor_exp", "causal": True, "eps": 1e-12},
        ("l_max", "train_view", "mode"),
    ),
    "Mamba": _Published("mamba", {"d_state": "mamba_state"}, {"d_conv": 4, "expand": 2}),
}

_STATE_MIXERS = {"Identity": "identity", "MLP": "mlp", "GLU": "glu"}
_OPTIONS = {
    "d_model": "dim",
    "n_layers": "depth",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
}
_DROPOUTS = ("embed_dropout", "resid_dropout")

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


def translated_record(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Fields of our configuration for a digest record; None where it holds what we have no counterpart for."""
    reference = dict(record["config"])
    mixer, state_mixer = reference.pop("sequence_mixer", None), reference.pop("state_mixer", None)
    block = reference.pop("block_type", "TransformerBlock")
    if mixer is None or not set(reference) <= {*_OPTIONS, *_DROPOUTS}:
        return None
    fields: dict[str, Any] = {_OPTIONS.get(name, name): value for name, value in reference.items()}
    of_mixers = _mixer_fields(_configs_of(mixer), fields["depth"])
    of_state_mixer = _state_mixer_fields(state_mixer, record) if block != "MambaBlock" else {"state_mixer": "none"}
    if of_mixers is None or of_state_mixer is None or block not in ("TransformerBlock", "MambaBlock"):
        return None
    return fields | of_mixers | of_state_mixer


def _configs_of(mixer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return mixer["kwargs"]["configs"] if _class_of(mixer) == "Hybrid" else [mixer]


def _class_of(module: Mapping[str, Any]) -> str:
    return module["name"].rsplit(".", 1)[-1]


def _mixer_fields(configs: list[Mapping[str, Any]], depth: int) -> dict[str, Any] | None:
    """One set of fields for all mixers of a pattern; None if they disagree about one."""
    fields: dict[str, Any] = {}
    kernels: list[Any] = []
    for config in configs:
        found = _fields_of_one(config)
        if found is None:
            return None
        kernels.append(found.pop("kernel_size", 3))
        if any(fields.get(name, value) != value for name, value in found.items()):
            return None
        fields |= found
    fields["mixers"] = ",".join(_PUBLISHED[_class_of(config)].mixer for config in configs)
    layers = islice(cycle(kernels), depth)
    fields["kernel_size"] = tuple(k if isinstance(k, int) else k[layer] for layer, k in enumerate(layers))
    return fields


def _fields_of_one(config: Mapping[str, Any]) -> dict[str, Any] | None:
    published = _PUBLISHED.get(_class_of(config))
    if published is None:
        return None
    fields: dict[str, Any] = {}
    for option, value in config["kwargs"].items():
        if option in published.renamed:
            field = published.renamed[option]
            if fields.get(field, value) != value:
                return None
            fields[field] = value
        elif option in published.fixed:
            if value != published.fixed[option]:
                return None
        elif option not in published.ignored:
            return None
    return fields


def _state_mixer_fields(state_mixer: Mapping[str, Any] | None, record: Mapping[str, Any]) -> dict[str, Any] | None:
    if state_mixer is None:
        return {}
    name = _STATE_MIXERS.get(_class_of(state_mixer))
    if name is None or not set(state_mixer["kwargs"]) <= {"hidden_mult"}:
        return None
    if name == "identity":
        return {"state_mixer": name}
    # What the harness leaves to a default is seen in the shapes.
    hidden, dim = record["keys"]["backbone.layers.0.state_mixer.fc1.weight"]
    return {"state_mixer": name, "hidden_mult": hidden / dim}


def _hyena_rules(inner_layers: int) -> tuple[Rule, ...]:
    """The perceptron of a filter alternates maps (even places) with one shared sine (odd places)."""
    return (
        ("short_filter", "short_conv"),
        ("filter_fn.pos_emb.z", "filter.positions"),
        ("filter_fn.bias", "filter.bias"),
        ("filter_fn.implicit_filter.1.freq", "filter.frequency"),
        *((f"filter_fn.implicit_filter.{2 * i}", f"filter.linears.{i}") for i in range(inner_layers + 2)),
    )
