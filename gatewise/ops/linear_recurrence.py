"""An element-wise linear recurrence.

    h_t = a_t h_{t-1} + b_t

If one step is small, time is split into chunks that run side by side from zero. The state that enters each chunk is
then added, scaled by the product of the chunk's factors. This takes about 2 sqrt(T) steps instead of T. A large step
runs sequentially, since its numbers stay in the cache from one token to the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Elements of a step below which launching it costs more than computing it.
_SMALL_STEP = 4096
_FEW_STEPS = 16


def linear_recurrence(
    a: Float[Tensor, "batch time ..."],
    b: Float[Tensor, "batch time ..."],
    initial: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch time ..."]:
    """Return all h. Differentiable any number of times.

    Args:
        a: factors, which may have sizes of 1 where they are the same for all elements of `b`.
        initial: state before the first token.
    Raises:
        ValueError: if shapes do not fit together.
    """
    fits = a.ndim == b.ndim and all(n in (1, m) for n, m in zip(a.shape[2:], b.shape[2:], strict=False))
    if not fits or a.shape[1] != b.shape[1] or initial.shape != b[:, 0].shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, initial))
        raise ValueError(f"expected a and b (B, T, ...) and what stands before b's first, not {shapes}")
    return torch.ops.gatewise.linear_recurrence(a, b, initial)


def linear_recurrence_reference(
    a: Float[Tensor, "batch time ..."],
    b: Float[Tensor, "batch time ..."],
    initial: Float[Tensor, "batch ..."],
) -> Float[Tensor, "batch time ..."]:
    """Compute the definition."""
    states = [initial]
    for t in range(b.shape[1]):
        states.append(a[:, t] * states[-1] + b[:, t])
    return torch.stack(states[1:], dim=1)


def run_steps(factors: Iterable[Tensor], added: Iterable[Tensor], results: Iterable[Tensor], before: Tensor) -> None:
    """Write h of each step into `results`, one kernel per step, without gradients."""
    for factor, term, result in zip(factors, added, results, strict=True):
        before = torch.addcmul(term, factor, before, out=result)


@torch.library.custom_op(
    "gatewise::linear_recurrence", mutates_args=(), schema="(Tensor a, Tensor b, Tensor initial) -> Tensor"
)
def _linear_recurrence(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    if b.shape[1] >= _FEW_STEPS and initial.numel() < _SMALL_STEP:
        return _run_chunks(a, b, initial)
    h = torch.empty_like(b)
    run_steps(a.unbind(1), b.unbind(1), h.unbind(1), initial)
    return h


def _run_chunks(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    time = b.shape[1]
    size = math.isqrt(time - 1) + 1
    # Padding of the last chunk comes after everything that is kept.
    a, b = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, -time % size)).unflatten(1, (-1, size)) for t in (a, b))
    faded = a.cumprod(dim=2)
    h = torch.empty_like(b)
    run_steps(a.unbind(2), b.unbind(2), h.unbind(2), torch.zeros_like(b[:, :, 0]))
    entering = torch.empty_like(h[:, :, 0])
    entering[:, 0] = initial
    run_steps(faded[:, :-1, -1].unbind(1), h[:, :-1, -1].unbind(1), entering[:, 1:].unbind(1), initial)
    return h.addcmul_(faded, entering[:, :, None]).flatten(1, 2)[:, :time].contiguous()


@_linear_recurrence.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor) -> Tensor:
    return torch.empty_like(b)


def _setup(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    a, _, initial = inputs
    ctx.save_for_backward(a, initial, output)


def _backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run gradients through the same recurrence from the end: g_t = grad_t + a_{t+1} g_{t+1}."""
    a, initial, h = ctx.saved_tensors  # type: ignore[attr-defined]
    following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
    zero = torch.zeros_like(initial)
    g = torch.ops.gatewise.linear_recurrence(following.flip(1), grad.flip(1), zero).flip(1)
    before = torch.cat([initial[:, None], h[:, :-1]], dim=1)
    return (g * before).sum_to_size(a.shape), g, a[:, 0] * g[:, 0]


_linear_recurrence.register_autograd(_backward, setup_context=_setup)
