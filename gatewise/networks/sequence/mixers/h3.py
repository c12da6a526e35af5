"""H3: a shift and a diagonal state space model, with products of projections between them.

    y = W_o(q * diagonal(shift(k) outer v))

The shift model compares a token with those shortly before it. The diagonal model remembers the product, a matrix of
head_dim x head_dim for each group of channels.

Paper: Fu et al. 2022, arXiv:2212.14052, section 3; the diagonal model: Gu et al. 2022, arXiv:2206.11893 (S4D), with the
bilinear rule.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from gatewise.networks.sequence.mixers._base import FLOAT_BYTES, CausalMixer, check_heads, check_length
from gatewise.ops.long_convolution import long_convolution


class ShiftKernel(nn.Module):
    """Taps k_l = sum_j B_j C_{j+l} of a state that shifts by one place per token: (state, D)."""

    def __init__(self, dim: int, state: int) -> None:
        super().__init__()
        # Only the first place takes the input: at the start the taps are C.
        first = torch.zeros(dim, state)
        first[:, 0] = 1
        self.B = nn.Parameter(first)
        self.C = nn.Parameter(torch.randn(1, dim, state))

    def forward(self) -> Float[Tensor, "state dim"]:
        state = self.B.shape[1]
        b, c = _wide(self.B), _wide(self.C[0])
        spectrum = torch.fft.rfft(b, n=2 * state).conj() * torch.fft.rfft(c, n=2 * state)
        return torch.fft.irfft(spectrum, n=2 * state)[:, :state].t()


class DiagonalState(NamedTuple):
    """Modes (B, h, h, D / h, N / 2) of a diagonal model, and inputs (B, h, h, T, D / h) that they do not yet hold.

    Inputs are absorbed only when the sequence continues, so training, which discards states, does not pay for it.
    """

    modes: Tensor
    pending: Tensor | None


class DiagonalModel(nn.Module):
    """y_t = 2 Re sum_n c_n h_n,t with h_t = a h_{t-1} + u_t for each channel: (B, h, h, T, C) -> (B, h, h, T, C).

    A = -exp(inv_A_real) + i A_imag is discretized by the bilinear rule with step exp(log_dt):

        a = (1 + dt A / 2) / (1 - dt A / 2),   c = B C dt / (1 - dt A / 2)

    Args:
        state: number of complex modes, counting their conjugates.
    """

    def __init__(self, channels: int, state: int) -> None:
        super().__init__()
        modes = state // 2
        low, high = math.log(1e-3), math.log(0.1)
        self.log_dt = nn.Parameter(low + (high - low) * torch.rand(channels))
        self.inv_A_real = nn.Parameter(torch.full((channels, modes), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(modes).float().repeat(channels, 1))
        one = torch.tensor([1.0, 0.0])
        self.B = nn.Parameter(one.repeat(channels, modes, 1))
        # Complex normal: variance 1/2 in each part.
        self.C = nn.Parameter(torch.randn(1, channels, modes, 2) * math.sqrt(0.5))

    def forward(
        self, u: Float[Tensor, "batch h1 h2 time channels"], state: DiagonalState | None
    ) -> tuple[Float[Tensor, "batch h1 h2 time channels"], DiagonalState]:
        log_a, c = self.discretized()
        time = u.shape[3]
        powers = self._powers(log_a, time)
        y = long_convolution(u, 2 * torch.einsum("gn,gnl->lg", c, powers).real)
        if state is None:
            return y, DiagonalState(self._no_modes(u), u)
        modes = self._caught_up(log_a, state)
        faded = log_a.exp()[..., None] * powers
        y = y + 2 * torch.einsum("bxygn,gn,gnl->bxylg", modes, c, faded).real.to(u.dtype)
        if time > 1:
            return y, DiagonalState(modes, u)
        return y, DiagonalState(modes * log_a.exp() + u[:, :, :, 0, :, None], None)

    def discretized(self) -> tuple[Complex[Tensor, "channels modes"], Complex[Tensor, "channels modes"]]:
        """Return log a and c."""
        dt = _wide(self.log_dt).exp()[:, None]
        half = dt * torch.complex(-_wide(self.inv_A_real).exp(), _wide(self.A_imag)) / 2
        b, c = torch.view_as_complex(_wide(self.B)), torch.view_as_complex(_wide(self.C[0]))
        return ((1 + half) / (1 - half)).log(), b * c * dt / (1 - half)

    def _caught_up(self, log_a: Tensor, state: DiagonalState) -> Tensor:
        """Return the modes after absorbing the pending inputs."""
        if state.pending is None:
            return state.modes
        time = state.pending.shape[3]
        powers = self._powers(log_a, time).flip(-1)
        taken_in = torch.einsum("bxylg,gnl->bxygn", state.pending.to(powers.dtype), powers)
        return state.modes * (log_a * time).exp() + taken_in

    @staticmethod
    def _powers(log_a: Tensor, time: int) -> Tensor:
        return (log_a[..., None] * torch.arange(time, device=log_a.device)).exp()

    def _no_modes(self, u: Tensor) -> Tensor:
        dtype = torch.complex128 if self.A_imag.dtype == torch.float64 else torch.complex64
        return torch.zeros(*u.shape[:3], *self.A_imag.shape, dtype=dtype, device=u.device)


def _wide(parameter: Tensor) -> Tensor:
    """Convert to at least float32: complex numbers and transforms have no half precision."""
    return parameter if parameter.dtype == torch.float64 else parameter.float()


class H3State(NamedTuple):
    """State of H3: keys within reach of the shift model (B, state - 1, D), and the state of the diagonal model."""

    keys: Tensor
    diagonal: DiagonalState


class H3(CausalMixer):
    """The H3 operator: (B, T, D) -> (B, T, D).

    Args:
        max_length: maximum number of tokens per call.
        d_state: number of taps of the shift model and of modes of the diagonal one.
        head_dim: channels per group; products of keys and values are remembered within a group.
    """

    def __init__(self, dim: int, max_length: int, d_state: int, head_dim: int = 2) -> None:
        super().__init__()
        check_heads(dim, head_dim)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state counts conjugate pairs: it is even and positive, not {d_state}")
        self.dim, self.max_length, self.d_state, self.head_dim = dim, max_length, d_state, head_dim
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.shift = ShiftKernel(dim, d_state)
        self.shift_skip = nn.Parameter(torch.randn(dim))
        self.diagonal = DiagonalModel(dim // head_dim, d_state)
        self.diagonal_skip = nn.Parameter(torch.randn(dim // head_dim))
        self.o_proj = nn.Linear(dim, dim)

    def run(
        self, x: Float[Tensor, "batch time dim"], state: H3State | None
    ) -> tuple[Float[Tensor, "batch time dim"], H3State]:
        check_length(x.shape[1], self.max_length)
        past, diagonal = (None, None) if state is None else state
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        keys = k if past is None else torch.cat([past, k], dim=1)
        k = long_convolution(k, self.shift(), past) + k * self.shift_skip
        kv = self._in_groups(k)[:, :, None] * self._in_groups(v)[:, None]
        y, diagonal = self.diagonal(kv, diagonal)
        y = y + kv * self.diagonal_skip
        # Heads of the values come before groups in the channels of the result.
        y = (y * self._in_groups(q)[:, :, None]).sum(dim=1).transpose(1, 2).flatten(2)
        reached = keys[:, max(0, keys.shape[1] - self.d_state + 1) :]
        return self.o_proj(y), H3State(reached, diagonal)

    def state_bytes(self, length: int) -> int:
        return FLOAT_BYTES * self.dim * self.d_state

    def _in_groups(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, head_dim, T, D / head_dim); channels are groups of head_dim."""
        return x.unflatten(-1, (-1, self.head_dim)).permute(0, 3, 1, 2)
