"""HGF: decoders with 1.58-bit weights and a gated low-rank correction that recovers part of their loss.

Every projection of the attention is a ternary matrix plus a thin branch in full precision. One learned gate per
projection scales that branch. The file also has the models that the paper compares with: full precision, pure ternary,
and differential attention in full precision.

Paper: Trejo Pizzo, "Hybrid Gated Flow (HGF): Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction", 2026,
arXiv:2602.05269. Its code is not public. Ternary weights follow BitNet b1.58 (arXiv:2402.17764) and differential
attention follows arXiv:2410.05258. Sizes, ranks, initial values and the gates' schedule are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.causal_attention import KeyValueCache, causal_attention, extend_cache
from gatewise.layers.masked_attention import attention_weights
from gatewise.layers.packing import positions_in_sequence
from gatewise.layers.rotary import inverse_frequencies, rotate
from gatewise.layers.swiglu import SwiGLU, rounded_hidden_dim
from gatewise.layers.ternary import HybridGatedLinear, TernaryLinear
from gatewise.networks.sequence._base import SequenceConfig, SequenceMixer
from gatewise.networks.sequence._decoder import Decoder, split_heads

Weights = Literal["full", "ternary", "hybrid"]
Attention = Literal["softmax", "differential"]


@dataclass(frozen=True)
class HGFConfig(SequenceConfig):
    """Sizes and options of one of the paper's decoders.

    Args:
        num_heads: number of heads of softmax attention; differential attention has half as many, each twice as wide.
        attention: kind of attention: softmax, or the difference of two softmaxes.
        weights: kind of weights in the attention projections: full precision, ternary, or ternary with a gated
            correction.
        rank: rank of the correction.
        correct_mlp: whether to correct the MLP's layers too; otherwise they are ternary (full with `weights="full"`).
        gate_init: initial value of the raw gate.
        activation_bits: 8 to round the inputs of ternary layers; None to leave them.
        hidden_dim: hidden width of the MLP; None for 8 / 3 of `dim`, rounded up to a multiple of 256.
        rope_theta: base of the rotary frequencies.
    """

    num_heads: int = 8
    attention: Attention = "differential"
    weights: Weights = "hybrid"
    rank: int = 32
    correct_mlp: bool = False
    gate_init: float = 0.1
    activation_bits: int | None = None
    hidden_dim: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, not {self.attention!r}")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, not {self.weights!r}")
        if self.num_heads < 1 or self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim {self.dim} must give {self.num_heads} heads of an even width")
        if self.attention == "differential" and self.num_heads % 2:
            raise ValueError(f"differential attention pairs the heads: num_heads must be even, not {self.num_heads}")
        if self.weights == "hybrid" and not 1 <= self.rank <= self.dim:
            raise ValueError(f"rank must be 1 to {self.dim} (the smaller width), not {self.rank}")


def _linear(config: HGFConfig, corrected: bool) -> Callable[[int, int], nn.Module]:
    """Return a constructor of linear layers, `corrected` if both this argument and the configuration say so."""
    if config.weights == "full":
        return partial(nn.Linear, bias=False)
    if config.weights == "hybrid" and corrected:
        return partial(
            HybridGatedLinear, rank=config.rank, gate_init=config.gate_init, activation_bits=config.activation_bits
        )
    return partial(TernaryLinear, activation_bits=config.activation_bits)


class _RotaryAttention(SequenceMixer):
    """Causal attention with rotary positions and projections of any kind: (B, T, D) -> (B, T, D)."""

    frequencies: Tensor

    def __init__(self, config: HGFConfig) -> None:
        super().__init__()
        linear = _linear(config, corrected=True)
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.q_proj = linear(config.dim, config.dim)
        self.k_proj = linear(config.dim, config.dim)
        self.v_proj = linear(config.dim, config.dim)
        self.o_proj = linear(config.dim, config.dim)
        self.register_buffer("frequencies", inverse_frequencies(self.head_dim, config.rope_theta), persistent=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueCache | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueCache | None]:
        q, k = self._rotated(x, state, cu_seqlens)
        cache = extend_cache(state, k, self._values(x))
        y = self._attend(q, cache.keys, cache.values, cu_seqlens)
        return self.o_proj(y.flatten(2)), cache if cu_seqlens is None else None

    def _rotated(
        self, x: Tensor, state: KeyValueCache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        positions = _positions(x, state, cu_seqlens)
        heads = (split_heads(project(x), self.num_heads) for project in (self.q_proj, self.k_proj))
        q, k = (rotate(head, positions, self.frequencies) for head in heads)
        return q, k

    def _values(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        raise NotImplementedError


def _positions(x: Tensor, state: KeyValueCache | None, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        return positions_in_sequence(cu_seqlens, x.shape[1])
    before = 0 if state is None else state.length
    return torch.arange(before, before + x.shape[1], device=x.device)


class SoftmaxAttention(_RotaryAttention):
    """One attention map per head: (B, T, D) -> (B, T, D)."""

    def attention_weights(
        self, x: Float[Tensor, "batch time dim"], state: KeyValueCache | None = None
    ) -> Float[Tensor, "batch heads time keys"]:
        """Return the attention map, for `gates.attention_diagnostics`; its memory grows with time * keys."""
        q, k = self._rotated(x, state)
        return attention_weights(q, k if state is None else torch.cat([state.keys, k], dim=1))

    def _values(self, x: Tensor) -> Tensor:
        return split_heads(self.v_proj(x), self.num_heads)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        return causal_attention(q, k, v, cu_seqlens=cu_seqlens)


class DifferentialAttention(_RotaryAttention):
    """The difference of two attention maps over shared values: (B, T, D) -> (B, T, D).

    Query and key heads come in pairs (q1, q2), (k1, k2); a pair shares values of twice the width. In layer l:

        y = (1 - lambda_init) rms_norm((softmax(q1 k1^T / sqrt d) - lambda softmax(q2 k2^T / sqrt d)) v)
        lambda = exp(lq1 . lk1) - exp(lq2 . lk2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 l)

    Source: Ye et al. 2024, arXiv:2410.05258, eq. (1)-(3), except that the norm has no weight.
    """

    def __init__(self, config: HGFConfig, layer: int) -> None:
        super().__init__(config)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_k1 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_q2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.lambda_k2 = nn.Parameter(0.1 * torch.randn(self.head_dim))
        self.norm = nn.RMSNorm(2 * self.head_dim, eps=1e-5, elementwise_affine=False)

    @property
    def difference(self) -> Float[Tensor, ""]:
        """Factor lambda of the second map, which may exceed 1. Exponentials are taken in float32."""
        first = (self.lambda_q1.float() * self.lambda_k1.float()).sum().exp()
        second = (self.lambda_q2.float() * self.lambda_k2.float()).sum().exp()
        return first - second + self.lambda_init

    def _values(self, x: Tensor) -> Tensor:
        return split_heads(self.v_proj(x), self.num_heads // 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        # Softmax attention is linear in the values, so the maps may be subtracted afterwards.
        first = causal_attention(q[:, :, 0::2], k[:, :, 0::2], v, cu_seqlens=cu_seqlens)
        second = causal_attention(q[:, :, 1::2], k[:, :, 1::2], v, cu_seqlens=cu_seqlens)
        y = first - self.difference.to(second.dtype) * second
        return (1 - self.lambda_init) * self.norm(y)


class HGF(Decoder):
    """A pre-norm decoder with ternary, corrected or full linear layers; embedding, norms and head stay full."""

    def __init__(self, config: HGFConfig) -> None:
        hidden_dim = config.hidden_dim or rounded_hidden_dim(config.dim)
        mlp_linear = _linear(config, corrected=config.correct_mlp)
        super().__init__(
            config,
            make_mixer=lambda layer: (
                DifferentialAttention(config, layer) if config.attention == "differential" else SoftmaxAttention(config)
            ),
            make_mlp=lambda _: SwiGLU(config.dim, hidden_dim, mlp_linear),
            norm_eps=config.norm_eps,
        )


def layouts(config: HGFConfig) -> list[KeyLayout]:
    """Return a layout with the usual names of current decoders, as no weights are published."""
    return [
        KeyLayout(
            "official",
            (
                ("^layers.{i}", "blocks.{i}"),
                ("attn_norm", "mixer_norm"),
                ("attn", "mixer"),
            ),
        )
    ]


_SMALL = HGFConfig(vocab_size=8192, dim=512, depth=8, num_heads=8, rank=32)
_MEDIUM = replace(_SMALL, vocab_size=32000, dim=768, depth=12, num_heads=12, rank=48)
_TINY = replace(_SMALL, vocab_size=256, dim=128, depth=3, num_heads=4, rank=8)
_BASELINE: dict[str, Any] = {"attention": "softmax", "weights": "full"}
_BITNET: dict[str, Any] = {"attention": "softmax", "weights": "ternary"}
_DIFF_ONLY: dict[str, Any] = {"attention": "differential", "weights": "full"}
_SOFTMAX: dict[str, Any] = {"attention": "softmax", "weights": "hybrid"}

register(
    HGF,
    paper="hgf",
    layouts=layouts,
    fresh_with_head=("head.", "embedding."),
    variants={
        "hgf_tiny": Variant(_TINY, (96,)),
        "hgf_tiny_softmax": Variant(replace(_TINY, **_SOFTMAX), (96,)),
        "hgf_tiny_baseline": Variant(replace(_TINY, **_BASELINE), (96,)),
        "hgf_tiny_bitnet": Variant(replace(_TINY, **_BITNET), (96,)),
        "hgf_tiny_diff_only": Variant(replace(_TINY, **_DIFF_ONLY), (96,)),
        "hgf_small": Variant(_SMALL, (256,)),
        "hgf_small_softmax": Variant(replace(_SMALL, **_SOFTMAX), (256,)),
        "hgf_small_baseline": Variant(replace(_SMALL, **_BASELINE), (256,)),
        "hgf_small_bitnet": Variant(replace(_SMALL, **_BITNET), (256,)),
        "hgf_small_diff_only": Variant(replace(_SMALL, **_DIFF_ONLY), (256,)),
        "hgf_medium": Variant(_MEDIUM, (512,)),
        "hgf_medium_softmax": Variant(replace(_MEDIUM, **_SOFTMAX), (512,)),
        "hgf_medium_baseline": Variant(replace(_MEDIUM, **_BASELINE), (512,)),
        "hgf_medium_bitnet": Variant(replace(_MEDIUM, **_BITNET), (512,)),
        "hgf_medium_diff_only": Variant(replace(_MEDIUM, **_DIFF_ONLY), (512,)),
    },
)
