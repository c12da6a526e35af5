"""Split sequences into chunks, group chunks into segments, and find where each token of a scan is in memory.

A segment is a run of chunks that is processed at a time. `load` copies its tokens from (batch, time, heads, width) to
contiguous blocks (chunks * batch * heads, groups * size, width), in scan order and in the accumulation's dtype; `store`
copies blocks back. Chunks come first, so that the states of one chunk are contiguous. Sequences of different lengths
and the scan from the end differ only in their pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_CHUNK = 64
SEGMENT_TOKENS = 1024
"""Tokens per segment: enough for batched products, few enough that a segment's data stay in the cache."""


class Piece(NamedTuple):
    """`chunks` chunks of `length` consecutive tokens, from token `token` on; in the segment from chunk `chunk` on."""

    chunk: int
    chunks: int
    length: int
    token: int


@dataclass
class Segment:
    """A run of chunks. `starts` and `ends` map a chunk to the sequence whose first or last chunk it is."""

    size: int
    reverse: bool
    chunks: int = 0
    pieces: list[Piece] = field(default_factory=list)
    starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)

    def load(self, tokens: Tensor, dtype: torch.dtype, groups: int = 1) -> Tensor:
        """Copy (batch, time, heads * groups, width) to (blocks, groups * size, width); rows without a token are 0."""
        batch, _, heads, width = tokens.shape
        full = all(piece.length == self.size for piece in self.pieces)
        make = torch.empty if full else torch.zeros
        shape = (self.chunks, batch, heads // groups, groups, self.size, width)
        blocks = make(shape, dtype=dtype, device=tokens.device)
        for piece in self.pieces:
            self._rows(blocks, piece).copy_(self._tokens(tokens, piece, groups))
        return blocks.flatten(3, 4).flatten(0, 2)

    def store(self, tokens: Tensor, blocks: Tensor, groups: int = 1) -> None:
        """Write blocks of the shape that `load` returns to their tokens."""
        batch, _, heads, width = tokens.shape
        blocks = blocks.view(self.chunks, batch, heads // groups, groups, self.size, width)
        for piece in self.pieces:
            rows = self._rows(blocks, piece)
            if self.reverse:
                rows = rows.flip(0, 4)
            lines = tokens[:, piece.token : piece.token + piece.chunks * piece.length]
            _by_chunk(lines, piece, groups).copy_(rows)

    def _rows(self, blocks: Tensor, piece: Piece) -> Tensor:
        return blocks[piece.chunk : piece.chunk + piece.chunks, :, :, :, : piece.length]

    def _tokens(self, tokens: Tensor, piece: Piece, groups: int) -> Tensor:
        lines = tokens[:, piece.token : piece.token + piece.chunks * piece.length]
        return _by_chunk(lines.flip(1) if self.reverse else lines, piece, groups)


def _by_chunk(lines: Tensor, piece: Piece, groups: int) -> Tensor:
    """View (batch, chunks * length, heads * groups, width) as (chunks, batch, heads, groups, length, width)."""
    lines = lines.unflatten(2, (-1, groups)).unflatten(1, (piece.chunks, piece.length))
    return lines.permute(1, 0, 3, 4, 2, 5)


def cut(bounds: Sequence[int], chunk: int, reverse: bool) -> list[Segment]:
    """Return segments of the sequences between successive bounds, in scan order within each sequence."""
    size = 1 << (chunk - 1).bit_length()
    most = -(-SEGMENT_TOKENS // chunk)
    segments = [Segment(size, reverse)]
    for sequence, (begin, end) in enumerate(pairwise(bounds)):
        done = 0
        while done < end - begin:
            if segments[-1].chunks == most:
                segments.append(Segment(size, reverse))
            segment, left = segments[-1], end - begin - done
            count, length = (min(most - segment.chunks, left // chunk), chunk) if left >= chunk else (1, left)
            if done == 0:
                segment.starts[segment.chunks] = sequence
            first = end - done - count * length if reverse else begin + done
            segment.pieces.append(Piece(segment.chunks, count, length, first))
            segment.chunks += count
            done += count * length
            if done == end - begin:
                segment.ends[segment.chunks - 1] = sequence
    return segments


def chunk_length(time: int, sequences: int) -> int:
    """Return tokens per chunk from shapes only: short chunks waste less on the last, long ones take fewer steps."""
    mean = -(-time // max(1, sequences))
    return 16 if mean <= 16 else 32 if mean <= 1024 else LONGEST_CHUNK


def most_segments(time: int, sequences: int) -> int:
    """Return an upper bound on the segments that `cut` makes of `sequences` sequences with `time` tokens in total.

    It assumes the usual chunks. For tracing with any time it has no branch, and never returns 1, which would be
    treated as a constant.
    """
    return (time + sequences * LONGEST_CHUNK) // SEGMENT_TOKENS + 2
