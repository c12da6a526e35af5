"""Fake quantization: round values to a few levels in the forward pass, and pass gradients through unchanged.

    codes = clamp(round(x / scale), low, high),   x_q = scale * codes          (round half to even)
    dL/dx = dL/dx_q                                                            (straight-through, no mask)

The scale is a statistic of x over a tensor, a channel (first axis), a token (last axis) or a group of a row. The
gradient treats it as a constant.

Sources: the ternary rule and the 8-bit activations of Ma et al. 2024, arXiv:2402.17764 (BitNet b1.58), section 2; the
straight-through estimator of Bengio et al. 2013, arXiv:1308.3432.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Statistic = Literal["absmean", "absmax"]
Granularity = Literal["tensor", "channel", "token", "group"]


@dataclass(frozen=True)
class QuantizationRule:
    """The rule that turns values into codes.

    Args:
        low: smallest code.
        high: largest code.
        statistic: statistic that gives the scale. "absmean" is the mean magnitude; "absmax" is the largest magnitude
            over `high`.
        granularity: values that share a scale: the whole tensor, a slice of the first axis (an output channel of a
            weight), a slice of the last axis (a token's channels), or `group_size` neighbors along the last axis.
        eps: smallest statistic, so that zeros have a scale.
    """

    low: int
    high: int
    statistic: Statistic
    granularity: Granularity
    group_size: int | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not self.low <= 0 < self.high:
            raise ValueError(f"codes must run from 0 or less to above 0, not from {self.low} to {self.high}")
        if self.statistic not in get_args(Statistic) or self.granularity not in get_args(Granularity):
            raise ValueError(f"no statistic {self.statistic!r} with granularity {self.granularity!r}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to the granularity 'group', and to no other")


TERNARY = QuantizationRule(-1, 1, "absmean", "tensor")
"""Rule for 1.58-bit weights."""

INT8_PER_TOKEN = QuantizationRule(-128, 127, "absmax", "token")
"""Rule for 8-bit activations."""


def quantize(x: Float[Tensor, "*shape"], rule: QuantizationRule) -> tuple[Float[Tensor, "*shape"], Tensor]:
    """Return codes, and their scales in a shape that broadcasts with them.

    Both are at least float32. In half precision the mean of a large matrix loses digits, and ties round differently.

    Raises:
        ValueError: if groups do not divide the last axis.
        FloatingPointError: if values are not finite (outside of compiled code).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    _require_finite(wide)
    if rule.granularity != "group":
        scale = _scale(wide, rule)
        return (wide / scale).round().clamp(rule.low, rule.high), scale
    if wide.shape[-1] % (rule.group_size or 1):
        raise ValueError(f"groups of {rule.group_size} do not divide the last axis of {wide.shape[-1]}")
    grouped = wide.unflatten(-1, (-1, rule.group_size))
    scale = _scale(grouped, rule).expand_as(grouped).flatten(-2)
    return (wide / scale).round().clamp(rule.low, rule.high), scale


def fake_quantize(x: Float[Tensor, "*shape"], rule: QuantizationRule) -> Float[Tensor, "*shape"]:
    """Round `x` to the rule's levels in its own dtype, with the gradient of `x` itself. Raises as `quantize` does."""
    with torch.no_grad():
        codes, scale = quantize(x, rule)
        rounded = (codes * scale).to(x.dtype)
    return _StraightThrough.apply(x, rounded)


class _StraightThrough(torch.autograd.Function):
    """Return the second argument's value with the first one's gradient. (`x + (y - x)` would round once more.)"""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _scale(x: Tensor, rule: QuantizationRule) -> Tensor:
    axes = {"tensor": tuple(range(x.ndim)), "channel": tuple(range(1, x.ndim))}.get(rule.granularity, (-1,))
    if rule.statistic == "absmean":
        return x.abs().mean(dim=axes, keepdim=True).clamp_min(rule.eps)
    return x.abs().amax(dim=axes, keepdim=True).clamp_min(rule.eps) / rule.high


def _require_finite(x: Tensor) -> None:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return
    if not x.isfinite().all():
        raise FloatingPointError("values that are not finite cannot be quantized: one NaN would spoil the whole scale")
