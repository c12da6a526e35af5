"""Mamba: a state space model whose step size, input and output projections depend on the token.

Paper: Gu and Dao 2023, arXiv:2312.00752, section 3.4 and figure 3; initial values follow section 3.6.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.short_conv import ShortConvolution
from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer
from gatewise.ops.selective_scan import selective_scan


class MambaState(NamedTuple):
    """Last inputs of the convolution (B, width - 1, inner), and recurrent state (B, inner, d_state)."""

    inputs: Tensor
    matrix: Tensor


class Mamba(CausalMixer):
    """out_proj((scan(silu(conv(x))) + D x) * silu(z)), with x and z from one projection: (B, T, D) -> (B, T, D).

    Args:
        d_state: state size per inner channel.
        expand: number of inner channels relative to `dim`.
        conv_width: kernel size of the short convolution.
        dt_rank: width between the two linear layers that compute the step sizes; None for dim / 16, rounded up.
    """

    def __init__(
        self, dim: int, d_state: int = 16, expand: int = 2, conv_width: int = 4, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        if d_state < 1:
            raise ValueError(f"d_state must be positive, not {d_state}")
        self.d_state, self.inner_dim = d_state, expand * dim
        self.dt_rank = dt_rank or math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * self.inner_dim, bias=False)
        self.conv = ShortConvolution(self.inner_dim, conv_width, bias=True)
        self.x_proj = nn.Linear(self.inner_dim, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner_dim, bias=False)
        # A separate parameter, so that it keeps its initial value when the biases of linear layers are set to 0.
        self.dt_bias = nn.Parameter(_steps_between(1e-3, 0.1, self.inner_dim))
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.inner_dim, 1))
        self.D = nn.Parameter(torch.ones(self.inner_dim))
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=False)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: MambaState | None
    ) -> tuple[Float[Tensor, "batch time dim"], MambaState]:
        inputs, matrix = (None, None) if state is None else state
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x, inputs = self.conv(x, inputs)
        x = F.silu(x)
        dt, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt) + self.dt_bias)
        y, matrix = selective_scan(x, dt, -self.A_log.exp(), b, c, matrix)
        return self.out_proj((y + self.D * x) * F.silu(z)), MambaState(inputs, matrix)

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * self.inner_dim * self.d_state


def _steps_between(low: float, high: float, channels: int) -> Float[Tensor, " channels"]:
    """Return inverse-softplus values whose softplus is log-uniform between `low` and `high`."""
    steps = torch.exp(math.log(low) + (math.log(high) - math.log(low)) * torch.rand(channels))
    return steps + torch.log(-torch.expm1(-steps))
