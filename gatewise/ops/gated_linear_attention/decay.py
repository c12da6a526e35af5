"""Decay between the tokens of a chunk, and the decayed scores, for gated linear attention.

Within a chunk the outputs are a matrix of scores times the values:

    A_ij = sum_c q_ic k_jc exp(g_{j+1,c} + ... + g_ic)   for j < i,     A_ii = q_i . k_i

The sums are non-positive, but the factors exp(g_1 + ... + g_i) and exp(-(g_1 + ... + g_j)) leave the range of floats.
`ChannelDecay` therefore splits the chunk in two halves. It writes the scores of the later half's queries and the
earlier half's keys as one matrix product around the later half's first row, and does the same inside each half, down to
single tokens. Every exponent is then a sum of gates, so non-positive and free of cancellation, and every row needs one
exponential per level. This is the secondary chunking of Yang et al. 2023, arXiv:2312.06635, section 4.3, carried to the
end. `HeadDecay` handles one gate per head, where the decay is a matrix of numbers.

Shapes: blocks are chunks of all rows (sequences times heads of k), `size` is a power of two. Queries have an axis of
`groups` before `size`: the heads that share a key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """Factors of queries in the later and of keys in the earlier half of each pair: (blocks, pairs, half, K)."""

    half: int
    queries: Tensor
    keys: Tensor


class ChannelDecay:
    """Decay with one gate per key channel. Gates: (blocks, size, key_dim), at most 0 and finite.

    `from_start`, `to_end` (blocks, size, key_dim) and `total` (blocks, key_dim) are the decays from the chunk's entry
    to a row, from a row to the chunk's exit and through the chunk. They exist once the scores have been computed.
    """

    from_start: Tensor
    to_end: Tensor
    total: Tensor

    def __init__(self, gates: Tensor) -> None:
        self.gates = gates

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Map q (blocks, groups, size, K), k (blocks, size, K) to (blocks, groups, size, size), lower triangular."""
        blocks, groups, size, _ = q.shape
        scores = q.new_zeros(blocks, groups, size, size)
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k[:, None]).sum(-1))
        for level in self._levels():
            _lower_blocks(scores, level.half).copy_(_unmerge(torch.bmm(*_factors(q, k, level)), groups, level))
        return scores

    def scores_and_gradients(self, q: Tensor, k: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, and gradients of q and k through those below the diagonal. `dscores` above it is ignored."""
        groups = q.shape[1]
        scores = torch.zeros_like(dscores)
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k[:, None]).sum(-1))
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for level in self._levels():
            late, early = _factors(q, k, level)
            _lower_blocks(scores, level.half).copy_(_unmerge(torch.bmm(late, early), groups, level))
            dblock = _merge(_lower_blocks(dscores, level.half))
            dlate = _unmerge(torch.bmm(dblock, early.mT), groups, level)
            dearly = torch.bmm(dblock.mT, late).view_as(level.keys)
            _halves(dq, level.half)[:, :, :, 1].addcmul_(dlate.transpose(1, 2), level.queries[:, None])
            _halves(dk, level.half)[:, :, 0].addcmul_(dearly, level.keys)
        return scores, dq, dk

    def _levels(self) -> Iterator[Level]:
        """Yield levels from single tokens up to halves of the chunk, then set the decays to the chunk's borders.

        `before` holds, for each row, the sum of its part's gates up to the row, without the part's first gate; `after`
        holds the sum of the gates after the row. Both grow from level to level.
        """
        before, after = torch.zeros_like(self.gates), torch.zeros_like(self.gates)
        half = 1
        while half < self.gates.shape[1]:
            gates, starts, ends = (_halves(tensor, half) for tensor in (self.gates, before, after))
            first = gates[:, :, 1, :1]
            ends[:, :, 0] += first
            yield Level(half, starts[:, :, 1].exp(), ends[:, :, 0].exp())
            ends[:, :, 0] += starts[:, :, 1, -1:]
            starts[:, :, 1] += starts[:, :, 0, -1:] + first
            half *= 2
        self.from_start = before.add_(self.gates[:, :1]).exp_()
        self.to_end = after.exp_()
        self.total = self.from_start[:, -1]


class HeadDecay:
    """Decay with one gate per head. Gates: (blocks, size, 1). Equals `ChannelDecay` with equal gates in a head."""

    def __init__(self, gates: Tensor) -> None:
        # Differences of sums lose accuracy: float64 keeps them exact enough, and there are few of them.
        sums = gates[..., 0].double().cumsum(1)
        above = torch.ones(sums.shape[1], sums.shape[1], dtype=torch.bool, device=sums.device).triu(1)
        differences = (sums[:, :, None] - sums[:, None, :]).to(gates.dtype)
        self.between = differences.masked_fill_(above, -torch.inf).exp_()
        self.from_start = sums.exp()[..., None].to(gates.dtype)
        self.to_end = (sums[:, -1:] - sums).exp()[..., None].to(gates.dtype)
        self.total = self.from_start[:, -1]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        blocks, groups, size, _ = q.shape
        products = torch.bmm(q.flatten(1, 2), k.mT).view(blocks, groups, size, size)
        return products.mul_(self.between[:, None])

    def scores_and_gradients(self, q: Tensor, k: Tensor, dscores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The diagonal's parts of both gradients would cancel in the gates' gradient up to rounding.
        dproducts = (dscores * self.between[:, None]).tril_(-1).flatten(1, 2)
        dq = torch.bmm(dproducts, k).view_as(q)
        dk = torch.bmm(dproducts.mT, q.flatten(1, 2))
        return self.scores(q, k), dq, dk


def _halves(tensor: Tensor, half: int) -> Tensor:
    """View (..., size, K) as (..., pairs, 2, half, K)."""
    return tensor.unflatten(-2, (-1, 2, half))


def _lower_blocks(scores: Tensor, half: int) -> Tensor:
    """View the blocks of later queries and earlier keys: (blocks, pairs, groups, half, half)."""
    pairs = scores.unflatten(-1, (-1, 2, half)).unflatten(2, (-1, 2, half))
    return pairs[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).permute(0, 4, 1, 2, 3)


def _factors(q: Tensor, k: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Return decayed queries (blocks * pairs, groups * half, K) and keys (blocks * pairs, K, half)."""
    late = _halves(q, level.half)[:, :, :, 1] * level.queries[:, None]
    early = _halves(k, level.half)[:, :, 0] * level.keys
    return _merge(late.transpose(1, 2)), early.flatten(0, 1).mT


def _merge(tensor: Tensor) -> Tensor:
    """Reshape (blocks, pairs, groups, half, n) to (blocks * pairs, groups * half, n)."""
    return tensor.flatten(2, 3).flatten(0, 1)


def _unmerge(tensor: Tensor, groups: int, level: Level) -> Tensor:
    """Reshape (blocks * pairs, groups * half, n) to (blocks, pairs, groups, half, n)."""
    blocks, pairs = level.keys.shape[:2]
    return tensor.view(blocks, pairs, groups, level.half, tensor.shape[-1])
