"""BaseConv: the smallest gated convolution, the common core of H3, Hyena and similar mixers.

    y = conv(u) * linear(u) + u

The convolution is short (a kernel per channel) or as long as the sequence. The long filter is either a parameter or the
output of a small MLP over positions. The long convolution has its own skip connection.

Paper: Arora et al. 2023, arXiv:2312.04927, section 4 and appendix C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.short_conv import ShortConvolution
from gatewise.networks.sequence._base import State
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer, check_length
from gatewise.ops.long_convolution import long_convolution


class LongState(NamedTuple):
    """State of a long convolution: all inputs so far (B, T, D), and its filter, to avoid recomputing it."""

    inputs: Tensor
    taps: Tensor


class ExplicitFilter(nn.Module):
    """A filter whose taps are parameters."""

    def __init__(self, dim: int, max_length: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(dim, max_length))

    def forward(self) -> Float[Tensor, "time dim"]:
        return self.taps.t()


class ImplicitFilter(nn.Module):
    """A filter that an MLP computes from frozen features of the positions."""

    def __init__(self, dim: int, max_length: int, hidden_dim: int = 16) -> None:
        super().__init__()
        self.positions = nn.Parameter(position_features(max_length)[None], requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(3, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))

    def forward(self) -> Float[Tensor, "time dim"]:
        return self.mlp(self.positions[0])


class LongConvolution(nn.Module):
    """Causal convolution with a filter of `max_length` taps, plus the input: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, max_length: int, implicit: bool = True) -> None:
        super().__init__()
        self.max_length = max_length
        self.filter = ImplicitFilter(dim, max_length) if implicit else ExplicitFilter(dim, max_length)

    def forward(
        self, x: Float[Tensor, "batch time dim"], state: LongState | None = None
    ) -> tuple[Float[Tensor, "batch time dim"], LongState]:
        taps = self.filter() if state is None else state.taps
        y, state = convolve(x, taps, state, self.max_length)
        return y + x, state


class BaseConv(CausalMixer):
    """Convolution times projection, plus the input: (B, T, D) -> (B, T, D).

    Args:
        kernel_size: kernel size of a short convolution; -1 for a long one.
        max_length: maximum number of tokens of a long convolution.
        implicit: whether an MLP computes the long filter; otherwise its taps are parameters.
        use_act: whether to apply SiLU to both factors.
    """

    def __init__(
        self, dim: int, kernel_size: int = 3, max_length: int = 64, implicit: bool = True, use_act: bool = False
    ) -> None:
        super().__init__()
        if kernel_size != -1 and kernel_size < 1:
            raise ValueError(f"kernel_size must be positive, or -1 for a long convolution, not {kernel_size}")
        self.dim, self.use_act = dim, use_act
        self.projection = nn.Linear(dim, dim)
        self.long_conv = LongConvolution(dim, max_length, implicit) if kernel_size == -1 else None
        self.short_conv = ShortConvolution(dim, kernel_size, bias=True) if kernel_size != -1 else None

    def run(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Float[Tensor, "batch time dim"], State]:
        convolution = self.short_conv if self.short_conv is not None else self.long_conv
        mixed, state = convolution(x, state)
        gate = self.projection(x)
        if self.use_act:
            mixed, gate = F.silu(mixed), F.silu(gate)
        return mixed * gate + x, state

    def state_bytes(self, length: int) -> int:
        kept = length if self.short_conv is None else self.short_conv.kernel_size[0]
        return FLOAT_BYTES * self.dim * kept


def convolve(
    x: Float[Tensor, "batch time dim"], taps: Float[Tensor, "taps dim"], state: LongState | None, max_length: int
) -> tuple[Float[Tensor, "batch time dim"], LongState]:
    """Apply the long convolution to a whole or continued sequence; return the output and the new state.

    Raises:
        ValueError: if the sequence is longer than the filter.
    """
    past = None if state is None else state.inputs
    inputs = x if past is None else torch.cat([past, x], dim=1)
    check_length(inputs.shape[1], max_length)
    return long_convolution(x, taps, past), LongState(inputs, taps)


def position_features(max_length: int, bands: int = 1) -> Float[Tensor, "time features"]:
    """Return time in [0, 1], then the real and imaginary parts of exp(-i f w) at w = 2 pi t / max_length.

    Args:
        bands: number of frequencies f, evenly spaced from 1e-4 to bands - 1.
    """
    time = torch.linspace(0, 1, max_length)[:, None]
    angles = 2 * math.pi * torch.arange(max_length)[:, None] / max_length * torch.linspace(1e-4, bands - 1, bands)
    return torch.cat([time, angles.cos(), -angles.sin()], dim=-1)
