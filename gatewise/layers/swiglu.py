"""The gated perceptron of current decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Linear = Callable[[int, int], nn.Module]
"""Builds a linear map from its input and output width."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., C) -> (..., C).

    Source: Shazeer 2020, arXiv:2002.05202, eq. (6).

    Args:
        linear: builds the three maps; plain ones without bias where None.
    """

    def __init__(self, dim: int, hidden_dim: int, linear: Linear | None = None) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False) if linear is None else linear
        self.gate_proj = linear(dim, hidden_dim)
        self.up_proj = linear(dim, hidden_dim)
        self.down_proj = linear(hidden_dim, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rounded_hidden_dim(dim: int, ratio: float = 8 / 3, multiple: int = 256) -> int:
    """The usual hidden width: `int(dim * ratio)` rounded up to a multiple."""
    return multiple * -(-int(dim * ratio) // multiple)
