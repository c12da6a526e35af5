"""A branch followed by a norm."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class NormedOutput(nn.Module):
    """A module followed by an RMS norm, the second half of a sandwich norm: (..., C) -> (..., C)."""

    def __init__(self, inner: nn.Module, dim: int, eps: float) -> None:
        super().__init__()
        self.inner = inner
        self.out_norm = nn.RMSNorm(dim, eps=eps)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.out_norm(self.inner(x))
