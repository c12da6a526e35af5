"""Packed sequences: several sequences concatenated in one row, with boundaries 0 = c_0 <= c_1 <= ... = T."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


def sequence_slices(cu_seqlens: Int[Tensor, " boundaries"]) -> list[slice]:
    """Return the slice of each non-empty sequence."""
    bounds = cu_seqlens.tolist()
    return [slice(start, end) for start, end in pairwise(bounds) if end > start]


def positions_in_sequence(cu_seqlens: Int[Tensor, " boundaries"], length: int) -> Int[Tensor, " time"]:
    """Return the position of every token within its own sequence."""
    steps = torch.arange(length, device=cu_seqlens.device)
    return steps - cu_seqlens[sequence_index(cu_seqlens, length)]


def sequence_index(cu_seqlens: Int[Tensor, " boundaries"], length: int) -> Int[Tensor, " time"]:
    """Return the index of the sequence that every token belongs to."""
    steps = torch.arange(length, device=cu_seqlens.device)
    return torch.bucketize(steps, cu_seqlens[1:].to(steps.dtype), right=True)
