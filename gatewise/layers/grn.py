"""Global response normalization: channels compete through their energy over the whole map."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GlobalResponseNorm(nn.Module):
    """(weight * N + 1) * x + bias with N = G / (mean over channels of G + eps)and G the L2 norm over positions.

    Weight and bias start at 0, which gives an identity. Norms are computed at least in float32, because squares of
    large maps overflow half precision.

    Source: Woo et al. 2023, arXiv:2301.00808 (ConvNeXt V2), section 3.

    Args:
        channels: position of the channel axis, "first" for (B, C, H, W) or "last" for (B, H, W, C).
    """

    def __init__(self, dim: int, channels: Literal["first", "last"] = "first", eps: float = 1e-6) -> None:
        super().__init__()
        if channels not in ("first", "last"):
            raise ValueError(f"channels must be 'first' or 'last', not {channels!r}")
        self.eps = eps
        self.channel_axis = 1 if channels == "first" else -1
        self.positions = (2, 3) if channels == "first" else (1, 2)
        shape = (1, dim, 1, 1) if channels == "first" else (1, 1, 1, dim)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        energy = torch.linalg.vector_norm(x, dim=self.positions, keepdim=True, dtype=wide)
        relative = (energy / (energy.mean(dim=self.channel_axis, keepdim=True) + self.eps)).to(x.dtype)
        y = (self.weight * relative + 1) * x
        return y if self.bias is None else y + self.bias
