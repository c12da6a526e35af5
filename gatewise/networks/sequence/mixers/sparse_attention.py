"""Attention from a few positions only, chosen by their content.

Recall needs attention where a token occurred before, and hardly anywhere else. Positions are chosen either by that rule
(programmatic) or by a learned score.

Paper: Arora et al. 2023, arXiv:2312.04927, section 5 and appendix E (input-dependent sparse attention).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatewise.layers.causal_attention import KeyValueCache, causal_attention, extend_cache
from gatewise.layers.packing import sequence_index, sequence_slices
from gatewise.networks.sequence._base import State
from gatewise.networks.sequence.mixers._base import joined, padded
from gatewise.networks.sequence.mixers.attention import Attention


class ProgrammaticAttention(Attention):
    """Attention at the selected positions, zero elsewhere: (B, T, D) -> (B, T, D).

    The network, which knows the tokens, selects those that occurred before (see `occurred_before`).
    """

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueCache | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
        selected: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueCache | None]:
        """Return outputs and all keys and values. Without a selection, every position attends."""
        if selected is None:
            return super().forward(x, state, cu_seqlens)
        if cu_seqlens is None:
            return self._run_selected(x, state, selected)
        y, _ = self._run_selected(padded(x, cu_seqlens), None, padded(selected, cu_seqlens))
        return joined(y, cu_seqlens), None

    def _run_selected(self, x: Tensor, state: KeyValueCache | None, selected: Tensor) -> tuple[Tensor, KeyValueCache]:
        q, k, v = self.project(x)
        cache = extend_cache(state, k, v)
        y = self.out_proj(attend_from(q, cache, selected, self.dropout if self.training else 0.0))
        return y * selected[..., None], cache


class LearnedState(NamedTuple):
    """State of learned selection: keys and values of all tokens so far, and their scores (B, T)."""

    cache: KeyValueCache
    scores: Tensor


class LearnedSelectionAttention(Attention):
    """Attention scaled by a score of the position, plus the input: (B, T, D) -> (B, T, D).

    In training every position attends, y = score attention(x) + x with score = sigmoid(w x), and `penalty` holds the
    loss that keeps the scores few: 0.001 max(0, mean score - k / T). In evaluation only the k best positions attend.

    Args:
        k: number of positions that attend; None for sqrt(T), rounded up.
        look_ahead: whether to choose the best k of the whole sequence, as published. The choice at a position then
            depends on later tokens, and the sequence cannot be continued. Otherwise, a position attends if its score is
            among the best k up to itself, where T is its own place.
    """

    penalty: Tensor | None = None

    def __init__(
        self, dim: int, num_heads: int = 1, dropout: float = 0.1, k: int | None = None, look_ahead: bool = False
    ) -> None:
        super().__init__(dim, num_heads, dropout)
        if k is not None and k < 1:
            raise ValueError(f"the number of selected positions must be positive, not {k}")
        self.k, self.look_ahead = k, look_ahead
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: LearnedState | None = None,
        cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], LearnedState | None]:
        self.penalty = self._penalty(x, cu_seqlens) if self.training else None
        if self.look_ahead and cu_seqlens is not None:
            # The padding of a batch would compete in the choice.
            pieces = [self.run(x[:, piece], None)[0] for piece in sequence_slices(cu_seqlens)]
            return torch.cat(pieces, dim=1), None
        return super().forward(x, state, cu_seqlens)

    def run(self, x: Float[Tensor, "batch time dim"], state: State) -> tuple[Float[Tensor, "batch time dim"], State]:
        if self.look_ahead and state is not None and not self.training:
            raise ValueError("a selection over the whole sequence cannot be continued: pass look_ahead=False")
        q, k, v = self.project(x)
        scores = self._scores(x)
        seen = scores if state is None else torch.cat([state.scores, scores], dim=1)
        cache = extend_cache(None if state is None else state.cache, k, v)
        if self.training:
            y = causal_attention(q, cache.keys, cache.values, dropout=self.dropout).flatten(2)
        else:
            chosen = self._selected(seen)[:, -x.shape[1] :]
            y, scores = attend_from(q, cache, chosen), scores * chosen
        return self.out_proj(y) * scores[..., None] + x, LearnedState(cache, seen)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, without the penalty, which belongs to a forward pass of this module."""
        return self.__dict__ | {"penalty": None}

    def _scores(self, x: Tensor) -> Tensor:
        return self.score(x).squeeze(-1).sigmoid()

    def _penalty(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        lengths = [x.shape[1]] if cu_seqlens is None else [p.stop - p.start for p in sequence_slices(cu_seqlens)]
        share = sum(self._count(length) for length in lengths) / x.shape[1]
        return 0.001 * F.relu(self._scores(x).mean() - share)

    def _count(self, length: int) -> int:
        return min(length, self.k or math.isqrt(length - 1) + 1)

    def _selected(self, scores: Tensor) -> Tensor:
        """Return a mask of the positions so far that attend in evaluation."""
        if self.look_ahead:
            best = scores.topk(self._count(scores.shape[1]), dim=1).indices
            return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        steps = torch.arange(scores.shape[1], device=scores.device)
        # Among equal scores, the earlier one is better.
        better = (scores[:, None] >= scores[..., None]) & (steps < steps[:, None])
        counts = self.k if self.k is not None else (steps + 1).double().sqrt().ceil()
        return better.sum(dim=-1) < counts


def attend_from(
    q: Float[Tensor, "batch time heads head_dim"],
    cache: KeyValueCache,
    selected: Bool[Tensor, "batch time"],
    dropout: float = 0.0,
) -> Float[Tensor, "batch time width"]:
    """Return attention of the selected queries to all keys up to their own, heads joined; other positions are zero.

    The queries belong to the last `time` of the keys. Only selected queries are computed, padded to the row with the
    most. A graph that is traced for all inputs computes every query.
    """
    batch, time = selected.shape
    # While tracing, and on the meta device, the number of selected positions is unknown.
    blind = torch.compiler.is_compiling() or selected.device.type == "meta"
    most = time if blind else max(1, int(selected.sum(dim=1).max()))
    index = selected.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    rows = torch.arange(batch, device=q.device)[:, None]
    steps = torch.arange(cache.length, device=q.device)
    visible = steps <= (index + cache.length - time)[..., None]
    y = F.scaled_dot_product_attention(
        q[rows, index].transpose(1, 2),
        cache.keys.transpose(1, 2),
        cache.values.transpose(1, 2),
        attn_mask=visible[:, None],
        dropout_p=dropout,
    )
    y = rearrange(y, "b h n d -> b n (h d)") * selected.gather(1, index)[..., None]
    return y.new_zeros(batch, time, y.shape[2]).scatter(1, index[..., None].expand_as(y), y)


def occurred_before(
    tokens: Int[Tensor, "batch time"], cu_seqlens: Int[Tensor, " boundaries"] | None = None
) -> Bool[Tensor, "batch time"]:
    """Return whether each token occurs earlier in the same sequence."""
    if cu_seqlens is not None:
        tokens = tokens + (tokens.max() + 1) * sequence_index(cu_seqlens, tokens.shape[1])
    ordered, order = tokens.sort(dim=1, stable=True)
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again)
