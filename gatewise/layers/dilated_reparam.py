"""Dilated re-parameterized block: a large depthwise kernel trained with the help of small dilated ones.

    y = norm(conv_K(x)) + sum_b norm_b(conv_{k_b, dilation r_b}(x))

All convolutions are depthwise, with stride 1 and without bias. In eval mode, the sum is one K x K depthwise convolution
with bias, so the branches cost nothing at inference.

Source: Ding et al. 2023, arXiv:2311.15599 (UniRepLKNet), section 3.1; 2024, arXiv:2410.08049.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.fold_norm import scale_and_shift
from gatewise.ops.large_depthwise_conv import arrange
from gatewise.ops.merge_kernels import Branch, merge_kernels

BranchTable = Mapping[int, Sequence[tuple[int, int]]]
"""Size of the large kernel -> (kernel size, dilation) of each branch."""


def reparam_rules(place: str) -> tuple[tuple[str, str], ...]:
    """Return key rules from the published names of the block's parts to ours, for a block at `place`."""
    branch = f"{place}.branches.k{{k}}_{{r}}"
    return (
        (f"{place}.lk_origin", f"{place}.large"),
        (f"{place}.origin_bn", f"{place}.large_norm"),
        (f"{place}.dil_conv_k{{k}}_{{r}}", f"{branch}.conv"),
        (f"{place}.dil_bn_k{{k}}_{{r}}", f"{branch}.norm"),
    )


class DilatedBranch(nn.Module):
    """Dilated depthwise convolution and norm: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, kernel_size, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return self.norm(self.conv(x))

    def as_branch(self) -> Branch:
        """Return the branch's eval-mode kernel and shift, in float64."""
        return _as_branch(self.conv, self.norm)


class DilatedReparam(nn.Module):
    """Sum of a large kernel and its branches: (B, C, H, W) -> (B, C, H, W).

    Args:
        kernel_size: size of the large kernel, a key of `table`.
        table: branches for each size of the large kernel, which differ between papers
        deploy: whether to build the merged form, one convolution with bias.
    Raises:
        ValueError: if the table lacks the kernel size, or a branch is impossible.
    """

    def __init__(self, dim: int, kernel_size: int, table: BranchTable, deploy: bool = False) -> None:
        super().__init__()
        branches = _branches(kernel_size, table)
        self.large = DepthwiseConv2d(dim, kernel_size, bias=deploy)
        self.large_norm = None if deploy else nn.BatchNorm2d(dim)
        self.branches = nn.ModuleDict()
        if not deploy:
            self.branches.update({f"k{size}_{rate}": DilatedBranch(dim, size, rate) for size, rate in branches})

    @property
    def is_merged(self) -> bool:
        """Whether the block is a single convolution with bias."""
        return self.large_norm is None

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        # Arranged in memory once for all convolutions.
        x = arrange(x, self.large.kernel_size[0])
        y = self.large(x)
        if self.large_norm is not None:
            y = self.large_norm(y)
        for branch in self.branches.values():
            y = y + branch(x)
        return y

    def merged(self) -> DilatedReparam:
        """Return an equivalent block for eval mode with one convolution, or a copy if it is already merged.

        The merge is computed in float64 and rounded once.

        Raises:
            ValueError: if called in training mode, where each branch's norm uses batch statistics.
        """
        if self.training:
            raise ValueError("branches can only be merged in eval mode, where norms are fixed: call .eval() first")
        new = deepcopy(self)
        if self.is_merged:
            return new
        weight, bias = self.merged_kernel()
        like = self.large.weight
        new.large.weight = nn.Parameter(weight.to(like.dtype), requires_grad=like.requires_grad)
        new.large.bias = nn.Parameter(bias.to(like.dtype), requires_grad=like.requires_grad)
        new.large_norm = None
        new.branches = nn.ModuleDict()
        return new

    @torch.no_grad()
    def merged_kernel(self) -> tuple[Float[Tensor, "channels 1 kernel kernel"], Float[Tensor, " channels"]]:
        """Return weight and bias of the merged convolution, in float64."""
        if self.large_norm is None or self.large.bias is not None:
            raise ValueError("the block is merged already: its kernel is large.weight")
        branches = [_as_branch(self.large, self.large_norm)]
        branches += [branch.as_branch() for branch in self.branches.values()]
        return merge_kernels(branches, self.large.kernel_size[0])


def _branches(kernel_size: int, table: BranchTable) -> Sequence[tuple[int, int]]:
    if kernel_size not in table:
        legal = ", ".join(map(str, sorted(table)))
        raise ValueError(f"the large kernel must have one of the sizes {legal}, not {kernel_size}")
    for size, dilation in table[kernel_size]:
        span = dilation * (size - 1) + 1
        if size % 2 == 0 or dilation < 1 or span > kernel_size:
            raise ValueError(
                f"a branch must have an odd kernel and span at most {kernel_size} positions, "
                f"not {span} with kernel {size} and dilation {dilation}"
            )
    return table[kernel_size]


def _as_branch(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Branch:
    scale, shift = scale_and_shift(deepcopy(norm).double())
    return Branch(conv.weight.double(), scale, shift, conv.dilation[0])
