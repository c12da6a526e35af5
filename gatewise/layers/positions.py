"""Learned positions of a grid of patches, and their flat form in checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_positions(
    positions: Float[Tensor, "1 rows columns dim"], grid: tuple[int, int]
) -> Float[Tensor, "1 _ _ dim"]:
    """Resize position embeddings to a grid: bicubic, half-pixel centers, no antialiasing.

    Embeddings that fit are returned unchanged. Half precision is resized in float32.
    """
    if tuple(positions.shape[1:3]) == grid:
        return positions
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32)).permute(0, 3, 1, 2)
    return F.interpolate(wide, grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)


def with_positions_resized(state: Mapping[str, Tensor], key: str, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the positions under `key`, if present, resized to a grid."""
    return {**state, key: resize_positions(state[key], grid)} if key in state else dict(state)


def row_to_grid(row: Float[Tensor, "1 tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "1 _ _ dim"]:
    """Reshape positions in one row to a map: to `grid` if they fill it, else to a square.

    Positions of another image size are assumed to come from a square.
    """
    tokens = row.shape[1]
    side = math.isqrt(tokens)
    return row.unflatten(1, grid if tokens == math.prod(grid) else (side, tokens // side))


def row_of_positions(
    key: str, grid: tuple[int, int]
) -> tuple[Callable[[str, Tensor], Tensor], Callable[[str, Tensor], Tensor]]:
    """Return `tensor_to_ours` and `tensor_to_theirs` of a key layout with flat positions under `key`."""

    def to_ours(theirs: str, tensor: Tensor) -> Tensor:
        return row_to_grid(tensor, grid) if theirs == key else tensor

    def to_theirs(theirs: str, tensor: Tensor) -> Tensor:
        return tensor.flatten(1, 2) if theirs == key else tensor

    return to_ours, to_theirs
