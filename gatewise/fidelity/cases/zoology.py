"""Digest records of the Zoology reference as cases of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

from torch import Tensor

from gatewise.fidelity.case import Case, Cases
from gatewise.networks.sequence.zoology import Published, ZoologyConfig, ZoologyNet, reference_layout


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """Return a case for a digest of the language model: hidden states and logits."""
    fields = translated_record(record)
    if fields is None:
        return None
    config = ZoologyConfig(**fields)
    return Case(ZoologyNet(config), reference_layout(config), run=_hidden_and_logits)


def _hidden_and_logits(network: ZoologyNet, tokens: Tensor) -> dict[str, Tensor]:
    hidden, _ = network.forward_features(tokens)
    return {"hidden": hidden, "logits": network.logits(hidden)}


_PUBLISHED = {
    "MHA": Published("attention", {"num_heads": "num_heads", "dropout": "attention_dropout"}, {"bias": True}),
    "SlidingAttn": Published("sliding", {"block_size": "window", "dropout": "attention_dropout"}, {"num_heads": 1}),
    "BaseConv": Published(
        "base_conv",
        {
            "l_max": "max_length",
            "kernel_size": "kernel_size",
            "implicit_long_conv": "implicit_filter",
            "use_act": "use_act",
        },
        {},
    ),
    "Hyena": Published(
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
    "H3": Published(
        "h3",
        {"l_max": "max_length", "d_state": "h3_state", "head_dim": "h3_head_dim"},
        {},
        ("dropout", "use_fast_fftconv"),
    ),
    "Based": Published(
        "based",
        {"feature_dim": "feature_dim", "num_heads": "linear_heads", "num_key_value_heads": "linear_heads"},
        {"feature_name": "taylor_exp", "causal": True, "eps": 1e-12},
        ("l_max", "train_view", "mode"),
    ),
    "Mamba": Published("mamba", {"d_state": "mamba_state"}, {"d_conv": 4, "expand": 2}),
}

_STATE_MIXERS = {"Identity": "identity", "MLP": "mlp", "GLU": "glu"}

_OPTIONS = {
    "d_model": "dim",
    "n_layers": "depth",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_positions",
}

_DROPOUTS = ("embed_dropout", "resid_dropout")


def translated_record(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Convert a digest record to fields of our configuration; None if it holds something without a counterpart."""
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
    """Return one set of fields for all mixers of a pattern; None if they disagree about one."""
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
    # The shapes reveal what the harness leaves to a default.
    hidden, dim = record["keys"]["backbone.layers.0.state_mixer.fc1.weight"]
    return {"state_mixer": name, "hidden_mult": hidden / dim}


CASES: Cases = {"zoology": (reference_case,)}
