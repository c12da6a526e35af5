"""Stochastic depth."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the residual branch of random samples in training and scales up the others to keep the mean.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016, arXiv:1603.09382.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), not {rate}")
        self.rate = rate

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(last: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Return rates that grow linearly from 0 to `last` over all blocks in order, one list per stage."""
    rates = torch.linspace(0, last, sum(depths), dtype=torch.float64, device="cpu").tolist()
    return [[rates.pop(0) for _ in range(depth)] for depth in depths]
