"""Two RMS norms and a gated blend of their outputs, in one step.

    n(x, w) = w x / sqrt(mean(x^2) + eps)          over the last axis
    y = sigmoid(z) n(far, w_far) + (1 - sigmoid(z)) n(near, w_near)

Written in single operators, training keeps half a dozen tensors of this size for the backward pass, most of them for a
few multiplications. Here only the inputs are kept, and everything else is recomputed. Compilers and exporters see the
single operators, which they fuse themselves.

Statistics are at least float32, whatever the inputs' dtypes.

Source: Liao et al. 2024, arXiv:2405.18425, section 3 (the gated injection of locality).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd

from gatewise.ops.precision import without_autocast

Heads = Float[Tensor, "*positions width"]
Weight = Float[Tensor, " width"]


def gated_norm_blend(
    far: Heads, near: Heads, logits: Heads, far_weight: Weight, near_weight: Weight, eps: float = 1e-6
) -> Heads:
    """Return the blend, in the dtype of `near`.

    Args:
        logits: logits of the share of `far`.
    Raises:
        ValueError: if shapes do not fit together, or a tensor is not floating-point.
    """
    _check(far, near, logits, far_weight, near_weight)
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return _traceable(far, near, logits, far_weight, near_weight, eps)
    y: Tensor = torch.ops.gatewise.gated_norm_blend(far, near, logits, far_weight, near_weight, eps)
    return y


def gated_norm_blend_reference(
    far: Heads, near: Heads, logits: Heads, far_weight: Weight, near_weight: Weight, eps: float = 1e-6
) -> Heads:
    """Compute the definition, operator by operator, in the given dtype."""
    share = logits.sigmoid()
    normed_far = far * (far.square().mean(-1, keepdim=True) + eps).rsqrt() * far_weight
    normed_near = near * (near.square().mean(-1, keepdim=True) + eps).rsqrt() * near_weight
    return (share * normed_far + (1 - share) * normed_near).to(near.dtype)


def _traceable(
    far: Tensor, near: Tensor, logits: Tensor, far_weight: Tensor, near_weight: Tensor, eps: float
) -> Tensor:
    """Compute the definition with the operator's precision."""
    tensors = (far, near, logits, far_weight, near_weight)
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return gated_norm_blend_reference(wide[0], wide[1], wide[2], wide[3], wide[4], eps).to(near.dtype)


@custom_op(
    "gatewise::gated_norm_blend",
    mutates_args=(),
    schema="(Tensor far, Tensor near, Tensor logits, Tensor far_weight, Tensor near_weight, float eps) -> Tensor",
)
def _blend(far: Tensor, near: Tensor, logits: Tensor, far_weight: Tensor, near_weight: Tensor, eps: float) -> Tensor:
    with without_autocast(near):
        (a, _), (b, _) = _normed(far, near, eps), _normed(near, near, eps)
        a.mul_(far_weight)
        b.mul_(near_weight)
        share = logits.to(a.dtype).sigmoid()
        return b.lerp_(a, share).to(near.dtype).contiguous()


@custom_op(
    "gatewise::gated_norm_blend_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor far, Tensor near, Tensor logits, Tensor far_weight, Tensor near_weight, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _blend_backward(
    dy: Tensor, far: Tensor, near: Tensor, logits: Tensor, far_weight: Tensor, near_weight: Tensor, eps: float
) -> tuple[Tensor, ...]:
    with without_autocast(near):
        (a, a_root), (b, b_root) = _normed(far, near, eps), _normed(near, near, eps)
        dy = dy.to(a.dtype)
        share = logits.to(a.dtype).sigmoid()
        through_far = dy * share
        through_near = dy - through_far
        dlogits = (a * far_weight - b * near_weight).mul_(through_far).mul_(1 - share)
        dfar, dfar_weight = _norm_gradients(through_far, a, a_root, far_weight)
        dnear, dnear_weight = _norm_gradients(through_near, b, b_root, near_weight)
        found = (dfar, dnear, dlogits, dfar_weight, dnear_weight)
        inputs = (far, near, logits, far_weight, near_weight)
        return tuple(one.to(x.dtype).contiguous() for one, x in zip(found, inputs, strict=True))


def _normed(x: Tensor, like: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x over its root mean square, and the inverse of that root; new tensors in the dtype of the sums."""
    wide = torch.promote_types(torch.promote_types(x.dtype, like.dtype), torch.float32)
    x = x.to(wide)
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * root, root


def _norm_gradients(dy: Tensor, normed: Tensor, root: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the norm's input and weight."""
    dweight = (dy * normed).reshape(-1, dy.shape[-1]).sum(0)
    dnormed = dy * weight
    along = (dnormed * normed).mean(-1, keepdim=True)
    return dnormed.addcmul_(normed, along, value=-1).mul_(root), dweight


@_blend.register_fake
def _(far, near, logits, far_weight, near_weight, eps):
    return near.new_empty(near.shape)


@_blend_backward.register_fake
def _(dy, far, near, logits, far_weight, near_weight, eps):
    return tuple(x.new_empty(x.shape) for x in (far, near, logits, far_weight, near_weight))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.gatewise.gated_norm_blend_backward(dy, *ctx.saved_tensors, ctx.eps), None


register_autograd("gatewise::gated_norm_blend", _differentiate, setup_context=_keep)


def _check(far: Tensor, near: Tensor, logits: Tensor, far_weight: Tensor, near_weight: Tensor) -> None:
    for name, tensor in {"near": near, "logits": logits}.items():
        if tensor.shape != far.shape:
            raise ValueError(f"{name} must have the shape of far, {tuple(far.shape)}, not {tuple(tensor.shape)}")
    for name, weight in {"far_weight": far_weight, "near_weight": near_weight}.items():
        if weight.shape != far.shape[-1:]:
            raise ValueError(f"{name} must have one entry per channel, {far.shape[-1]}, not {tuple(weight.shape)}")
    for name, tensor in {"far": far, "near": near, "logits": logits}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must have a floating-point dtype, not {tensor.dtype}")
