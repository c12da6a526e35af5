"""EvoNorm inference on maps that fit a CPU's caches: a handful of library calls, in place after the first.

Nothing is kept for a backward pass, and no custom operator is used, since its dispatch would outlast the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1 << 20
"""Numbers in a map above which processing it in blocks is faster than reading it several times."""


def suits_small(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return whether `x` is such a map and no gradients are needed."""
    if x.device.type != "cpu" or x.numel() > LARGEST:
        return False
    differentiated = any(tensor is not None and tensor.requires_grad for tensor in (x, *parameters))
    return not (differentiated and torch.is_grad_enabled())


def small_grouped(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> Tensor:
    """Compute the S series: (N, C, H, W) -> (N, C, H, W), in the dtype of `weight`."""
    x = x.to(weight.dtype)
    grouped = x.flatten(2).reshape(x.shape[0], groups, -1)
    rstd = _mean_of_squares(grouped, 2, centered).add_(eps).rsqrt_().expand(-1, -1, x.shape[1] // groups)
    scale = rstd.flatten(1).mul(weight)[:, :, None, None]
    if gated:
        gate = x.sigmoid() if v is None else (x * v[:, None, None]).sigmoid_()
        return gate.mul_(x).mul_(scale).add_(bias[:, None, None])
    return (x * scale).add_(bias[:, None, None])


def small_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor,
    member: str,
    eps: float,
    centered: bool,
) -> Tensor:
    """Compute the B series with a running variance: (N, C, H, W) -> (N, C, H, W), in the dtype of `weight`."""
    x = x.to(weight.dtype)
    deviation = _mean_of_squares(x, (2, 3), centered).add_(eps).sqrt_()
    if member == "B0" and v is not None:
        other = torch.addcmul(deviation, x, v[:, None, None])
    else:
        other = (x + 1).mul_(deviation) if member == "B1" else deviation - x
    torch.maximum(other, (running_var + eps).sqrt_()[:, None, None], out=other)
    torch.div(x, other, out=other)
    return other.mul_(weight[:, None, None]).add_(bias[:, None, None])


def _mean_of_squares(x: Tensor, axes: int | tuple[int, ...], centered: bool) -> Tensor:
    """Return the variance, or the mean square, keeping the axes."""
    square = (x - x.mean(axes, keepdim=True)).square_() if centered else x.square()
    return square.mean(axes, keepdim=True)
