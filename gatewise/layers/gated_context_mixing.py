"""Context mixing with its projections, a gate and a local branch.

    q = BN(W_q query) / sqrt(channels per head)        k = BN(W_k (means of key over 7x7 regions))
    y = SE(BN(W_y mix(q, k, value)) + BN(DRB(value)))
    z = W_z BN(SiLU(BN(W_g value)) * y)

where `mix` is `gatewise.ops.context_mixing` and DRB is the dilated re-parameterized block.

Source: Lou and Yu 2025, arXiv:2502.20087 (OverLoCK), section on the dynamic block, and the published code.
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
"""Number of regions, down and across, over which the key is averaged."""


class ContextMixing(nn.Module):
    """Kernels from the similarity of query and key, applied to the value: (B, C, H, W) -> (B, C, H, W).

    Maps smaller than the large window are enlarged to it, and the result is averaged back to their size.

    Args:
        key_dim: number of channels of the key.
        kernel_size: size of the large window.
        small_kernel_size: size of the small window, for the first half of the channels.
        num_heads: number of heads; each half of the channels has twice as many, as published.
        project_value: whether a convolution and a norm precede the mixing of the value.
    Raises:
        ValueError: if windows are even or in the wrong order, or if channels are not divisible by the heads.
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
        # As published: based on the channels per head of both halves of the value together, twice the query's.
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
        """Return an equivalent module for eval mode, with norms and the query's scale folded into convolutions."""
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
    """Raise a ValueError unless queries and both halves of the values split into twice `num_heads` heads."""
    if num_heads < 1:
        raise ValueError(f"context mixing needs at least one head, not {num_heads}")
    if dim % (4 * num_heads):
        raise ValueError(f"channels must be a multiple of 4 times num_heads ({num_heads}), not {dim}")
    check_heads(dim, dim // 2, 2 * num_heads)


def enlarged_size(height: int, width: int, kernel_size: int) -> tuple[int, int]:
    """Return the size of a map for a window: unchanged, or with its shorter side enlarged to the window.

    The longer side keeps the proportions, rounded down as published. It never falls below the window, although the
    rounding of kernel_size / side * side would make it so for windows of 15 on square maps of 11 and 13.
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
        out_dim: number of output channels.
        table: branches of the local branch's kernel, by its size.
        deploy: whether the local branch is a single convolution.
        project_value: as in `ContextMixing`; gate and local branch use the original value.
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
        """Return the gate at every position, averaged over its channels: (B, H, W)."""
        return {"positions": self.gate(x).mean(dim=1)}

    def merged(self) -> GatedContextMixing:
        """Return an equivalent module for eval mode, without norms and with one convolution as local branch."""
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
    """Return the hidden width of squeeze-excitation: an eighth of `dim`, and at least 16."""
    return max(16, dim // 8)
