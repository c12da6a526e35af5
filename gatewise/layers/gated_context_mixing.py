"""Context mixing with its projections, and the gate and the local branch that stand beside it.

    q = BN(W_q query) / sqrt(channels per head)        k = BN(W_k (means of key over 7x7 regions))
    y = SE(BN(W_y mix(q, k, value)) + BN(DRB(value)))
    z = W_z BN(SiLU(BN(W_g value)) * y)

where `mix` is `gatewise.ops.context_mixing` and DRB the dilated re-parameterized block.

Source: Lou and Yu 2025, arXiv:2502.20087 (OverLoCK), section on the dynamic block; published code.
"""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.conv import ConvNormAct
from gatewise.layers.dilated_reparam import BranchTable, DilatedReparam
from gatewise.layers.fold_norm import fold_into_next, fold_into_previous, scale_outputs
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.ops.context_mixing import check_heads, context_mixing

Maps = Float[Tensor, "batch channels height width"]

REGIONS = 7
"""Means of the key are taken over so many regions down and across."""


class ContextMixing(nn.Module):
    """Kernels from what query and key have in common, applied to the value: (B, C, H, W) -> (B, C, H, W).

    Maps smaller than the large window are enlarged to it, and the result is averaged back to their size.

    Args:
        key_dim: channels of the key.
        kernel_size: of the large window.
        small_kernel_size: of the small one, for the first half of the channels.
        num_heads: heads of each half are twice as many, as published.
        project_value: a convolution and a norm before the value is mixed.
    Raises:
        ValueError: for windows that are even or in the wrong order, or channels that heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        project_value: bool = False,
    ) -> None:
        super().__init__()
        check_windows(kernel_size, small_kernel_size)
        check_width(dim, num_heads)
        self.kernel_size = kernel_size
        heads, taps = 2 * num_heads, small_kernel_size**2 + kernel_size**2
        # As published: by the channels per head of the value's two halves together, twice the query's.
        self.query_scale = (dim / heads) ** -0.5
        self.query = ConvNormAct(dim, dim // 2, act=None)
        self.key = ConvNormAct(key_dim, dim // 2, act=None)
        self.value = ConvNormAct(dim, dim, act=None) if project_value else nn.Identity()
        self.kernels = nn.Linear(REGIONS**2, taps)
        self.small_table = nn.Parameter(torch.zeros(heads, *[2 * small_kernel_size - 1] * 2))
        self.large_table = nn.Parameter(torch.zeros(heads, *[2 * kernel_size - 1] * 2))

    def forward(
        self,
        query: Float[Tensor, "batch dim height width"],
        key: Float[Tensor, "batch key_dim height width"],
        value: Float[Tensor, "batch dim height width"],
    ) -> Float[Tensor, "batch dim height width"]:
        size = (value.shape[2], value.shape[3])
        enlarged = enlarged_size(size[0], size[1], self.kernel_size)
        if enlarged != size:
            query, key, value = (_resize(x, enlarged) for x in (query, key, value))
        q = self.query(query)
        if self.query_scale != 1:
            q = q * self.query_scale
        centers = self.key(F.adaptive_avg_pool2d(key, REGIONS)).flatten(2)
        weight, bias = self.kernels.weight, self.kernels.bias
        y = context_mixing(q, centers, weight, bias, self.small_table, self.large_table, self.value(value))
        return y if enlarged == size else F.adaptive_avg_pool2d(y, size)

    def merged(self) -> ContextMixing:
        """The same in eval mode with norms and the scale of the query inside of the convolutions."""
        new = deepcopy(self)
        new.query, new.key = self.query.merged(), self.key.merged()
        if isinstance(self.value, ConvNormAct):
            new.value = self.value.merged()
        scale_outputs(new.query.conv, torch.full((new.query.conv.out_channels,), self.query_scale).to(new.small_table))
        new.query_scale = 1
        return new


def check_windows(kernel_size: int, small_kernel_size: int) -> None:
    """Raise a ValueError unless both windows are odd and the small one is no larger than the large one."""
    if kernel_size % 2 == 0 or small_kernel_size % 2 == 0 or not 1 <= small_kernel_size <= kernel_size:
        raise ValueError(
            f"windows must be odd, and the small one no larger than the large one, not {small_kernel_size} and "
            f"{kernel_size}"
        )


def check_width(dim: int, num_heads: int) -> None:
    """Raise a ValueError unless queries and both halves of the values can be cut into twice `num_heads` heads."""
    if num_heads < 1:
        raise ValueError(f"context mixing needs at least one head, not {num_heads}")
    if dim % (4 * num_heads):
        raise ValueError(f"channels must be a multiple of 4 times num_heads ({num_heads}), not {dim}")
    check_heads(dim, dim // 2, 2 * num_heads)


def enlarged_size(height: int, width: int, kernel_size: int) -> tuple[int, int]:
    """The size of a map for a window: as it is, or with its shorter side as long as the window.

    The longer side keeps the proportions, rounded down as published. It never falls below the window, as rounding of
    kernel_size / side * side would have it for windows of 15 on square maps of 11 and 13.
    """
    if min(height, width) >= kernel_size:
        return height, width
    if height < width:
        return kernel_size, max(kernel_size, int(kernel_size / height * width))
    return max(kernel_size, int(kernel_size / width * height)), kernel_size


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class GatedContextMixing(nn.Module):
    """Context mixing plus a local branch, squeezed, excited and gated: (B, C, H, W) -> (B, C', H, W).

    Args:
        out_dim: channels that it projects to.
        table: branches of the local branch's kernels, by their size.
        deploy: the local branch as one convolution.
        project_value: as for `ContextMixing`; gate and local branch take the value as it is.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        out_dim: int,
        kernel_size: int,
        small_kernel_size: int,
        num_heads: int,
        table: BranchTable,
        deploy: bool = False,
        project_value: bool = False,
    ) -> None:
        super().__init__()
        self.mixer = ContextMixing(dim, key_dim, kernel_size, small_kernel_size, num_heads, project_value)
        self.mixed = ConvNormAct(dim, dim, act=None)
        self.local = DilatedReparam(dim, kernel_size, table, deploy)
        self.local_norm: nn.Module = nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, squeezed_dim(dim), nn.GELU)
        self.gate = ConvNormAct(dim, dim, act=nn.SiLU)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, out_dim, 1)

    def forward(
        self,
        value: Float[Tensor, "batch dim height width"],
        query: Float[Tensor, "batch dim height width"],
        key: Float[Tensor, "batch key_dim height width"],
    ) -> Float[Tensor, "batch out_dim height width"]:
        y = self.mixed(self.mixer(query, key, value))
        y = self.se(y + self.local_norm(self.local(value)))
        return self.project(self.norm(self.gate(value) * y))

    def read_gates(self, x: Float[Tensor, "batch dim height width"]) -> dict[str, Tensor]:
        """The gate at every position, the mean over its channels: (B, H, W)."""
        return {"positions": self.gate(x).mean(dim=1)}

    def merged(self) -> GatedContextMixing:
        """The same in eval mode without norms, and with the local branch as one convolution."""
        new = deepcopy(self)
        new.mixer, new.mixed, new.gate = self.mixer.merged(), self.mixed.merged(), self.gate.merged()
        new.local = self.local.merged()
        if isinstance(new.local_norm, nn.BatchNorm2d):
            fold_into_previous(new.local.large, new.local_norm)
            new.local_norm = nn.Identity()
        if isinstance(new.norm, nn.BatchNorm2d):
            fold_into_next(new.norm, new.project)
            new.norm = nn.Identity()
        return new


def squeezed_dim(dim: int) -> int:
    """Hidden channels of squeeze-excitation: an eighth, and 16 at least."""
    return max(16, dim // 8)
