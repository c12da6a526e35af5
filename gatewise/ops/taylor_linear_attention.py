"""Linear attention whose weights are the Taylor expansion of softmax's exponential to second order.

    s_ti = q_t . k_i / sqrt(f),   w_ti = 1 + s_ti + s_ti^2 / 2 = phi(q_t) . phi(k_i)
    y_t  = sum_{i<=t} w_ti v_i / (sum_{i<=t} w_ti + eps)

with f the feature width per head and phi(x) = [1, x / f^(1/4), products of two channels of x]. The weights are at least
1/2. They are formed within chunks (quadratic view); between chunks, sums of phi(k) v are carried (linear view).

Source: Arora et al. 2024, arXiv:2402.18668 (Based), section 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewise.ops.precision import without_autocast

CHUNK = 64


def taylor_linear_attention(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time heads features"],
    v: Float[Tensor, "batch time heads value_dim"],
    state: Float[Tensor, "batch heads expanded sums"] | None = None,
    *,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads expanded sums"]]:
    """Return outputs in the dtype of `v`, and the state after the last token. Half precision is summed in float32.

    Args:
        state: sums of phi(k) times v and 1 over all earlier tokens: (B, heads, 1 + f + f (f + 1) / 2, value_dim + 1).
        eps: value added to the sum of weights.
    Raises:
        ValueError: if shapes disagree.
    """
    if q.shape != k.shape or v.shape[:3] != q.shape[:3]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"expected q and k (B, T, H, f) and v (B, T, H, V), not {shapes}")
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    state = None if state is None else state.to(wide)
    # Autocast would round the sums of products again.
    with without_autocast(q):
        y, state = _attend(q.to(wide), k.to(wide), v.to(wide), state, eps)
    return y.to(v.dtype), state


def taylor_linear_attention_reference(
    q: Float[Tensor, "batch time heads features"],
    k: Float[Tensor, "batch time heads features"],
    v: Float[Tensor, "batch time heads value_dim"],
    eps: float = 1e-12,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Compute the definition, with all weights."""
    weights = _weights(q.transpose(1, 2), k.transpose(1, 2)).tril()
    return ((weights @ v.transpose(1, 2)) / (weights.sum(dim=-1, keepdim=True) + eps)).transpose(1, 2)


def taylor_features(x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch expanded"]:
    """Return phi(x): 1, the channels, and each product of two channels once: 1 + f + f (f + 1) / 2 features.

    A product of two different channels counts for both orders and is therefore scaled by sqrt(2).
    """
    width = x.shape[-1]
    first, second = torch.triu_indices(width, width, device=x.device)
    weight = x.new_full(first.shape, math.sqrt(1 / width)).masked_fill(first == second, math.sqrt(0.5 / width))
    products = x[..., first] * x[..., second] * weight
    return torch.cat([torch.ones_like(x[..., :1]), x / width**0.25, products], dim=-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    time = q.shape[1]
    q, k, v = (_chunked(t, min(time, CHUNK)) for t in (q, k, _with_ones(v)))
    sums = torch.einsum("bhnce,bhncs->bhnes", taylor_features(k), v)
    before = torch.zeros_like(sums[:, :, :1]) if state is None else state[:, :, None]
    carried = torch.cat([before, sums], dim=2).cumsum(dim=2)
    totals = _weights(q, k).tril() @ v
    if state is not None or carried.shape[2] > 2:
        totals = totals + taylor_features(q) @ carried[:, :, :-1]
    totals = totals.flatten(2, 3)[:, :, :time].transpose(1, 2)
    return totals[..., :-1] / (totals[..., -1:] + eps), carried[:, :, -1]


def _weights(q: Tensor, k: Tensor) -> Tensor:
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return 1 + s + s.square() / 2


def _with_ones(v: Tensor) -> Tensor:
    """Append a channel of ones to the values; its weighted sum is the sum of weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def _chunked(x: Tensor, size: int) -> Tensor:
    """Split (B, T, H, C) into (B, H, chunks, size, C). Padding has values 0 and ones 0, so it changes no sum."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)
