"""Linear attention with kernel features: each token attends to all others through one small matrix.

With features q, k >= 0 of N tokens (such as elu + 1), q', k' rotated by rotary positions (or equal to q, k), per head:

    y_i = q'_i ( (1/N) sum_j k'_j v_j^T ) / ( q_i . (1/N) sum_j k_j + eps )

which is attention without softmax, with weights q'_i . k'_j, normalized by the sum that they would have without
positions. The matrix has as many rows and columns as a head has channels, so cost and memory grow with N instead of
N^2. Both sums are means, and stay in range for any number of tokens.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, equation (5); with rotary positions only in the numerator, Su et
al. 2021, arXiv:2104.09864, equation (19).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatewise.ops.precision import without_autocast

Features = Float[Tensor, "batch tokens heads head_dim"]
Values = Float[Tensor, "batch tokens heads value_dim"]


def kernel_attention(
    q: Features,
    k: Features,
    v: Values,
    *,
    turned: tuple[Features, Features] | None = None,
    eps: float = 1e-6,
) -> Values:
    """Return the outputs, in the dtype of `v`. Sums and quotients are at least float32, as the divisor may be near eps.

    Args:
        turned: queries and keys with positions, for the numerator; None to use `q` and `k`.
    Raises:
        ValueError: if shapes do not fit together.
    """
    turned_q, turned_k = (q, k) if turned is None else turned
    _check(q, k, v, turned_q, turned_k)
    with without_autocast(v):
        wide = torch.promote_types(v.dtype, torch.float32)
        heads_first = [part.to(wide).transpose(1, 2) for part in (q, k, v, turned_q, turned_k)]
        q, k, values, turned_q, turned_k = heads_first
        # Each factor carries its share of 1/N, so that neither the sum nor its terms leave the range of half precision.
        share = values.shape[2] ** -0.5
        seen = (turned_k * share).mT @ (values * share)
        divisor = q @ k.mean(dim=2)[..., None] + eps
        return ((turned_q @ seen) / divisor).transpose(1, 2).to(v.dtype)


def kernel_attention_reference(
    q: Features,
    k: Features,
    v: Values,
    *,
    turned: tuple[Features, Features] | None = None,
    eps: float = 1e-6,
) -> Values:
    """Compute the definition with its map of all pairs of tokens, in the given dtype."""
    turned_q, turned_k = (q, k) if turned is None else turned
    tokens = v.shape[1]
    pairs = torch.einsum("bihd,bjhd->bhij", turned_q, turned_k) / tokens
    divisor = torch.einsum("bihd,bjhd->bhij", q, k).sum(dim=-1, keepdim=True) / tokens + eps
    return torch.einsum("bhij,bjhe->bihe", pairs / divisor, v)


def _check(q: Tensor, k: Tensor, v: Tensor, turned_q: Tensor, turned_k: Tensor) -> None:
    if q.ndim != 4 or not q.shape == k.shape == turned_q.shape == turned_k.shape:
        raise ValueError(
            "q and k, and what they are turned to, must all be (batch, tokens, heads, channels), not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(turned_q.shape)} and {tuple(turned_k.shape)}"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be {(*q.shape[:3], 'channels')} as q and k, not {tuple(v.shape)}")
