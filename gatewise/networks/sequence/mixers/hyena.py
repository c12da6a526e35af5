"""Hyena: two gates around a long convolution whose filter comes from an MLP and decays under a window.

    x1, x2, v = short_conv(W x),   y = W_o(x2 (h * (x1 v) + b x1 v))

with * for the causal convolution. The long filter h_t = mlp(positions_t) exp(-t |delta|) has a rate delta
for each channel.

Paper: Poli et al. 2023, arXiv:2302.10866, definition 3.1 and appendix A (order 2), as Arora et al. 2023,
arXiv:2312.04927, compare it.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.short_conv import ShortConvolution
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer
from gatewise.networks.sequence.mixers.base_conv import LongState, convolve, position_features


class HyenaState(NamedTuple):
    """State of Hyena: the last inputs of the short convolution and all inputs of the long one."""

    short: Tensor
    long: LongState


class HyenaFilter(nn.Module):
    """The long filter: max_length taps for each channel.

    An MLP over learned features of the positions, with sine activations whose learned frequencies all layers share.

    Args:
        position_dim: number of features per position: time, and a cosine and a sine for each band.
        hidden_dim: width of the MLP.
        inner_layers: number of linear layers between the first and the last.
        frequency: initial value of the frequencies.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        position_dim: int = 3,
        hidden_dim: int = 64,
        inner_layers: int = 2,
        frequency: float = 1.0,
    ) -> None:
        super().__init__()
        if position_dim < 3 or position_dim % 2 == 0:
            raise ValueError(f"position_dim must be odd (time, then pairs), 3 or more, not {position_dim}")
        self.positions = nn.Parameter(position_features(max_length, (position_dim - 1) // 2)[None])
        self.frequency = nn.Parameter(torch.full((1, hidden_dim), frequency))
        widths = [position_dim, *[hidden_dim] * (inner_layers + 1)]
        self.linears = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.linears.append(nn.Linear(hidden_dim, dim, bias=False))
        self.bias = nn.Parameter(torch.randn(dim))
        # Filters decay to 0.01 after 0.3 to 1.5 times the longest sequence.
        delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, dim)
        self.register_buffer("delta", delta, persistent=False)
        self.register_buffer("time", torch.linspace(0, 1, max_length)[:, None], persistent=False)

    def forward(self) -> Float[Tensor, "time dim"]:
        features = self.positions[0]
        for linear in self.linears[:-1]:
            features = (self.frequency * linear(features)).sin()
        return self.linears[-1](features) * (-self.time * self.delta.abs()).exp()


class Hyena(CausalMixer):
    """The Hyena operator of order 2: (B, T, D) -> (B, T, D). Keeps all inputs of the long convolution.

    Args:
        max_length: maximum number of tokens.
        short_width: kernel size of the short convolution.
    """

    def __init__(
        self,
        dim: int,
        max_length: int,
        short_width: int = 3,
        *,
        position_dim: int = 3,
        hidden_dim: int = 64,
        inner_layers: int = 2,
        frequency: float = 1.0,
    ) -> None:
        super().__init__()
        self.dim, self.max_length = dim, max_length
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.short_conv = ShortConvolution(3 * dim, short_width, bias=True)
        self.filter = HyenaFilter(dim, max_length, position_dim, hidden_dim, inner_layers, frequency)
        self.out_proj = nn.Linear(dim, dim)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: HyenaState | None
    ) -> tuple[Float[Tensor, "batch time dim"], HyenaState]:
        before, long = (None, None) if state is None else state
        mixed, tail = self.short_conv(self.in_proj(x), before)
        gate_in, gate_out, v = mixed.chunk(3, dim=-1)
        v = v * gate_in
        y, long = convolve(v, self.filter() if long is None else long.taps, long, self.max_length)
        y = (y + v * self.filter.bias) * gate_out
        return self.out_proj(y), HyenaState(tail, long)

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * self.dim * length
