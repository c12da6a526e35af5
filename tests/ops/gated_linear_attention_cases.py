"""Inputs and comparisons for the tests of gated linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.ops.gated_linear_attention import chunked as chunked

F64 = torch.float64


def inputs(
    batch: int = 2,
    time: int = 20,
    heads: int = 2,
    kv_heads: int | None = None,
    key_dim: int = 5,
    value_dim: int = 6,
    per_head: bool = False,
    dtype: torch.dtype = F64,
    hard: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and gates; hard gates reach a sum of about -10 per token."""
    kv_heads = kv_heads or heads
    q = torch.randn(batch, time, heads, key_dim, dtype=F64)
    k = torch.randn(batch, time, kv_heads, key_dim, dtype=F64)
    v = torch.randn(batch, time, kv_heads, value_dim, dtype=F64)
    raw = torch.randn(batch, time, kv_heads, 1 if per_head else key_dim, dtype=F64)
    g = F.logsigmoid(8 * raw - 8) if hard else F.logsigmoid(raw) / 4
    return tuple(x.to(dtype) for x in (q, k, v, g))


def initial_state(k: Tensor, v: Tensor, sequences: int | None = None) -> Tensor:
    return torch.randn(sequences or k.shape[0], k.shape[2], k.shape[3], v.shape[3], dtype=k.dtype)


def with_gradients(function, tensors, **options) -> list[Tensor]:
    """Results, and gradients of a random combination of all of them (the same one for equal shapes)."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    results = function(*leaves, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(7)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=F64).to(r.dtype)).sum() for r in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, leaves)]


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((ours.to(F64) - reference.to(F64)).abs().max() / reference.to(F64).abs().max().clamp_min(1e-30)).item()


def errors(ours: list[Tensor], reference: list[Tensor]) -> list[float]:
    assert len(ours) == len(reference)
    return [error(a, b) for a, b in zip(ours, reference, strict=True)]


def chunked_form(chunk: int, reverse: bool = False):
    """The chunked form with chunks of any length as one differentiable function of q, k, v, g and state."""

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, g, state):
            scale = k.shape[-1] ** -0.5
            o, final, kept = chunked.chunked_forward(q, k, v, g, state, None, scale, reverse, chunk)
            ctx.save_for_backward(q, k, v, g, state, kept)
            return o, final

        @staticmethod
        def backward(ctx, do, dfinal):
            q, k, v, g, state, kept = ctx.saved_tensors
            scale = k.shape[-1] ** -0.5
            return tuple(chunked.chunked_backward(do, dfinal, q, k, v, g, state, None, kept, scale, reverse, chunk))

    return Chunked.apply
