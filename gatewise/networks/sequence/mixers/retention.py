"""Retention: linear attention whose memory decays at a constant rate per head, with rotated queries and keys.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = K^-0.5 q_t S_t,   gamma_h = 1 - 2^(-5-h)

Paper: Sun et al. 2023, arXiv:2307.08621 (RetNet), section 2.1 and eq. (8). As in flash-linear-attention, an RMS norm
per head replaces the group norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.rotary import inverse_frequencies, rotate
from gatewise.networks.sequence._decoder import split_heads
from gatewise.networks.sequence.gla import fixed_log_decay
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer, check_heads
from gatewise.ops.gated_linear_attention import gated_linear_attention


class RetentionState(NamedTuple):
    """State of retention: the matrix (B, heads, K, V), and the number of tokens seen, which sets the next rotation."""

    matrix: Tensor
    length: int


class Retention(CausalMixer):
    """Multi-scale retention, normalized and gated: (B, T, D) -> (B, T, D).

    Args:
        expand_v: total width of the values relative to `dim`.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_heads: int = 2, expand_v: float = 2.0, norm_eps: float = 1e-5) -> None:
        super().__init__()
        value_dim = int(dim * expand_v)
        check_heads(dim, num_heads)
        check_heads(value_dim, num_heads)
        self.num_heads, self.head_dim, self.head_value_dim = num_heads, dim // num_heads, value_dim // num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, value_dim, bias=False)
        self.gate_proj = nn.Linear(dim, value_dim, bias=False)
        self.norm = nn.RMSNorm(self.head_value_dim, eps=norm_eps)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.register_buffer("frequencies", inverse_frequencies(self.head_dim), persistent=False)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: RetentionState | None
    ) -> tuple[Float[Tensor, "batch time dim"], RetentionState]:
        matrix, start = (None, 0) if state is None else state
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        q = rotate(split_heads(self.q_proj(x), self.num_heads), positions, self.frequencies)
        k = rotate(split_heads(self.k_proj(x), self.num_heads), positions, self.frequencies)
        v = split_heads(self.v_proj(x), self.num_heads)
        gates = fixed_log_decay(self.num_heads, x.device).to(x.dtype)[None, None, :, None].expand(*x.shape[:2], -1, 1)
        o, matrix = gated_linear_attention(q, k, v, gates, matrix)
        y = self.norm(o).flatten(2) * F.silu(self.gate_proj(x))
        return self.o_proj(y), RetentionState(matrix, start + x.shape[1])

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * self.num_heads * self.head_dim * self.head_value_dim
