"""Merge several depthwise convolutions of one input, each scaled and shifted by a norm, into one.

    y = sum_b (t_b * conv(x; W_b, dilation r_b) + u_b) = conv(x; W, dilation 1) + u

    W = sum_b t_b * centered(dilated(W_b, r_b)),   u = sum_b u_b

Dilating by r puts W_b[p, q] at [r p, r q] among zeros, which gives a kernel of size r (k_b - 1) + 1. Centering
surrounds it with zeros up to the size of W. Every branch pads its input by half the size of its dilated kernel, so the
merged kernel, padded by half its own size, sees the same zeros at the border. The identity is exact up to the rounding
of the sum.

Source: Ding et al. 2023, arXiv:2311.15599 (UniRepLKNet), section 3.1; 2024, arXiv:2410.08049.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Branch(NamedTuple):
    """A depthwise convolution without bias, followed by its norm in eval mode: scale * conv(x) + shift.

    Attributes:
        weight: (channels, 1, k, k), k odd.
        scale: factor per channel.
        shift: offset per channel.
        dilation: distance between neighboring taps.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    dilation: int = 1

    @property
    def span(self) -> int:
        """Size of the dilated kernel."""
        return self.dilation * (self.weight.shape[-1] - 1) + 1


def dilate_kernel(
    weight: Float[Tensor, "channels one k k"], dilation: int
) -> Float[Tensor, "channels one dilated dilated"]:
    """Return the kernel with `dilation - 1` zeros between neighboring taps.

    Raises:
        ValueError: if the dilation is below 1.
    """
    if dilation < 1:
        raise ValueError(f"dilation must be 1 or more, not {dilation}")
    size = dilation * (weight.shape[-1] - 1) + 1
    dense = weight.new_zeros(*weight.shape[:2], size, size)
    dense[..., ::dilation, ::dilation] = weight
    return dense


def merge_kernels(
    branches: Sequence[Branch], kernel_size: int
) -> tuple[Float[Tensor, "channels 1 kernel_size kernel_size"], Float[Tensor, " channels"]]:
    """Return weight and bias of the one convolution that equals the sum of all branches, in the branches' dtype.

    Raises:
        ValueError: if there are no branches, the kernel is even, or a branch is wider than `kernel_size`.
    """
    _check(branches, kernel_size)
    merged = []
    for branch in branches:
        margin = (kernel_size - branch.span) // 2
        dense = dilate_kernel(branch.weight * branch.scale[:, None, None, None], branch.dilation)
        merged.append(F.pad(dense, (margin, margin, margin, margin)))
    return torch.stack(merged).sum(dim=0), torch.stack([branch.shift for branch in branches]).sum(dim=0)


def merge_kernels_reference(
    branches: Sequence[Branch], kernel_size: int
) -> tuple[Float[Tensor, "channels 1 kernel_size kernel_size"], Float[Tensor, " channels"]]:
    """Compute the same from what a kernel is: the flipped response to a single one in the middle of a map of zeros."""
    channels = branches[0].weight.shape[0]
    impulse = branches[0].weight.new_zeros(1, channels, kernel_size, kernel_size)
    impulse[..., kernel_size // 2, kernel_size // 2] = 1
    response = torch.zeros_like(impulse)
    bias = torch.zeros_like(branches[0].shift)
    for weight, scale, shift, dilation in branches:
        padding = dilation * (weight.shape[-1] // 2)
        filtered = F.conv2d(impulse, weight, padding=padding, dilation=dilation, groups=channels)
        response += scale[:, None, None] * filtered
        bias += shift
    return response[0, :, None].flip(2, 3), bias


def _check(branches: Sequence[Branch], kernel_size: int) -> None:
    if not branches:
        raise ValueError("there is nothing to merge: pass at least one branch")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
    for branch in branches:
        size = branch.weight.shape[-1]
        if size % 2 == 0:
            raise ValueError(f"kernels of branches must be odd, not {size}")
        if branch.span > kernel_size:
            raise ValueError(
                f"a kernel of {size} with dilation {branch.dilation} spans {branch.span} positions, "
                f"more than the {kernel_size} of the merged kernel"
            )
