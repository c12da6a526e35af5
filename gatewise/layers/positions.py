"""Learned positions of a grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_positions(
    positions: Float[Tensor, "1 rows columns dim"], grid: tuple[int, int]
) -> Float[Tensor, "1 _ _ dim"]:
    """Position embeddings for another grid: bicubic, half-pixel centres, no smoothing when it shrinks.

    Ones that fit are returned as they are; half precision is resized in float32.
    """
    if tuple(positions.shape[1:3]) == grid:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32)).permute(0, 3, 1, 2)
    return F.interpolate(wide, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
