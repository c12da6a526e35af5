"""Gated attention: multiply the output of each head by a sigmoid of the layer's input.

Between the value and the output projection of softmax attention there is only a weighted mean, so a head is a linear
map of low rank. Its weights must also add up to 1, so a head that has nothing to contribute puts them on the first
token. One gate after attention fixes both: it makes the head non-linear, and it lets the head contribute nothing.

Paper: Qiu et al., "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", 2025,
arXiv:2505.06708. The gate can be in five positions (G1 to G5), act per head or per channel, and multiply or add. The
published weights only use the first position, per head or per channel.

The decoder is that of Qwen3: grouped queries with a norm on queries and keys, rotary embedding, SwiGLU or experts.
Published weights hold the gate inside the query projection; here it is a separate projection. The paper leaves three
details open. Here, gates on queries and keys act before norm and rotary embedding, shared scores are averaged after the
sigmoid, and a head's norm after attention (a control of the paper) has one weight for all heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.causal_attention import KeyValueCache, causal_attention, extend_cache
from gatewise.layers.masked_attention import attention_weights, masked_attention
from gatewise.layers.mixture_of_experts import MixtureOfExperts
from gatewise.layers.normed_output import NormedOutput
from gatewise.layers.packing import positions_in_sequence
from gatewise.layers.rotary import inverse_frequencies, rotate_by, rotation
from gatewise.layers.swiglu import SwiGLU
from gatewise.layers.yarn import Yarn, yarn_frequencies
from gatewise.networks.sequence._base import SequenceConfig, SequenceMixer
from gatewise.networks.sequence._decoder import Decoder, split_heads
from gatewise.networks.sequence.gated_attention import keys as keys
from gatewise.networks.sequence.gated_attention.gate import Gate


@dataclass(frozen=True)
class GatedAttentionConfig(SequenceConfig):
    """Sizes and options of a gated attention decoder.

    Args:
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads.
        head_dim: channels per head; num_heads * head_dim may differ from `dim`.
        hidden_dim: hidden width of the MLP, or of each expert.
        gate: gate of each attention layer; None for plain attention.
        qk_norm: whether to apply an RMS norm to each head's query and key, before the rotary embedding.
        qkv_bias: whether all four projections and the gate have biases.
        rope_theta: base of the rotary embedding; None for no position embedding.
        yarn: YaRN extension of the context beyond the training length.
        after_attention: operation on each head's output before G1: None, or one of the paper's controls.
        sandwich_norm: whether to also apply a norm after both branches of a block.
        num_experts: number of experts; None for a dense MLP.
        experts_per_token: number of experts per token.
    """

    vocab_size: int = 151936
    dim: int = 2048
    depth: int = 28
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_dim: int = 6144
    gate: Gate | None = None
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_theta: float | None = 10000.0
    yarn: Yarn | None = None
    after_attention: Literal["silu", "rms_norm"] | None = None
    sandwich_norm: bool = False
    num_experts: int | None = None
    experts_per_token: int = 8
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_heads", "num_kv_heads", "head_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, not {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, not {self.head_dim}; or rope_theta=None")
        if self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be greater than 1, not {self.rope_theta}")
        if self.yarn is not None and self.rope_theta is None:
            raise ValueError("yarn extends a rotary embedding: it needs a rope_theta")
        if self.after_attention not in (None, "silu", "rms_norm"):
            raise ValueError(f"after_attention must be None, silu or rms_norm, not {self.after_attention!r}")

    @property
    def gate_heads(self) -> int:
        """Number of heads that the gate acts on: query heads, key and value heads, or 1 for the whole output."""
        position = self.gate.position if self.gate is not None else "G1"
        return {"G2": self.num_kv_heads, "G3": self.num_kv_heads, "G5": 1}.get(position, self.num_heads)

    @property
    def gate_width(self) -> int:
        """Number of gate logits; 0 without a gate."""
        if self.gate is None:
            return 0
        if self.gate.granularity == "headwise":
            return self.gate_heads
        return self.dim if self.gate.position == "G5" else self.gate_heads * self.head_dim


class GatedAttention(SequenceMixer):
    """Causal softmax attention with a gate: (B, T, D) -> (B, T, D). Keeps keys and values.

        y = W_o(softmax(q k^T / sqrt(head_dim)) v * sigmoid(W_g x))        (the gate at G1)

    The gate looks only at the current token, so it needs no state. Source: arXiv:2505.06708, eq. (5).
    """

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, width, config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_width, config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_width, config.qkv_bias)
        self.o_proj = nn.Linear(width, config.dim, config.qkv_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.after_attention: nn.Module | None = None
        if config.after_attention is not None:
            rms_norm = config.after_attention == "rms_norm"
            self.after_attention = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if rms_norm else nn.SiLU()
        self.out_norm = nn.RMSNorm(config.dim, eps=config.norm_eps) if config.sandwich_norm else None
        self.gate_proj: nn.Linear | None = None
        self.gate_logits: nn.Parameter | None = None
        gate = config.gate
        if gate is not None and gate.input_dependent:
            self.gate_proj = nn.Linear(config.dim, config.gate_width, config.qkv_bias or gate.bias_init is not None)
        elif gate is not None:
            self.gate_logits = nn.Parameter(torch.empty(config.gate_width))
        self.reset_gate()

    def reset_gate(self) -> None:
        """Initialize the gate as its options specify."""
        gate = self.config.gate
        if gate is None:
            return
        if self.gate_logits is not None:
            nn.init.constant_(self.gate_logits, gate.bias_init or 0.0)
        if self.gate_proj is not None and gate.init == "zeros":
            nn.init.zeros_(self.gate_proj.weight)
        if self.gate_proj is not None and self.gate_proj.bias is not None:
            nn.init.constant_(self.gate_proj.bias, gate.bias_init or 0.0)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueCache | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        *,
        mask: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueCache | None]:
        """Return the outputs, and the keys and values of all tokens so far.

        Args:
            mask: attention mask, broadcastable to (batch, heads or 1, time, keys so far). Booleans are true where a key
                may be seen; numbers are added to the scores. A mask can only narrow the causal order. A token that may
                see nothing reads zeros, which then pass through the output projection.
        Raises:
            ValueError: if the mask has the wrong shape or type, or is passed together with cu_seqlens.
        """
        y, scores, cache = self._attend(x, state, cu_seqlens, mask)
        y = self.o_proj(y.flatten(2))
        y = self._gated("G5", y[:, :, None], scores)[:, :, 0]
        if self.out_norm is not None:
            y = self.out_norm(y)
        return y, None if cu_seqlens is not None else cache

    def attention_weights(
        self, x: Float[Tensor, "batch time dim"], state: KeyValueCache | None = None
    ) -> Float[Tensor, "batch heads time keys"]:
        """Return the attention probabilities in float32. Their memory grows with time * keys."""
        q, k, _, _ = self._heads(x, self._positions(x, state, None))
        return attention_weights(q, k if state is None else torch.cat([state.keys, k], dim=1))

    def attention_output(
        self, x: Float[Tensor, "batch time dim"], state: KeyValueCache | None = None
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """Return what each head passes to the output projection, after a gate at G1."""
        return self._attend(x, state, None, None)[0]

    def gate_scores(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time heads channels"] | None:
        """Return the gate's scores (1 head if shared or at G5, 1 channel if headwise), or None without a gate."""
        scores = self._scores(x, self._project(x)[3])
        return None if scores is None else scores.expand(*x.shape[:2], -1, -1)

    def read_gates(self, x: Float[Tensor, "batch time dim"], *_: Any) -> dict[str, Tensor]:
        """Return the mean gate score per token for this input, one (B, T) map per head."""
        scores = self.gate_scores(x)
        if scores is None:
            return {}
        means = scores.mean(dim=-1)
        if means.shape[-1] == 1:
            return {"gate": means[..., 0]}
        return {f"gate of head {head}": means[..., head] for head in range(means.shape[-1])}

    def merged(self) -> GatedAttention:
        """Return the same layer with one matrix for queries, keys, values and gate."""
        return StackedGatedAttention.of(self)

    def _attend(
        self, x: Tensor, state: KeyValueCache | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, KeyValueCache]:
        """Return the heads' outputs after G1 (B, T, heads, head_dim), the gate's scores, and the cache."""
        if mask is not None and cu_seqlens is not None:
            raise ValueError("packed sequences are separated by cu_seqlens alone: pass either a mask or cu_seqlens")
        q, k, v, scores = self._heads(x, self._positions(x, state, cu_seqlens))
        cache = extend_cache(state, k, v)
        if mask is None:
            y = causal_attention(q, cache.keys, cache.values, cu_seqlens=cu_seqlens)
        else:
            y = masked_attention(q, cache.keys, cache.values, mask)
        if self.after_attention is not None:
            y = self.after_attention(y)
        return self._gated("G1", y, scores), scores, cache

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries, keys and values, ready for attention, and the gate's scores."""
        config = self.config
        q, k, v, logits = self._project(x)
        scores = self._scores(x, logits)
        q = self._gated("G4", split_heads(q, config.num_heads), scores)
        k = self._gated("G3", split_heads(k, config.num_kv_heads), scores)
        v = self._gated("G2", split_heads(v, config.num_kv_heads), scores)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope_theta is not None:
            cos, sin = self._rotation(positions)
            q, k = rotate_by(q, cos, sin), rotate_by(k, cos, sin)
        return q, k, v, scores

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        logits = self.gate_proj(x) if self.gate_proj is not None else None
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), logits

    def _scores(self, x: Tensor, logits: Tensor | None) -> Tensor | None:
        if self.gate_logits is not None:
            logits = self.gate_logits.to(x.dtype)[None, None]
        if logits is None or self.config.gate is None:
            return None
        return self.config.gate.scores(logits, self.config.gate_heads)

    def _gated(self, position: str, y: Tensor, scores: Tensor | None) -> Tensor:
        gate = self.config.gate
        return y if gate is None or scores is None or gate.position != position else gate.apply(y, scores)

    def _positions(self, x: Tensor, state: KeyValueCache | None, cu_seqlens: Tensor | None) -> Tensor:
        if cu_seqlens is not None:
            return positions_in_sequence(cu_seqlens, x.shape[1])
        start = 0 if state is None else state.length
        return torch.arange(start, start + x.shape[1], device=x.device)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        head_dim, yarn = self.config.head_dim, self.config.yarn
        # Recomputed each time, so that any length works and float32 is kept when the model is in half precision.
        base = 10000.0 if self.config.rope_theta is None else self.config.rope_theta
        if yarn is None:
            return rotation(positions, inverse_frequencies(head_dim, base, positions.device))
        frequencies = yarn_frequencies(yarn, head_dim, base, positions.device)
        return rotation(positions, frequencies, yarn.rotary_magnitude)


class StackedGatedAttention(GatedAttention):
    """A gated attention layer whose queries, keys, values and gate come from one matrix, for inference."""

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        stacked = [p for p in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj) if p is not None]
        self.widths = [projection.out_features for projection in stacked]
        biased = any(projection.bias is not None for projection in stacked)
        self.qkvg_proj = nn.Linear(config.dim, sum(self.widths), biased)
        del self.q_proj, self.k_proj, self.v_proj, self.gate_proj

    @classmethod
    def of(cls, layer: GatedAttention) -> StackedGatedAttention:
        """Return the stacked form of `layer`, with its weights."""
        names = [name for name in ("q_proj", "k_proj", "v_proj", "gate_proj") if getattr(layer, name) is not None]
        projections = [getattr(layer, name) for name in names]
        state = {key: value for key, value in layer.state_dict().items() if key.split(".")[0] not in names}
        state["qkvg_proj.weight"] = torch.cat([projection.weight.detach() for projection in projections])
        if any(projection.bias is not None for projection in projections):
            zeros = [projection.weight.new_zeros(projection.out_features) for projection in projections]
            biases = [
                p.bias.detach() if p.bias is not None else zero for p, zero in zip(projections, zeros, strict=True)
            ]
            state["qkvg_proj.bias"] = torch.cat(biases)
        with torch.device("meta"):
            stacked = cls(layer.config)
        stacked.load_state_dict(state, assign=True)
        return stacked.train(layer.training)

    def merged(self) -> GatedAttention:
        return self

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q, k, v, *logits = self.qkvg_proj(x).split(self.widths, dim=-1)
        return q, k, v, logits[0] if logits else None


class GatedAttentionDecoder(Decoder):
    """A pre-norm decoder of gated attention and SwiGLU, either dense or with a mixture of experts."""

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(
            config,
            make_mixer=lambda _: GatedAttention(config),
            make_mlp=lambda _: _perceptron(config),
            norm_eps=config.norm_eps,
        )
        for block in self.blocks:
            # The decoder has initialized every linear layer from the same distribution.
            block.mixer.reset_gate()

    def with_config(self, **changes: Any) -> GatedAttentionDecoder:
        """Return a copy with the same weights and other options, such as `yarn=Yarn(4.0, 32768)` or `rope_theta=1e6`.

        Raises:
            RuntimeError: if the changes add, remove or reshape weights.
        """
        weights = self.state_dict()
        with torch.device("meta"):
            copy = type(self)(replace(self.config, **changes))
        copy.load_state_dict({key: tensor.clone() for key, tensor in weights.items()}, assign=True)
        for mine, theirs in zip(copy.parameters(), self.parameters(), strict=True):
            mine.requires_grad_(theirs.requires_grad)
        copy.variant = self.variant
        copy.set_grad_checkpointing(self.grad_checkpointing)
        return copy.train(self.training)


def _perceptron(config: GatedAttentionConfig) -> nn.Module:
    mlp: nn.Module
    if config.num_experts is None:
        mlp = SwiGLU(config.dim, config.hidden_dim)
    else:
        mlp = MixtureOfExperts(config.dim, config.hidden_dim, config.num_experts, config.experts_per_token)
    return NormedOutput(mlp, config.dim, config.norm_eps) if config.sandwich_norm else mlp


def layouts(config: GatedAttentionConfig) -> list[KeyLayout]:
    """Return the layout of the published weights and the one with the packing of Qwen3-Next.

    Both have the same names and shapes, so a file does not reveal which one it uses. Loading takes the first. They only
    differ if several query heads share a key head.
    """
    packed = keys.PackedQueries(config.num_heads, config.num_kv_heads, config.head_dim)
    in_queries = config.gate is not None and config.gate.position == "G1" and config.gate.input_dependent
    tied = config.tie_embeddings
    return [
        keys.layout("official", packed, gate_is_packed=in_queries, tied=tied),
        keys.layout("qwen3_next", replace(packed, packing="per_head"), gate_is_packed=in_queries, tied=tied),
    ]


def config_from_reference(reference: Mapping[str, Any]) -> GatedAttentionConfig:
    """Return the configuration described by a published `config.json`.

    Raises:
        ValueError: if the file has settings that this decoder does not support, or two kinds of gate at once.
    """
    fields = keys.translated(reference, GatedAttentionConfig)
    if fields is None:
        raise ValueError("the file describes another kind of network: some of its settings are unknown here")
    return GatedAttentionConfig(**{"tie_embeddings": False} | fields)


_28L = GatedAttentionConfig()
_48L = replace(_28L, dim=1536, depth=48, hidden_dim=4608)
_15A2B = replace(_28L, depth=24, num_heads=32, num_kv_heads=4, hidden_dim=768, num_experts=128, tie_embeddings=False)
_TINY = GatedAttentionConfig(vocab_size=256, dim=128, depth=4, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=352)


def _variant(base: GatedAttentionConfig, gate: Gate | None = None, **changes: Any) -> Variant:
    return Variant(replace(base, gate=gate, **changes), (4096,))


register(
    GatedAttentionDecoder,
    paper="gated_attention",
    layouts=layouts,
    fresh_with_head=("head.", "embedding."),
    variants={
        # Table 2; there, the MLPs of gated models are narrowed to match the parameter count, which `hidden_dim` sets.
        "gated_attention_1_7b_28l_baseline": _variant(_28L),
        "gated_attention_1_7b_28l_headwise": _variant(_28L, Gate(granularity="headwise")),
        "gated_attention_1_7b_28l_elementwise": _variant(_28L, Gate()),
        "gated_attention_1_7b_48l_baseline": _variant(_48L),
        "gated_attention_1_7b_48l_sandwich": _variant(_48L, sandwich_norm=True),
        "gated_attention_1_7b_48l_headwise": _variant(_48L, Gate(granularity="headwise")),
        "gated_attention_1_7b_48l_elementwise": _variant(_48L, Gate()),
        # Table 1, rows 1 to 15.
        "gated_attention_15a2b_baseline": _variant(_15A2B),
        "gated_attention_15a2b_8_kv_heads": _variant(_15A2B, num_kv_heads=8),
        "gated_attention_15a2b_48_heads": _variant(_15A2B, num_heads=48),
        "gated_attention_15a2b_132_experts": _variant(_15A2B, num_experts=132),
        "gated_attention_15a2b_elementwise": _variant(_15A2B, Gate()),
        "gated_attention_15a2b_value": _variant(_15A2B, Gate("G2")),
        "gated_attention_15a2b_key": _variant(_15A2B, Gate("G3")),
        "gated_attention_15a2b_query": _variant(_15A2B, Gate("G4")),
        "gated_attention_15a2b_output": _variant(_15A2B, Gate("G5")),
        "gated_attention_15a2b_headwise": _variant(_15A2B, Gate(granularity="headwise")),
        "gated_attention_15a2b_value_headwise": _variant(_15A2B, Gate("G2", "headwise")),
        "gated_attention_15a2b_shared": _variant(_15A2B, Gate(shared=True)),
        "gated_attention_15a2b_value_shared": _variant(_15A2B, Gate("G2", shared=True)),
        "gated_attention_15a2b_additive": _variant(_15A2B, Gate(combine="add", activation="silu")),
        "gated_attention_15a2b_silu": _variant(_15A2B, Gate(activation="silu")),
        # Tables 3 and 4: ablations of the gate.
        "gated_attention_15a2b_rms_norm": _variant(_15A2B, after_attention="rms_norm"),
        "gated_attention_15a2b_silu_alone": _variant(_15A2B, after_attention="silu"),
        "gated_attention_15a2b_additive_identity": _variant(_15A2B, Gate(combine="add", activation="identity")),
        "gated_attention_15a2b_constant": _variant(_15A2B, Gate(input_dependent=False)),
        "gated_attention_15a2b_ns_sigmoid": _variant(_15A2B, Gate(activation="ns_sigmoid")),
        "gated_attention_tiny_baseline": Variant(_TINY, (256,)),
        "gated_attention_tiny_headwise": Variant(replace(_TINY, gate=Gate(granularity="headwise")), (256,)),
        "gated_attention_tiny_elementwise": Variant(replace(_TINY, gate=Gate()), (256,)),
    },
)
