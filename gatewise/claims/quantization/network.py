"""A small network of depthwise separable convolutions, and the symmetry that makes its channels unequal.

A ReLU passes positive factors on: channel k of a layer can be multiplied by a factor and divided by it in the next
layer, and nothing changes but the ranges of weights and maps. Networks in use have such ranges: a batch norm that is
folded into a convolution divides each channel by its own standard deviation, so one scale per weight fails.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.efficiency.acceleration.fold import fold
from gatewise.layers.conv import ConvNormAct


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, each with batch norm and ReLU: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvNormAct(in_dim, in_dim, 3, stride, groups=in_dim, act=nn.ReLU)
        self.pointwise = ConvNormAct(in_dim, dim, act=nn.ReLU)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.pointwise(self.depthwise(x))


class SeparableNetwork(nn.Module):
    """MobileNetV1's form (Howard et al. 2017, arXiv:1704.04861) with a ReLU: (B, 1, H, W) -> (B, 10).

    Args:
        widths: channels of the stem, and of each block.
        strides: of the blocks; the stem's is 2.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 32, 64, 128, 128, 128),
        strides: tuple[int, ...] = (2, 1, 2, 1, 1),
    ) -> None:
        super().__init__()
        self.stem = ConvNormAct(1, widths[0], 3, 2, act=nn.ReLU)
        self.blocks = nn.Sequential(
            *(SeparableBlock(*shape) for shape in zip(widths[:-1], widths[1:], strides, strict=True))
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 10"]:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def blocks_of(network: nn.Module) -> list[SeparableBlock]:
    """All blocks, in the order in which they run."""
    return [module for module in network.modules() if isinstance(module, SeparableBlock)]


@torch.no_grad()
def disperse(network: SeparableNetwork, spread: float, draw: torch.Generator, behind: float = 0.5) -> SeparableNetwork:
    """Multiply the kernel of every depthwise channel by a factor of its own, and undo that in the layers around it.

    Factors are log-uniform from spread^-0.5 to spread^0.5. The map in front of the depthwise convolution is divided by
    factor^(1 - behind), the map behind it multiplied by factor^behind. The network computes the same, in training mode
    too: what is scaled are affine parameters of batch norms, and weights.

    Args:
        network: changed in place.
        behind: the share of a factor, in logarithms, that the map behind carries: 0 to 1.
    """
    before = network.stem
    for block in blocks_of(network):
        factor = spread ** (torch.rand(block.depthwise.conv.out_channels, generator=draw) - 0.5)
        _move_scale(before, block.depthwise, factor ** (behind - 1))
        _move_scale(block.depthwise, block.pointwise, factor**behind)
        before = block.pointwise
    return network


def _move_scale(first: ConvNormAct, second: ConvNormAct, factor: Float[Tensor, " dim"]) -> None:
    """Multiply the channels between two units by a factor each, and divide what reads them."""
    for affine in first.norm.parameters():
        affine *= factor
    channels_axis = 0 if second.conv.groups > 1 else 1
    second.conv.weight /= factor.view([-1 if axis == channels_axis else 1 for axis in range(4)])


@torch.no_grad()
def disparity(network: SeparableNetwork) -> float:
    """The widest range of a channel's kernel over the narrowest, the largest of all folded depthwise convolutions."""
    worst = 1.0
    for block in blocks_of(fold(network)):
        ranges = block.depthwise.conv.weight.flatten(1).abs().amax(dim=1)
        worst = max(worst, (ranges.max() / ranges.min()).item())
    return worst
