"""Squeeze and excitation: channels scaled by factors computed from the whole map."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(act(reduce(mean over positions)))): (B, C, H, W) -> (B, C, H, W).

    Source: Hu et al. 2017, arXiv:1709.01507, eq. (2)-(4).

    Args:
        dim: number of channels.
        hidden_dim: width between the two layers, for which every paper has its own rule.
    """

    def __init__(self, dim: int, hidden_dim: int, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        if hidden_dim < 1:
            raise ValueError(f"squeeze-excitation needs at least one hidden channel, not {hidden_dim}")
        self.reduce = nn.Conv2d(dim, hidden_dim, 1)
        self.act = act()
        self.expand = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return x * self.gate(x)

    def gate(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels 1 1"]:
        """Return the factors of the channels."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        return self.expand(self.act(self.reduce(mean))).sigmoid()

    def read_gates(self, x: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Return one factor per channel: (B, C)."""
        return {"channels": self.gate(x).flatten(1)}
