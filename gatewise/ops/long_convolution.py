"""Causal convolution per channel, with a filter that may be as long as the sequence.

    y_t = sum_{j=0}^{t} taps_j x_{t-j}         taps_j = 0 beyond the last tap

Computed by an FFT of twice the length, so that nothing wraps around: O(T log T) instead of O(T^2).

Source: Poli et al. 2023, arXiv:2302.10866 (Hyena), section 2.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def long_convolution(
    x: Float[Tensor, "*batch time dim"],
    taps: Float[Tensor, "taps dim"],
    past: Float[Tensor, "*batch before dim"] | None = None,
) -> Float[Tensor, "*batch time dim"]:
    """Return the outputs for `x`, in its dtype. Half precision is transformed in float32.

    Args:
        past: inputs that precede `x`.
    Raises:
        ValueError: if the channels disagree.
    """
    if taps.shape[1] != x.shape[-1]:
        raise ValueError(f"a filter has a column per channel: {x.shape[-1]} channels, taps {tuple(taps.shape)}")
    inputs = x if past is None else torch.cat([past.to(x.dtype), x], dim=-2)
    taps = taps[: inputs.shape[-2]]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs, taps = inputs.to(wide), taps.to(wide)
    # A single output is one weighted sum; the transform would also compute all those before it.
    y = _last_output(inputs, taps) if x.shape[-2] == 1 else _through_fft(inputs, taps)[..., -x.shape[-2] :, :]
    return y.to(x.dtype)


def long_convolution_reference(
    x: Float[Tensor, "*batch time dim"], taps: Float[Tensor, "taps dim"]
) -> Float[Tensor, "*batch time dim"]:
    """Compute the definition."""
    outputs = []
    for t in range(x.shape[-2]):
        used = min(t + 1, len(taps))
        outputs.append(sum((taps[j] * x[..., t - j, :] for j in range(used)), torch.zeros_like(x[..., 0, :])))
    return torch.stack(outputs, dim=-2)


def _last_output(inputs: Tensor, taps: Tensor) -> Tensor:
    reached = inputs[..., inputs.shape[-2] - taps.shape[0] :, :]
    return (reached * taps.flip(0)).sum(dim=-2, keepdim=True)


def _through_fft(inputs: Tensor, taps: Tensor) -> Tensor:
    time = inputs.shape[-2]
    # Transforms run over the last axis, where memory is contiguous.
    spectrum = torch.fft.rfft(inputs.transpose(-1, -2), n=2 * time) * torch.fft.rfft(taps.t(), n=2 * time)
    return torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(-1, -2)
