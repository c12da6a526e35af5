"""Causal attention beyond fused kernels: with a custom mask, or returning the attention weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewise.layers.causal_attention import causal_mask


def masked_attention(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    v: Float[Tensor, "batch keys kv_heads value_dim"],
    mask: Tensor,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """Return causal attention under a mask, with zeros for queries that may not see any key.

    Args:
        mask: attention mask, broadcastable to (batch, heads or 1, time, keys). Booleans are true where a query may see
            a key. Numbers are added to the scores; minus infinity and the lowest value of the dtype hide a key.
        scale: factor on the logits, head_dim^-0.5 by default.
    Raises:
        ValueError: if the mask has the wrong shape or type.
    """
    queries, keys = q.shape[1], k.shape[1]
    _check_mask(mask, (q.shape[0], q.shape[2], queries, keys))
    visible = causal_mask(queries, keys, device=q.device) & _visible(mask)
    seeing = visible.any(dim=-1, keepdim=True)
    # A row without keys sees all of them instead and is zeroed afterwards, which avoids NaN in both passes.
    bias: Tensor = visible | ~seeing
    if mask.is_floating_point():
        bias = torch.where(visible, mask, 0.0).to(q.dtype).masked_fill(~bias, float("-inf"))
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=bias,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.masked_fill(~seeing, 0.0).transpose(1, 2)


def attention_weights(
    q: Float[Tensor, "batch time heads head_dim"],
    k: Float[Tensor, "batch keys kv_heads head_dim"],
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads time keys"]:
    """Return the causal softmax(q k^T * scale), at least in float32. Memory grows with time * keys.

    Args:
        window: as in `causal_attention`.
        scale: factor on the logits, head_dim^-0.5 by default.
    """
    scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    grouped = scaled.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btghd,bsgd->bghts", grouped, k).flatten(1, 2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = ~causal_mask(q.shape[1], k.shape[1], window, q.device)
    return scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)


def _visible(mask: Tensor) -> Tensor:
    return mask > torch.finfo(mask.dtype).min if mask.is_floating_point() else mask


def _check_mask(mask: Tensor, shape: tuple[int, int, int, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"an attention mask holds booleans or numbers to add, not {mask.dtype}")
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(sizes) != 4 or any(size not in (1, full) for size, full in zip(sizes, shape, strict=False)):
        raise ValueError(
            f"an attention mask must broadcast to (batch, heads, queries, keys) = {shape}, not {tuple(mask.shape)}"
        )
