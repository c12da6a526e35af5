"""Gated MLP of current decoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Linear = Callable[[int, int], nn.Module]
"""Constructor of a linear layer from its input and output width."""


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): (..., C) -> (..., C).

    Source: Shazeer 2020, arXiv:2002.05202, eq. (6).

    Args:
        linear: constructor of the three linear layers; None for plain ones without bias.
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
    """Return the usual hidden width, `int(dim * ratio)` rounded up to a multiple of `multiple`."""
    return multiple * -(-int(dim * ratio) // multiple)
