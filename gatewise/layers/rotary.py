"""Rotary position embedding, in the half-split form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def inverse_frequencies(head_dim: int, base: float = 10000.0, device: torch.device | None = None) -> Tensor:
    """Return base^(-2i / head_dim) for i = 0 .. head_dim / 2 - 1, in float32.

    Raises:
        ValueError: if the width is odd, so that its channels cannot be paired.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head width, not {head_dim}")
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


def rotate(
    x: Float[Tensor, "batch time heads head_dim"],
    positions: Int[Tensor, " time"],
    frequencies: Float[Tensor, " half"],
    magnitude: float = 1.0,
) -> Float[Tensor, "batch time heads head_dim"]:
    """Rotate channels i and i + head_dim / 2 of `x` by positions * frequencies[i]. Angles are in float32.

    Source: Su et al. 2021, arXiv:2104.09864, eq. (15); the pairing of halves is that of the GPT-NeoX family.

    Args:
        magnitude: factor on cosine and sine (YaRN's attention temperature).
    """
    return rotate_by(x, *rotation(positions, frequencies, magnitude))


def rotation(
    positions: Int[Tensor, " time"], frequencies: Float[Tensor, " half"], magnitude: float = 1.0
) -> tuple[Float[Tensor, "time half"], Float[Tensor, "time half"]]:
    """Return `magnitude` times cosine and sine of positions * frequencies, in float32, for `rotate_by`."""
    angles = positions.to(torch.float32)[:, None] * frequencies.to(torch.float32)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate_by(
    x: Float[Tensor, "batch time heads head_dim"], cos: Float[Tensor, "time half"], sin: Float[Tensor, "time half"]
) -> Float[Tensor, "batch time heads head_dim"]:
    """Rotate the halves of `x` by the result of `rotation`."""
    cos, sin = cos.to(x.dtype)[:, None, :], sin.to(x.dtype)[:, None, :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
