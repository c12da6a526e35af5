"""Rotary positions on a grid: half of the channel pairs rotate with the row, the other half with the column."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def grid_rotation(
    size: tuple[int, int], dim: int, base: float = 10000.0, device: torch.device | None = None
) -> tuple[Float[Tensor, "rows columns pairs"], Float[Tensor, "rows columns pairs"]]:
    """Return cosine and sine, in float32, of the rotation of each of the dim / 2 channel pairs at each position.

    The first dim / 4 pairs rotate by row * base^(-i / (dim / 4)), the others by column times the same factor.

    Raises:
        ValueError: if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"rotary positions on a grid need a multiple of 4 channels, not {dim}")
    frequencies = base ** (-torch.arange(dim // 4, dtype=torch.float32, device=device) / (dim // 4))
    rows, columns = (torch.arange(length, dtype=torch.float32, device=device) for length in size)
    down = (rows[:, None] * frequencies)[:, None].expand(-1, size[1], -1)
    across = (columns[:, None] * frequencies)[None].expand(size[0], -1, -1)
    angles = torch.cat([down, across], dim=-1)
    return angles.cos(), angles.sin()


def rotate_pairs(
    x: Float[Tensor, "*batch dim"], cos: Float[Tensor, "*grid pairs"], sin: Float[Tensor, "*grid pairs"]
) -> Float[Tensor, "*batch dim"]:
    """Rotate neighboring channels (2j, 2j + 1) of `x` as one complex number, in real arithmetic."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
