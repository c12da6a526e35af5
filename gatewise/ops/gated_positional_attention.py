"""Attention by content, blended per head with attention by position.

Positions form a grid of h rows and w columns; queries and keys have d channels per head:

    content_ij  = softmax_j(scale q_i . k_j)
    position_ij = softmax_j(a dx + b dy + c (dx^2 + dy^2)),     (dx, dy) = columns and rows from i to j
    y_i = sum_j ((1 - g) content_ij + g position_ij) v_j,       g = sigmoid(gate)

with (a, b, c) and the gate learned for each head. Position does not depend on the input, and it factorizes: its logits
are a function of dx plus one of dy, and all keys of the grid take part, so it is a softmax over columns times one over
rows. Two small products per head, N (h + w) d instead of N^2 d, then replace a map of N x N positions, which is never
formed. Content uses PyTorch's fused attention.

Source: d'Ascoli et al. 2021, arXiv:2103.10697, equations (6) to (8). The factors are our own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewise.ops.precision import without_autocast

Keys = Float[Tensor, "batch height width heads head_dim"]
Values = Float[Tensor, "batch height width heads value_dim"]
Weights = Float[Tensor, "heads 3"]
Gates = Float[Tensor, " heads"]


def gated_positional_attention(
    q: Keys,
    k: Keys,
    v: Values,
    weights: Weights,
    gates: Gates,
    *,
    bias: Gates | None = None,
    scale: float | None = None,
) -> Values:
    """Return the outputs. Positions are at least float32, since half precision cannot represent their integers.

    Args:
        weights: (a, b, c) of each head.
        gates: logits of the share of position.
        bias: value added to all position logits of a head. The softmax cancels it, so its gradient is zero; published
            weights contain one.
        scale: scale of the content logits; None for head_dim ** -0.5.
    Raises:
        ValueError: if shapes do not fit together.
    """
    _check(q, k, v, weights, gates)
    content = F.scaled_dot_product_attention(_rows(q), _rows(k), _rows(v), scale=scale)
    rows, columns = position_factors(weights, (q.shape[1], q.shape[2]), bias)
    # First columns, then rows, each as one product per head over the whole batch.
    across = _along(columns.to(content.dtype), v.permute(3, 2, 0, 1, 4))
    down = _along(rows.to(content.dtype), across.permute(0, 3, 2, 1, 4))
    position = down.permute(2, 0, 1, 3, 4).flatten(2, 3)
    blended = torch.lerp(content, position, gates.sigmoid()[:, None, None].to(content.dtype))
    return blended.transpose(1, 2).unflatten(1, q.shape[1:3])


def _along(factor: Tensor, x: Tensor) -> Tensor:
    """Multiply `factor` (heads, n, n) with the second axis of `x` (heads, n, ...)."""
    return (factor @ x.flatten(2)).unflatten(2, x.shape[2:])


def gated_positional_attention_reference(
    q: Keys, k: Keys, v: Values, weights: Weights, gates: Gates, *, scale: float | None = None
) -> Values:
    """Compute the definition, with its map of N x N positions, in the given dtype."""
    attention = gated_positional_weights(q, k, weights, gates, scale=scale)
    return (attention @ _rows(v)).transpose(1, 2).unflatten(1, q.shape[1:3])


def gated_positional_weights(
    q: Keys, k: Keys, weights: Weights, gates: Gates, *, scale: float | None = None
) -> Float[Tensor, "batch heads positions positions"]:
    """Return the blended attention, divided by its sums. Memory grows with the square of the positions."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    content = (scale * _rows(q) @ _rows(k).mT).softmax(dim=-1)
    position = position_weights(weights, (q.shape[1], q.shape[2])).to(content.dtype)
    blended = torch.lerp(content, position, gates.sigmoid()[:, None, None].to(content.dtype))
    return blended / blended.sum(dim=-1, keepdim=True)


def position_weights(weights: Weights, size: tuple[int, int]) -> Float[Tensor, "heads positions positions"]:
    """Return the attention by position on a grid of rows and columns, by the definition instead of by factors."""
    with without_autocast(weights):
        geometry = offsets(size, weights.device).to(torch.promote_types(weights.dtype, torch.float32))
        return (geometry @ weights.to(geometry.dtype).mT).permute(2, 0, 1).softmax(dim=-1)


def offsets(size: tuple[int, int], device: torch.device | None = None) -> Float[Tensor, "positions positions 3"]:
    """Return (dx, dy, dx^2 + dy^2) from each query to each key of a grid, both row by row."""
    rows, columns = (torch.arange(length, device=device, dtype=torch.float32) for length in size)
    y, x = (axis.flatten() for axis in torch.meshgrid(rows, columns, indexing="ij"))
    dx, dy = x[None] - x[:, None], y[None] - y[:, None]
    return torch.stack([dx, dy, dx.square() + dy.square()], dim=-1)


def position_factors(
    weights: Weights, size: tuple[int, int], bias: Gates | None = None
) -> tuple[Float[Tensor, "heads height height"], Float[Tensor, "heads width width"]]:
    """Return the two softmaxes, over rows and over columns, whose product is the attention by position."""
    with without_autocast(weights):
        wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
        a, b, c = wide[:, :, None, None].unbind(1)
        constant = torch.zeros_like(a) if bias is None else bias.to(wide.dtype)[:, None, None]
        return _factor(b, c, constant, size[0]), _factor(a, c, constant, size[1])


def _factor(linear: Tensor, square: Tensor, constant: Tensor, length: int) -> Tensor:
    places = torch.arange(length, device=linear.device, dtype=linear.dtype)
    offset = places[None] - places[:, None]
    return (constant + linear * offset + square * offset.square()).softmax(dim=-1)


def _rows(x: Tensor) -> Tensor:
    """Flatten the grid: (B, h, w, heads, d) -> (B, heads, N, d)."""
    return x.flatten(1, 2).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, gates: Tensor) -> None:
    if q.ndim != 5 or q.shape != k.shape or v.ndim != 5 or v.shape[:4] != q.shape[:4]:
        raise ValueError(
            "q, k and v must be (batch, height, width, heads, channels), q and k alike, not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    heads = q.shape[3]
    if weights.shape != (heads, 3) or gates.shape != (heads,):
        raise ValueError(
            f"{heads} heads need weights ({heads}, 3) and gates ({heads},), not {tuple(weights.shape)} and "
            f"{tuple(gates.shape)}"
        )
