"""EvoNorm: normalization and activation in one layer, found by evolution.

With sB the standard deviation of a channel over the batch, sI and rI standard deviation and root mean square of a
channel of one image, sG and rG those of a group of channels of one image, all over positions and with eps under the
root:

    B0   x / max(sB, v x + sI)            S0   x sigmoid(v x) / sG
    B1   x / max(sB, (x + 1) rI)          S1   x sigmoid(x) / sG
    B2   x / max(sB, rI - x)              S2   x sigmoid(x) / rG

each multiplied by a weight, plus a bias per channel. Variances are biased; nothing is centered. The B series compares
an image with its batch (or with a running variance, if given); the S series only uses single images.

With library calls, a layer keeps five tensors of the map's size for its backward pass. The operators here keep the map
itself and one or two numbers per image and channel, and recompute the gate. Statistics are at least float32.

Source: Liu et al. 2020, arXiv:2004.02967, table 1 of its appendix. The paper writes B1 and B2 with the standard
deviation sI (`centered`), the published PyTorch layers with the root mean square rI.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op, register_autograd

from gatewise.ops._backend import suits_triton
from gatewise.ops.evonorm import cpu
from gatewise.ops.evonorm.small import small_batch, small_grouped, suits_small

Maps = Float[Tensor, "batch channels height width"]
Channels = Float[Tensor, " channels"]
Member = Literal["B0", "B1", "B2"]
MEMBERS = ("B0", "B1", "B2")


def evonorm_s(
    x: Maps,
    weight: Channels,
    bias: Channels,
    v: Channels | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    centered: bool = True,
    gated: bool = True,
) -> Maps:
    """Compute S0 (with `v`), S1 (without) or S2 (without `v` and `centered`) in the dtype of `x`.

    Differentiable any number of times.

    Args:
        groups: number of channel groups, each with its own statistics.
        centered: divide by the standard deviation instead of the root mean square.
        gated: apply the activation; otherwise only divide by the group's standard deviation.
    Raises:
        ValueError: if shapes do not fit, groups do not divide the channels, or `v` is given without a gate.
    """
    _check(x, weight, bias, v)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels, not be {groups}")
    if v is not None and not gated:
        raise ValueError("v scales the gate: leave it out where there is none (gated=False)")
    weight, bias, v = _wide(x, weight, bias, v)
    if _own_operator(x):
        if suits_small(x, weight, bias, v):
            return small_grouped(x, weight, bias, v, groups, eps, centered, gated).to(x.dtype)
        y: Tensor = torch.ops.gatewise.evonorm_s(x, weight, bias, v, groups, eps, centered, gated)[0]
        return y
    return _composed_s(x, weight, bias, v, groups, eps, centered, gated)


def evonorm_b(
    x: Maps,
    weight: Channels,
    bias: Channels,
    v: Channels | None = None,
    running_var: Channels | None = None,
    *,
    member: Member,
    eps: float = 1e-5,
    centered: bool = True,
) -> tuple[Maps, Channels]:
    """Compute B0, B1 or B2 in the dtype of `x`, and return it with the biased variance of each channel that was used.

    Args:
        v: factor of x in B0; the others have none.
        running_var: variance used instead of the batch's, as at inference.
        centered: use images' standard deviations, as in the paper, instead of root mean squares; B0 has no other form.
    Raises:
        ValueError: if shapes do not fit, B0 lacks `v`, or another member has it.
    """
    _check(x, weight, bias, v, running_var)
    if member not in MEMBERS:
        raise ValueError(f"member must be one of {', '.join(MEMBERS)}, not {member!r}")
    if (v is None) == (member == "B0"):
        raise ValueError(f"B0 needs v, and B1 and B2 have none; {member} came {'without' if v is None else 'with'} it")
    if member == "B0" and not centered:
        raise ValueError("B0 compares deviations: centered=False is for B1 and B2")
    weight, bias, v = _wide(x, weight, bias, v)
    running_var = None if running_var is None else running_var.to(weight.dtype)
    if _own_operator(x):
        if running_var is not None and suits_small(x, weight, bias, v):
            return small_batch(x, weight, bias, v, running_var, member, eps, centered).to(x.dtype), running_var
        y, _, _, _, variance = torch.ops.gatewise.evonorm_b(x, weight, bias, v, running_var, member, eps, centered)
        return y, variance
    return _composed_b(x, weight, bias, v, running_var, member, eps, centered)


def evonorm_s_reference(
    x: Maps,
    weight: Channels,
    bias: Channels,
    v: Channels | None = None,
    *,
    groups: int,
    eps: float = 1e-5,
    centered: bool = True,
    gated: bool = True,
) -> Maps:
    """Compute the definition, in the given dtype."""
    grouped = x.unflatten(1, (groups, -1))
    if centered:
        grouped = grouped - grouped.mean(dim=(2, 3, 4), keepdim=True)
    deviation = (grouped.square().mean(dim=(2, 3, 4), keepdim=True) + eps).sqrt()
    activated = x * _per_channel(1 if v is None else v, x).mul(x).sigmoid() if gated else x
    y = (activated.unflatten(1, (groups, -1)) / deviation).flatten(1, 2)
    return y * weight[:, None, None] + bias[:, None, None]


def evonorm_b_reference(
    x: Maps,
    weight: Channels,
    bias: Channels,
    v: Channels | None = None,
    running_var: Channels | None = None,
    *,
    member: Member,
    eps: float = 1e-5,
    centered: bool = True,
) -> tuple[Maps, Channels]:
    """Compute the definition, in the given dtype."""
    variance = _variance(x, (0, 2, 3)).flatten() if running_var is None else running_var
    ours = (_variance(x, (2, 3)) if centered else x.square().mean(dim=(2, 3), keepdim=True)) + eps
    deviation = ours.sqrt()
    if member == "B0":
        other = _per_channel(v, x) * x + deviation
    else:
        other = (x + 1) * deviation if member == "B1" else deviation - x
    y = x / torch.maximum((variance + eps).sqrt()[:, None, None], other)
    return y * weight[:, None, None] + bias[:, None, None], variance


def _variance(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (x - x.mean(dim=axes, keepdim=True)).square().mean(dim=axes, keepdim=True)


def _per_channel(v: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(v, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)


def _wide(x: Tensor, *parameters: Tensor | None) -> Any:
    """Cast parameters to the dtype of the statistics."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if parameter is None else parameter.to(dtype) for parameter in parameters]


def _composed_s(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> Tensor:
    """Compose library calls, for compilers, which fuse them, and for differentiating twice."""
    y = evonorm_s_reference(x.to(weight.dtype), weight, bias, v, groups=groups, eps=eps, centered=centered, gated=gated)
    return y.to(x.dtype)


def _composed_b(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor | None,
    member: Any,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """Do the same for the B series."""
    y, variance = evonorm_b_reference(
        x.to(weight.dtype), weight, bias, v, running_var, member=member, eps=eps, centered=centered
    )
    return y.to(x.dtype), variance.detach()


def _own_operator(x: Tensor) -> bool:
    """Return whether a custom operator gains over library calls, which compilers fuse by themselves."""
    if torch.compiler.is_compiling() or x.numel() == 0:
        return False
    return x.device.type == "cpu" or suits_triton(x)


def _backend(x: Tensor) -> Any:
    """Return the module that computes for maps like `x`."""
    if not suits_triton(x):
        return cpu
    from gatewise.ops.evonorm import triton as kernels

    return kernels


@custom_op(
    "gatewise::evonorm_s",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? v, int groups, float eps, bool centered, bool gated) "
    "-> (Tensor, Tensor, Tensor)",
)
def _forward_s(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, and the center and inverse standard deviation of every group."""
    result: tuple[Tensor, Tensor, Tensor] = _backend(x).grouped_forward(
        x, weight, bias, v, groups, eps, centered, gated
    )
    return result


@_forward_s.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    table = weight.new_empty(x.shape[0], groups)
    return _fake_map(x), table, torch.empty_like(table)


@custom_op(
    "gatewise::evonorm_s_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? v, Tensor center, Tensor rstd, bool gated) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_s(
    dy: Tensor, x: Tensor, weight: Tensor, v: Tensor | None, center: Tensor, rstd: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v; the last is meaningless without v."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _backend(x).grouped_backward(dy, x, weight, v, center, rstd, gated)
    return result


@_backward_s.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, v: Tensor | None, center: Tensor, rstd: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_map(x), torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)


@custom_op(
    "gatewise::evonorm_b",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? v, Tensor? running_var, str member, float eps, "
    "bool centered) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward_b(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor | None,
    member: str,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the output, mean and variance of every image and channel, and mean and variance of the batch."""
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _backend(x).batch_forward(
        x, weight, bias, v, running_var, member, eps, centered
    )
    return result


@_forward_b.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor | None,
    member: str,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    table = weight.new_empty(x.shape[:2])
    return _fake_map(x), table, torch.empty_like(table), torch.empty_like(weight), torch.empty_like(weight)


@custom_op(
    "gatewise::evonorm_b_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor? v, Tensor mean, Tensor var, Tensor center, Tensor variance, "
    "str member, float eps, bool centered, bool trained) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_b(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    mean: Tensor,
    var: Tensor,
    center: Tensor,
    variance: Tensor,
    member: str,
    eps: float,
    centered: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v; the last is meaningless without v."""
    result: tuple[Tensor, Tensor, Tensor, Tensor] = _backend(x).batch_backward(
        dy, x, weight, v, (mean, var), (center, variance), member, eps, centered, trained
    )
    return result


@_backward_b.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, v: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_map(x), torch.empty_like(weight), torch.empty_like(weight), torch.empty_like(weight)


def _fake_map(x: Tensor) -> Tensor:
    """Return a map in the format that the backends return: that of `x`, or contiguous."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _keep_s(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, v, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, v, *output[1:])


def _differentiate_s(ctx: Any, dy: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _, v, center, rstd = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_twice_differentiable(ctx, lambda *t: _composed_s(*t, *ctx.options), dy), None, None, None, None)
    dx, dweight, dbias, dv = torch.ops.gatewise.evonorm_s_backward(dy, x, weight, v, center, rstd, ctx.options[3])
    return dx, dweight, dbias, None if v is None else dv, None, None, None, None


def _keep_b(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, v, ctx.running_var, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, v, *output[1:])


def _differentiate_b(ctx: Any, dy: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _, v, *statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        options: Any = (ctx.running_var, *ctx.options)
        again = _twice_differentiable(ctx, lambda *t: _composed_b(*t, *options)[0], dy)
        return (*again, None, None, None, None)
    trained = ctx.running_var is None
    dx, dweight, dbias, dv = torch.ops.gatewise.evonorm_b_backward(dy, x, weight, v, *statistics, *ctx.options, trained)
    return dx, dweight, dbias, None if v is None else dv, None, None, None, None


def _twice_differentiable(ctx: Any, function: Any, dy: Tensor) -> list[Tensor | None]:
    """Return gradients of x, weight, bias and v from the composition, which can be differentiated again."""
    tensors = ctx.saved_tensors[:4]
    wanted = [i for i in range(4) if ctx.needs_input_grad[i]]
    found = torch.autograd.grad(function(*tensors), [tensors[i] for i in wanted], dy, create_graph=True)
    gradients: list[Tensor | None] = [None] * 4
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


register_autograd("gatewise::evonorm_s", _differentiate_s, setup_context=_keep_s)
register_autograd("gatewise::evonorm_b", _differentiate_b, setup_context=_keep_b)


def _check(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, running_var: Tensor | None = None) -> None:
    if x.ndim != 4:
        raise ValueError(f"maps must be (batch, channels, height, width), not {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias), ("v", v), ("running_var", running_var)):
        if parameter is not None and tuple(parameter.shape) != (x.shape[1],):
            raise ValueError(
                f"{name} must have one entry for each of the {x.shape[1]} channels, not {tuple(parameter.shape)}"
            )
