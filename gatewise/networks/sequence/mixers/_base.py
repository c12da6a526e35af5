"""Helpers shared by the mixers: packed sequences, and the size of their state."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gatewise.layers.packing import sequence_slices
from gatewise.networks.sequence._base import SequenceMixer, State

FLOAT_BYTES = 4
"""State sizes are compared in float32."""


class CausalMixer(SequenceMixer):
    """A mixer that defines `run` for whole rows. Packed sequences become the rows of a padded batch.

    The padding follows each sequence, where a mixer that never looks ahead does not see it.
    """

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: State = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        if cu_seqlens is None:
            return self.run(x, state)
        return joined(self.run(padded(x, cu_seqlens), None)[0], cu_seqlens), None

    def run(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Float[Tensor, "batch time dim"], State]:
        """Return the outputs and the state after the last token."""
        raise NotImplementedError

    def state_bytes(self, length: int) -> int:
        """Return the size of the state that generation keeps for `length` tokens, in bytes of float32."""
        raise NotImplementedError


def padded(
    x: Shaped[Tensor, "1 time *rest"], cu_seqlens: Int[Tensor, " boundaries"]
) -> Shaped[Tensor, "sequences longest *rest"]:
    """Return the sequences of one packed row as separate rows, zero-padded at the end."""
    return pad_sequence([x[0, piece] for piece in sequence_slices(cu_seqlens)], batch_first=True)


def joined(
    rows: Float[Tensor, "sequences longest dim"], cu_seqlens: Int[Tensor, " boundaries"]
) -> Float[Tensor, "1 time dim"]:
    """Concatenate rows into one packed row, the inverse of `padded`."""
    pieces = sequence_slices(cu_seqlens)
    return torch.cat([row[: piece.stop - piece.start] for row, piece in zip(rows, pieces, strict=True)])[None]


def check_heads(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless the width is divisible by the number of heads."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"the width must be divisible by the heads, not {dim} by {num_heads}")


def check_length(length: int, max_length: int) -> None:
    """Raise a ValueError if a filter is shorter than a sequence."""
    if length > max_length:
        raise ValueError(f"the filters are made for at most max_length={max_length} tokens, not {length}")
