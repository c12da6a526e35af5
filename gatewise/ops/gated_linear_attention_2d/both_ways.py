"""Gated linear attention from both ends at once on the CPU, for gates that decay little within a chunk.

Within a chunk of c rows, let b_i = f_1 + ... + f_i and a_i = r_i + ... + r_c be the sums of the log gates of the two
scans, from the end where each begins. Side by side, with 2 key_dim columns,

    Q = scale [q exp(b), q exp(a)],    K = [k exp(-b), k exp(-a)]
    A = lower(Q_1 K_1^T) + upper(Q_2 K_2^T)        both with the diagonal: the current row counts in both scans
    o = A v + Q E

where E stacks the states with which both scans enter the chunk. Thus one product with the values and one with the
states serve both directions. States follow each other as

    E_1' = exp(b_c) E_1 + (K_1 exp(b_c))^T v,      E_2' = exp(a_1) E_2 + (K_2 exp(a_1))^T v

The factors exp(-b) and exp(-a) stay in range as long as no sum is below `LEAST_SUM`, which `gentle` checks. The gates
of trained networks are far from that. Other gates use `gated_linear_attention.chunked`. The backward pass recomputes
everything from the inputs, so nothing else is kept. With D and dE the gradients of A and E,

    dQ = [lower(D) K_1, upper(D) K_2] + do E^T,    dK = [lower(D)^T Q_1, upper(D)^T Q_2] + (v dE'^T) exp(b_c)
    db = Q dQ - K dK,                              df_t = sum_{i >= t} db_i,    dr_t = sum_{i <= t} da_i

and the sums at the exits also get the gradient of the states' decay.

Source: our own arrangement of Yang et al. 2023, arXiv:2312.06635, section 4, and Liao et al. 2024, arXiv:2405.18425.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_CHUNK = 64

LEAST_SUM = -60.0
"""exp(60) times queries or keys of any sensible size is well within float32."""

GROUP_NUMBERS = 1 << 19
"""Numbers in a tensor that are processed at a time, so that intermediate results stay in the cache."""


class Chunks(NamedTuple):
    """The division of a sequence: `number` chunks of `length` rows, the last ones padded with zeros."""

    number: int
    length: int

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Split (batch, time, heads, width) into (batch * heads, number, length, width)."""
        batch, time, heads, width = x.shape
        new = torch.empty if time == self.number * self.length else torch.zeros
        rows = new(batch, heads, self.number * self.length, width, dtype=dtype)
        rows[:, :, :time].copy_(x.transpose(1, 2))
        return rows.view(batch * heads, self.number, self.length, width)

    def join(self, rows: Tensor, into: Tensor) -> None:
        """Invert `cut`."""
        batch, time, heads, width = into.shape
        into.copy_(rows.reshape(batch, heads, -1, width)[:, :, :time].transpose(1, 2))


def chunks_of(time: int) -> Chunks:
    """Return chunks of even length, so that there is little padding."""
    number = -(-time // LONGEST_CHUNK)
    return Chunks(number, -(-time // number))


def gentle(*gates: Tensor) -> bool:
    """Return whether no gate's sum over a chunk is below `LEAST_SUM`: (batch, time, heads, width) each."""
    chunks = chunks_of(gates[0].shape[1])
    return all(bool((chunks.cut(g, torch.float32).sum(-2) > LEAST_SUM).all()) for g in gates)


class _Work(NamedTuple):
    """Intermediate results of both passes for a group of rows; shapes (rows, chunks, length, width)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    queries: Tensor
    keys: Tensor
    totals: Tensor
    entries: Tensor | None

    @property
    def key_dim(self) -> int:
        return self.q.shape[-1]


def forward_both_ways(q: Tensor, k: Tensor, v: Tensor, f: Tensor, r: Tensor, scale: float) -> Tensor:
    """Return the sum of both scans, (batch, time, heads, value_dim) in q's dtype."""
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    chunks = chunks_of(q.shape[1])
    for part in _groups(q, v):
        work = _prepare(chunks, q[part], k[part], v[part], f[part], r[part], scale)
        outputs = _scores(work) @ work.v
        if work.entries is not None:
            outputs += work.queries @ work.entries
        chunks.join(outputs, o[part])
    return o


def backward_both_ways(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, r: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Return gradients of q, k, v, f and r, in their dtypes."""
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, f, r))
    chunks = chunks_of(q.shape[1])
    for part in _groups(q, v):
        work = _prepare(chunks, q[part], k[part], v[part], f[part], r[part], scale)
        found = _gradients(work, chunks.cut(do[part], work.q.dtype), scale)
        for gradient, own in zip(gradients, found, strict=True):
            chunks.join(own, gradient[part])
    return gradients


def _groups(q: Tensor, v: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Yield some samples of all heads or, if one sample is too large, some heads of one."""
    batch, time, heads, key_dim = q.shape
    most = max(1, GROUP_NUMBERS // (time * max(2 * key_dim, v.shape[-1], LONGEST_CHUNK)))
    samples = max(1, most // heads)
    for first in range(0, batch, samples):
        for head in range(0, heads, min(most, heads)):
            yield slice(first, first + samples), slice(None), slice(head, head + min(most, heads))


def _prepare(chunks: Chunks, q: Tensor, k: Tensor, v: Tensor, f: Tensor, r: Tensor, scale: float) -> _Work:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, f, r = (chunks.cut(x, dtype) for x in (q, k, v, f, r))
    from_end = r.flip(-2).cumsum(-2).flip(-2)
    decay = torch.cat([f.cumsum(-2), from_end], dim=-1).exp_()
    queries = torch.cat([q, q], dim=-1).mul_(scale).mul_(decay)
    keys = torch.cat([k, k], dim=-1).div_(decay)
    key_dim = q.shape[-1]
    totals = torch.cat([decay[..., -1, :key_dim], decay[..., 0, key_dim:]], dim=-1)
    entries = _entries(keys, v, totals) if chunks.number > 1 else None
    return _Work(q, k, v, decay, queries, keys, totals, entries)


def _scores(work: _Work) -> Tensor:
    n = work.key_dim
    lower = (work.queries[..., :n] @ work.keys[..., :n].mT).tril_()
    return lower.add_((work.queries[..., n:] @ work.keys[..., n:].mT).triu_())


def _entries(keys: Tensor, v: Tensor, totals: Tensor) -> Tensor:
    """Return states with which both scans enter each chunk, (rows, chunks, 2 key_dim, value_dim)."""
    updates = (keys * totals[..., None, :]).mT @ v
    entries = torch.zeros_like(updates)
    n = keys.shape[-1] // 2
    last = keys.shape[1] - 1
    factors = totals[..., None]
    for chunk in range(last):
        here, following = entries[:, chunk, :n], entries[:, chunk + 1, :n]
        torch.addcmul(updates[:, chunk, :n], factors[:, chunk, :n], here, out=following)
        here, following = entries[:, last - chunk, n:], entries[:, last - chunk - 1, n:]
        torch.addcmul(updates[:, last - chunk, n:], factors[:, last - chunk, n:], here, out=following)
    return entries


def _exit_gradients(through_outputs: Tensor, totals: Tensor) -> Tensor:
    """Return gradients of the states with which both scans leave each chunk, from those of the entry states."""
    exits = torch.zeros_like(through_outputs)
    n = totals.shape[-1] // 2
    last = totals.shape[1] - 1
    factors = totals[..., None]
    for chunk in range(last, 0, -1):
        here, before = exits[:, chunk, :n], exits[:, chunk - 1, :n]
        torch.addcmul(through_outputs[:, chunk, :n], factors[:, chunk, :n], here, out=before)
        here, before = exits[:, last - chunk, n:], exits[:, last - chunk + 1, n:]
        torch.addcmul(through_outputs[:, last - chunk, n:], factors[:, last - chunk, n:], here, out=before)
    return exits


def _gradients(work: _Work, do: Tensor, scale: float) -> tuple[Tensor, ...]:
    n, queries, keys = work.key_dim, work.queries, work.keys
    dscores = do @ work.v.mT
    lower, upper = dscores.tril(), dscores.triu_()
    dqueries = torch.cat([lower @ keys[..., :n], upper @ keys[..., n:]], dim=-1)
    dkeys = torch.cat([lower.mT @ queries[..., :n], upper.mT @ queries[..., n:]], dim=-1)
    dv = _scores(work).mT @ do
    dtotals = None
    if work.entries is not None:
        dqueries += do @ work.entries.mT
        dexits = _exit_gradients(queries.mT @ do, work.totals)
        through_keys = work.v @ dexits.mT
        dkeys += through_keys * work.totals[..., None, :]
        dv += (keys * work.totals[..., None, :]) @ dexits
        dtotals = (dexits * work.entries).sum(-1) + (keys * through_keys).sum(-2)
    dsums = queries * dqueries - keys * dkeys
    if dtotals is not None:
        dtotals *= work.totals
        dsums[..., -1, :n] += dtotals[..., :n]
        dsums[..., 0, n:] += dtotals[..., n:]
    df = dsums[..., :n].flip(-2).cumsum(-2).flip(-2)
    dr = dsums[..., n:].cumsum(-2)
    dq = dqueries.mul_(work.decay).mul_(scale)
    dk = dkeys.div_(work.decay)
    return dq[..., :n] + dq[..., n:], dk[..., :n] + dk[..., n:], dv, df, dr
