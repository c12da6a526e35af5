"""Mapping of published checkpoints of gated attention decoders: option names, weight names, and the packed gate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.published import translate_config
from gatewise.layers.yarn import Yarn
from gatewise.networks.sequence.gated_attention.gate import Gate, Granularity

Packing = Literal["grouped", "per_head"]

_QUERY = re.compile(r"(?P<mixer>(?:.*\.)?)q_proj\.(?P<leaf>weight|bias)")
_EXPERT = re.compile(r"(?P<mlp>(?:.*\.)?)experts\.(?P<index>\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)\.weight")
_EXPERTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class PackedQueries:
    """Query rows and gate rows packed in one matrix.

    Args:
        num_heads: number of query heads.
        num_kv_heads: number of groups of query heads.
        head_dim: channels per head.
        packing: order of the rows. "grouped" stores for each key/value head its queries, then the gates of these
            queries (this paper). "per_head" stores for each query head its query, then its gate (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    packing: Packing = "grouped"

    @property
    def legal_rows(self) -> dict[str, int]:
        """Return the number of rows of the joint matrix for each kind of gate."""
        width = self.num_heads * self.head_dim
        return {"without a gate": width, "headwise": width + self.num_heads, "elementwise": 2 * width}

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Split a matrix (or bias) that holds both into query rows and gate rows."""
        groups = self._groups
        rows = packed.unflatten(0, (groups, -1))
        queries, gates = rows.tensor_split([self.num_heads // groups * self.head_dim], dim=1)
        return queries.flatten(0, 1), gates.flatten(0, 1)

    def join(self, queries: Tensor, gates: Tensor) -> Tensor:
        """Join query rows and gate rows, the inverse of `split`."""
        groups = self._groups
        return torch.cat([queries.unflatten(0, (groups, -1)), gates.unflatten(0, (groups, -1))], dim=1).flatten(0, 1)

    @property
    def _groups(self) -> int:
        return self.num_kv_heads if self.packing == "grouped" else self.num_heads


def layout(name: str, packed: PackedQueries, *, gate_is_packed: bool, tied: bool) -> KeyLayout:
    """Return the layout of Qwen3 (Qwen3-MoE with experts), with gates in the query projection.

    Args:
        gate_is_packed: whether our gate belongs in the query projection; other gates keep their own name.
        tied: whether the output projection shares the weight of the embedding.
    """
    return KeyLayout(
        name,
        (
            # A wrapper's prefix "model." may have been stripped; the long form is written.
            ("^embed_tokens", "embedding"),
            ("^layers.{i}", "blocks.{i}"),
            ("^model.embed_tokens", "embedding"),
            ("^model.layers.{i}", "blocks.{i}"),
            ("^model.norm", "^norm"),
            ("^lm_head", "head"),
            ("input_layernorm", "mixer_norm"),
            ("post_attention_layernorm", "mlp_norm"),
            ("self_attn", "mixer"),
            ("mlp.gate", "mlp.router"),
        ),
        dropped=r"(.*\.)?rotary_emb\.inv_freq",
        unpack=lambda state: _stack_experts(_split_queries(_without_copy(state) if tied else state, packed)),
        pack=lambda state: _unstack_experts(_join_queries(state, packed) if gate_is_packed else state),
    )


def _without_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop an output projection that repeats the embedding, as some files of tied models do."""
    head, embedding = state.get("head.weight"), state.get("embedding.weight")
    if head is None or embedding is None or head.shape != embedding.shape or not torch.equal(head, embedding):
        return state
    return {key: tensor for key, tensor in state.items() if key != "head.weight"}


def _split_queries(state: dict[str, Tensor], packed: PackedQueries) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for key, tensor in state.items():
        found = _QUERY.fullmatch(key)
        if found is None:
            split[key] = tensor
            continue
        legal = packed.legal_rows
        rows = tensor.shape[0]
        if rows not in legal.values():
            # Keep it under a key that no network has, so that loading reports this text among the mismatches.
            kinds = ", ".join(f"{count} {kind}" for kind, count in legal.items())
            split[f"{key} with {rows} rows (legal: {kinds})"] = tensor
        elif rows == legal["without a gate"]:
            split[key] = tensor
        else:
            split[key], split[f"{found['mixer']}gate_proj.{found['leaf']}"] = packed.split(tensor)
    return split


def _join_queries(state: dict[str, Tensor], packed: PackedQueries) -> dict[str, Tensor]:
    joined = dict(state)
    for key, queries in state.items():
        found = _QUERY.fullmatch(key)
        gate = f"{found['mixer']}gate_proj.{found['leaf']}" if found else ""
        # If the gate has a bias and the queries do not, the bias keeps its own name.
        if gate in state:
            joined[key] = packed.join(queries, joined.pop(gate))
    return joined


def _stack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        found = _EXPERT.fullmatch(key)
        if found is None:
            stacked[key] = tensor
        else:
            experts.setdefault(f"{found['mlp']}{found['leaf']}", {})[int(found["index"])] = tensor
    for key, members in experts.items():
        stacked[key] = torch.stack([members[index] for index in sorted(members)])
    return stacked


def _unstack_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    unstacked: dict[str, Tensor] = {}
    for key, tensor in state.items():
        mlp, _, leaf = key.rpartition(".")
        if leaf not in _EXPERTS or tensor.ndim != 3:
            unstacked[key] = tensor
            continue
        for index, expert in enumerate(tensor):
            unstacked[f"{mlp}.experts.{index}.{leaf}.weight"] = expert
    return unstacked


_RENAMED = {
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "tie_word_embeddings": "tie_embeddings",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "use_qk_norm": "qk_norm",
    "rms_norm_eps": "norm_eps",
    "num_experts_per_tok": "experts_per_token",
}
_WITHOUT_EFFECT = (
    "architectures",
    # The reference's modules only read `qkv_bias`.
    "attention_bias",
    "attention_dropout",
    "attn_implementation",
    "_attn_implementation",
    "auto_map",
    "bos_token_id",
    "decoder_sparse_step",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "layer_idx",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_only_layers",
    "model_type",
    "norm_topk_prob",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "sliding_window",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
)
_GATES: dict[str, Granularity] = {
    "headwise_attn_output_gate": "headwise",
    "elementwise_attn_output_gate": "elementwise",
}


def translated(reference: Mapping[str, Any], target: Callable[..., Any]) -> dict[str, Any] | None:
    """Return arguments for `target`, our configuration, or None if the reference has settings unknown here.

    Raises:
        ValueError: if both kinds of gate are requested.
    """
    settings = dict(reference)
    asked = [granularity for flag, granularity in _GATES.items() if settings.pop(flag, False)]
    if len(asked) > 1:
        raise ValueError("a layer has one gate: either headwise_attn_output_gate or elementwise_attn_output_gate")
    experts_dim = settings.pop("moe_intermediate_size", None)
    scaling = settings.pop("rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type", "default")) not in ("default", "yarn"):
        return None
    if settings.get("use_sliding_window") or settings.get("hidden_act", "silu") != "silu":
        return None
    if settings.get("num_experts") and not settings.get("norm_topk_prob", True):
        return None
    fields = translate_config(settings, target, _RENAMED, _WITHOUT_EFFECT)
    if fields is None:
        return None
    if asked:
        fields["gate"] = Gate(granularity=asked[0])
    if experts_dim is not None and fields.get("num_experts"):
        fields["hidden_dim"] = experts_dim
    if "factor" in scaling:
        fields["yarn"] = _yarn(scaling, settings.get("max_position_embeddings"))
    return fields


def _yarn(scaling: Mapping[str, Any], trained_length: int | None) -> Yarn:
    return Yarn(
        factor=scaling["factor"],
        original_length=scaling.get("original_max_position_embeddings") or trained_length or 0,
        fast_turns=scaling.get("beta_fast") or 32.0,
        slow_turns=scaling.get("beta_slow") or 1.0,
        magnitude=scaling.get("attention_factor"),
    )
