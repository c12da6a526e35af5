"""Causal softmax attention over whole, continued and packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatewise.layers.packing import sequence_slices


class KeyValueCache(NamedTuple):
    """Keys and values of all tokens so far: (B, T, kv_heads, head_dim) each."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """Number of tokens so far."""
        return self.keys.shape[1]


def extend_cache(cache: KeyValueCache | None, keys: Tensor, values: Tensor) -> KeyValueCache:
    """Return the cache with the keys and values of new tokens appended."""
    if cache is None:
        return KeyValueCache(keys, values)
    return KeyValueCache(torch.cat([cache.keys, keys], dim=1), torch.cat([cache.values, values], dim=1))


def causal_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads value_dim"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Return softmax(q k^T * scale) v under a causal mask, with queries aligned to the last `time` keys.

    Each key and value head serves heads / kv_heads consecutive query heads.

    Args:
        cu_seqlens: boundaries of packed sequences; requires as many keys as queries and a batch of 1.
        window: number of keys before its own that a query sees; None for all.
        scale: factor on the logits, head_dim^-0.5 by default.
        dropout: probability of dropping a weight.
    Raises:
        ValueError: if the query heads are not a multiple of the key heads, or there are fewer keys than queries.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads, not {q.shape[2]} and {k.shape[2]}")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"every query needs its own key: {q.shape[1]} queries, {k.shape[1]} keys")
    if cu_seqlens is None:
        return _attend(q, k, v, window, scale, dropout)
    pieces = [
        _attend(q[:, piece], k[:, piece], v[:, piece], window, scale, dropout) for piece in sequence_slices(cu_seqlens)
    ]
    return torch.cat(pieces, dim=1)


def causal_mask(
    queries: int, keys: int, window: int | None = None, device: torch.device | None = None
) -> Bool[Tensor, "queries keys"]:
    """Return which keys each query may see; the last query is at the last key."""
    rows = torch.arange(keys - queries, keys, device=device)[:, None]
    columns = torch.arange(keys, device=device)
    visible = columns <= rows
    return visible if window is None else visible & (columns >= rows - window)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None, dropout: float) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    whole = queries == keys and window is None
    masked = not whole and (queries > 1 or (window is not None and keys > window + 1))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=causal_mask(queries, keys, window, q.device) if masked else None,
        dropout_p=dropout,
        is_causal=whole and queries > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)
