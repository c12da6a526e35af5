"""Chunked gated linear attention, forward and backward, in plain PyTorch.

With the decays of a chunk (`decay`), its scores A and the state S at its entry:

    o  = scale * (q * from_start) S + A v
    S' = diag(total) S + (k * to_end)^T v

States follow each other from chunk to chunk; everything else is batched over the chunks of a segment. One segment is
processed at a time, so its data stay in the cache, and memory is linear in time with a small factor. The forward pass
keeps the state at the entry of each segment. The backward pass walks the segments from the last to the first and
recomputes the rest. With D the gradient of the state at the chunk's exit:

    dA = do v^T,                                       dv = A^T do + (k * to_end) D
    dq = scale * from_start * (do S^T) + through A,    dk = to_end * (v D^T) + through A
    D' = diag(total) D + scale * (q * from_start)^T do
    dg_t = sum_v (S' * D)[:, v] + sum_{s >= t in the chunk} (q_s dq_s - k_s dk_s)

The sum in dg restarts in each chunk, since what follows a chunk depends on its gates only through the exit state.

Source: Yang et al. 2023, arXiv:2312.06635, section 4 and the appendix on the gradient of the gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gatewise.ops.gated_linear_attention.decay import ChannelDecay, HeadDecay
from gatewise.ops.gated_linear_attention.segments import SEGMENT_TOKENS, Segment, chunk_length, cut, most_segments

HARDEST_GATE = -1000.0
"""Harder gates, including -inf, act the same, since exp(-1000) is 0 in float64 too; sums of them would be inexact."""

ROW_BUDGET = 1 << 20
"""Numbers in a segment's largest tensor; if more rows (batch times heads) exist, they are processed in groups."""


class Gradients(NamedTuple):
    """Gradients of the inputs, in their shapes and dtypes; those of states in the accumulation's dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    state: Tensor


class _Tensors(NamedTuple):
    """Inputs of a scan: tokens (batch, time, heads, width), states (sequences, batch, heads, K, V)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    initial: Tensor
    scale: float

    @property
    def groups(self) -> int:
        return self.q.shape[2] // self.k.shape[2]


class _Blocks(NamedTuple):
    """A segment: q (blocks, groups, size, K) times scale, k (blocks, size, K), v (blocks, size, V)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: ChannelDecay | HeadDecay


def accumulation_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype of gates, sums and states."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def checkpoints_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """Return the shape (segments, batch, heads, K, V) of the states that are kept for the backward pass."""
    batch, time, heads, key_dim = k.shape
    return most_segments(time, _sequences(cu_seqlens)), batch, heads, key_dim, v.shape[-1]


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs in q's dtype, and final states and checkpoints in the accumulation's dtype.

    Shapes are those of `gated_linear_attention`. `chunk` is the number of tokens per chunk, by default chosen from
    shapes. The backward pass needs the same.
    """
    dtype = accumulation_dtype(q)
    initial = _initial_states(state, k, v, cu_seqlens, dtype)
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    final = initial.clone()
    checkpoints = initial.new_zeros(checkpoints_shape(k, v, cu_seqlens))
    segments = cut(_bounds(k, cu_seqlens), chunk or _chunk(k, cu_seqlens), reverse)
    for rows in _row_groups(q, k, v):
        tensors = _Tensors(rows.queries(q), rows.keys(k), rows.keys(v), rows.keys(g), rows.states(initial), scale)
        _forward_rows(segments, tensors, rows.queries(o), rows.states(final), rows.states(checkpoints))
    return o, _public_states(final, cu_seqlens), checkpoints


def chunked_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    scale: float,
    reverse: bool,
    chunk: int | None = None,
) -> Gradients:
    """Return gradients of the inputs from those of the outputs and, unless None, of the final states."""
    dtype = accumulation_dtype(q)
    initial = _initial_states(state, k, v, cu_seqlens, dtype)
    dstates = _initial_states(dfinal, k, v, cu_seqlens, dtype).clone()
    dq, dk, dv, dg = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g))
    segments = cut(_bounds(k, cu_seqlens), chunk or _chunk(k, cu_seqlens), reverse)
    for rows in _row_groups(q, k, v):
        tensors = _Tensors(rows.queries(q), rows.keys(k), rows.keys(v), rows.keys(g), rows.states(initial), scale)
        gradients = Gradients(rows.queries(dq), rows.keys(dk), rows.keys(dv), rows.keys(dg), rows.states(dstates))
        _backward_rows(segments, tensors, rows.queries(do), rows.states(checkpoints), gradients)
    return Gradients(dq, dk, dv, dg, _public_states(dstates, cu_seqlens))


def chunked_forward_both_ways(
    q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the sum of the outputs of both directions in q's dtype, and the checkpoints of both."""
    wide = q.to(accumulation_dtype(q))
    forward, _, kept_forward = chunked_forward(wide, k, v, g_forward, None, cu_seqlens, scale, False)
    backward, _, kept_backward = chunked_forward(wide, k, v, g_backward, None, cu_seqlens, scale, True)
    return forward.add_(backward).to(q.dtype), torch.stack([kept_forward, kept_backward])


def chunked_backward_both_ways(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_forward: Tensor,
    g_backward: Tensor,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of q, k, v, g_forward and g_backward."""
    dtype = accumulation_dtype(q)
    wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
    forward, backward = (
        chunked_backward(
            do, None, wide_q, wide_k, wide_v, g, None, cu_seqlens, checkpoints[reverse], scale, bool(reverse)
        )
        for reverse, g in enumerate((g_forward, g_backward))
    )
    dq, dk, dv = (
        one.add_(other).to(x.dtype) for one, other, x in zip(forward[:3], backward[:3], (q, k, v), strict=True)
    )
    return dq, dk, dv, forward.g, backward.g


def _forward_rows(
    segments: Sequence[Segment], tensors: _Tensors, o: Tensor, final: Tensor, checkpoints: Tensor
) -> None:
    carry = torch.zeros_like(final[0])
    for segment, checkpoint in zip(segments, checkpoints, strict=False):
        checkpoint.copy_(carry)
        blocks = _load(segment, tensors)
        q, k, v, decay = blocks
        scores = decay.scores(q, k)
        entries, exits = _states(segment, blocks, tensors.initial, carry)
        outputs = torch.bmm(scores.flatten(1, 2), v)
        outputs.baddbmm_((q * decay.from_start[:, None]).flatten(1, 2), entries.flatten(0, 1))
        segment.store(o, outputs, tensors.groups)
        carry = exits[-1].view_as(carry)
        for chunk, sequence in segment.ends.items():
            final[sequence].copy_(exits[chunk].view_as(carry))


def _backward_rows(
    segments: Sequence[Segment], tensors: _Tensors, do: Tensor, checkpoints: Tensor, gradients: Gradients
) -> None:
    """Backpropagate rows. `gradients.state` holds those of the final states, and then those of the initial states."""
    dfinal = gradients.state.clone()
    carry = torch.zeros_like(dfinal[0])
    for segment, checkpoint in reversed(list(zip(segments, checkpoints, strict=False))):
        blocks = _load(segment, tensors)
        q, k, v, decay = blocks
        outputs = segment.load(do, q.dtype, tensors.groups)
        dscores = torch.bmm(outputs, v.mT).view(*q.shape[:-1], k.shape[1])
        scores, dq, dk = decay.scores_and_gradients(q, k, dscores)
        entries, exits = _states(segment, blocks, tensors.initial, checkpoint)
        dentries, dexits = _state_gradients(segment, blocks, outputs, dfinal, carry)
        dexits_flat = dexits.flatten(0, 1)

        dq.addcmul_(torch.bmm(outputs, entries.flatten(0, 1).mT).view_as(q), decay.from_start[:, None])
        dk.addcmul_(torch.bmm(v, dexits_flat.mT), decay.to_end)
        dv = torch.bmm(scores.flatten(1, 2).mT, outputs)
        dv.baddbmm_(k * decay.to_end, dexits_flat)
        dg = _gate_gradient(q, k, dq, dk, (exits * dexits).sum(-1).flatten(0, 1))
        _add_diagonal(q, k, dscores, dq, dk)

        segment.store(gradients.q, dq.mul_(tensors.scale).flatten(1, 2), tensors.groups)
        segment.store(gradients.k, dk)
        segment.store(gradients.v, dv)
        segment.store(gradients.g, dg if tensors.g.shape[-1] == dg.shape[-1] else dg.sum(-1, keepdim=True))
        carry = dentries[0].view_as(carry)
        for chunk, sequence in segment.starts.items():
            gradients.state[sequence].copy_(dentries[chunk].view_as(carry))


def _load(segment: Segment, tensors: _Tensors) -> _Blocks:
    dtype = tensors.initial.dtype
    gates = segment.load(tensors.g, dtype).clamp_(min=HARDEST_GATE)
    q = segment.load(tensors.q, dtype, tensors.groups).unflatten(1, (tensors.groups, -1)).mul_(tensors.scale)
    decay = HeadDecay(gates) if gates.shape[-1] == 1 else ChannelDecay(gates)
    return _Blocks(q, segment.load(tensors.k, dtype), segment.load(tensors.v, dtype), decay)


def _states(segment: Segment, blocks: _Blocks, initial: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Return states at the entries and at the exits of the chunks, (chunks, rows, K, V) each."""
    given = {chunk: initial[sequence].flatten(0, 1) for chunk, sequence in segment.starts.items()}
    states = _buffer(segment, blocks)
    torch.bmm((blocks.k * blocks.decay.to_end).mT, blocks.v, out=states[1:].flatten(0, 1))
    states[0] = given.pop(0) if 0 in given else carry.flatten(0, 1)
    _scan(states.unbind(), _totals(segment, blocks), given)
    return _replaced(states[:-1], given), states[1:]


def _state_gradients(
    segment: Segment, blocks: _Blocks, outputs: Tensor, dfinal: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor]:
    """Return state gradients at the entries and at the exits of the chunks, from the last chunk to the first."""
    last = segment.chunks - 1
    given = {chunk: dfinal[sequence].flatten(0, 1) for chunk, sequence in segment.ends.items()}
    states = _buffer(segment, blocks)
    queries = (blocks.q * blocks.decay.from_start[:, None]).flatten(1, 2)
    torch.bmm(queries.mT, outputs, out=states[:-1].flatten(0, 1))
    states[-1] = given.pop(last) if last in given else carry.flatten(0, 1)
    backwards = {last - chunk: value for chunk, value in given.items()}
    _scan(states.unbind()[::-1], _totals(segment, blocks)[::-1], backwards)
    return states[:-1], _replaced(states[1:], given)


def _buffer(segment: Segment, blocks: _Blocks) -> Tensor:
    """Allocate (chunks + 1, rows, K, V)."""
    _, k, v, _ = blocks
    return k.new_empty(segment.chunks + 1, k.shape[0] // segment.chunks, k.shape[-1], v.shape[-1])


def _totals(segment: Segment, blocks: _Blocks) -> tuple[Tensor, ...]:
    return blocks.decay.total.unflatten(0, (segment.chunks, -1))[..., None].unbind()


def _scan(states: Sequence[Tensor], factors: Sequence[Tensor], given: Mapping[int, Tensor]) -> None:
    """Add to each state its predecessor times the factor between them; `given` replaces predecessors."""
    for step, factor in enumerate(factors):
        states[step + 1].addcmul_(factor, given.get(step, states[step]))


def _replaced(states: Tensor, given: Mapping[int, Tensor]) -> Tensor:
    if not given:
        return states
    states = states.clone()
    for chunk, value in given.items():
        states[chunk] = value
    return states


def _gate_gradient(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, behind: Tensor) -> Tensor:
    """Return (blocks, size, K), before the diagonal's part is in dq and dk, where it would cancel up to rounding."""
    each = (q * dq).sum(1).addcmul_(k, dk, value=-1)
    size = each.shape[1]
    later = each.new_ones(size, size).triu_()
    return torch.bmm(later.expand(each.shape[0], size, size), each).add_(behind[:, None])


def _add_diagonal(q: Tensor, k: Tensor, dscores: Tensor, dq: Tensor, dk: Tensor) -> None:
    own = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq.addcmul_(own, k[:, None])
    dk.add_((own * q).sum(1))


class _Rows(NamedTuple):
    """A group of rows: slices of the batch and of the key heads."""

    batch: slice
    heads: slice
    groups: int

    def keys(self, tokens: Tensor) -> Tensor:
        return tokens[self.batch, :, self.heads]

    def queries(self, tokens: Tensor) -> Tensor:
        return tokens[self.batch, :, self.heads.start * self.groups : self.heads.stop * self.groups]

    def states(self, states: Tensor) -> Tensor:
        return states[:, self.batch, self.heads]


def _row_groups(q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Rows]:
    batch, time, heads, key_dim = k.shape
    groups = q.shape[2] // heads
    rows = max(1, ROW_BUDGET // (min(time, SEGMENT_TOKENS) * max(groups * key_dim, groups * v.shape[-1])))
    heads_at_a_time = min(heads, rows)
    batch_at_a_time = max(1, rows // heads)
    for first in range(0, batch, batch_at_a_time):
        for head in range(0, heads, heads_at_a_time):
            stop = min(batch, first + batch_at_a_time), min(heads, head + heads_at_a_time)
            yield _Rows(slice(first, stop[0]), slice(head, stop[1]), groups)


def _sequences(cu_seqlens: Tensor | None) -> int:
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _chunk(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return chunk_length(k.shape[1], _sequences(cu_seqlens))


def _bounds(k: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    return [0, k.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()


def _initial_states(
    state: Tensor | None, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return (sequences, batch, heads, K, V); packed sequences are sequences of a batch of one."""
    if state is not None:
        return state.to(dtype)[None] if cu_seqlens is None else state.to(dtype)[:, None]
    batch, _, heads, key_dim = k.shape
    return k.new_zeros(_sequences(cu_seqlens), batch, heads, key_dim, v.shape[-1], dtype=dtype)


def _public_states(states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return states[0] if cu_seqlens is None else states[:, 0]
