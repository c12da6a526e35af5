"""Softmax self-attention among all tokens, and the pre-norm transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.drop_path import DropPath
from gatewise.layers.mlp import Mlp

Tokens = Float[Tensor, "batch *tokens channels"]


class SelfAttention(nn.Module):
    """Multi-head attention over all tokens, in a sequence or on a grid: (B, ..., C) -> (B, ..., C).

    Args:
        qkv_bias: whether queries, keys and values have biases.
        drop_rate: dropout rate of the output.
        attn_drop_rate: dropout rate of the attention weights.
    Raises:
        ValueError: if the width is not a multiple of the number of heads.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, drop_rate: float = 0.0, attn_drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.head_dim = head_dim(dim, num_heads)
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tokens) -> Tokens:
        parts = self.qkv(x).flatten(1, -2).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        dropped = self.attn_drop_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropped)
        return self.drop(self.proj(y.transpose(1, 2).reshape(x.shape)))


class TransformerBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): (B, ..., C) -> (B, ..., C).

    Args:
        mixer: module that mixes tokens and keeps the shape.
        mlp_ratio: hidden width of the MLP relative to `dim`.
        drop_rate: dropout rate in the MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def head_dim(dim: int, num_heads: int) -> int:
    """Return the number of channels per head.

    Raises:
        ValueError: if the width is not a multiple of the number of heads.
    """
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise ValueError(f"the width must be a multiple of the number of heads, not {dim} with {num_heads} heads")
    return dim // num_heads
