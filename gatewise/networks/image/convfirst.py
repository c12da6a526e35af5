"""ConvFirst: inverted residuals whose spatial convolution comes first, so that a whole block fits on the chip.

The usual inverted residual filters the expanded channels. The widest tensor then needs a halo, and is written out and
read back. ConvFirst filters the thin input instead. Its two pointwise convolutions become neighbors and form an MLP, so
one kernel can run the block without the expanded tensor ever leaving the chip. Groups of eight channels, in place of
depthwise convolutions, suit matrix units.

Paper: Lavin, "On the Efficiency of Convolutional Neural Networks", 2024, arXiv:2404.03617. The blocks and the benchmark
stage are those of the published code. The stage table of the paper's network was not available: ConvFirstNet's widths
and depths, its stem and its initial values are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.init_weights import init_by_fan_out
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork

Activation = Literal["silu", "relu", "gelu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class ConvFirstConfig(ImageConfig):
    """Sizes and options of a ConvFirstNet. All tuples but `out_indices` have one entry per stage.

    Args:
        blocks: kind of block in each stage.
        expand_ratios: hidden width relative to the input width.
        group_width: channels per group of the spatial convolution; 1 is depthwise.
        out_indices: stages that `forward_pyramid` returns.
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    embed_dims: tuple[int, ...] = (48, 96, 192, 384)
    blocks: tuple[str, ...] = ("convfirst", "convfirst", "mbconv", "mbconv")
    expand_ratios: tuple[int, ...] = (6, 6, 4, 4)
    kernel_size: int = 3
    group_width: int = 8
    activation: Activation = "silu"
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    patch_size = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("embed_dims", "blocks", "expand_ratios"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {getattr(self, name)}")
        if min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, depths cannot be {self.depths}")
        if unknown := set(self.blocks) - set(BLOCKS):
            raise ValueError(f"blocks must be of {', '.join(BLOCKS)}, not {', '.join(sorted(unknown))}")
        if self.embed_dims[0] % 2:
            raise ValueError(f"the first width is halved in the stem and must be even, not {self.embed_dims[0]}")
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")


class _Residual(nn.Module):
    """Parts shared by both blocks, with a shortcut around them if input and output have the same shape."""

    def __init__(self, residual: bool, drop_path_rate: float) -> None:
        super().__init__()
        self.residual = residual
        self.drop_path = DropPath(drop_path_rate)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = self.branch(x)
        return x + self.drop_path(y) if self.residual else y


class ConvFirst(_Residual):
    """Grouped convolution, then an MLP over channels: (B, C, H, W) -> (B, C', H', W').

        y = norm(conv_kxk(x)),   out = norm(W2 silu(norm(W1 y))) + x

    There is no activation after the convolution.

    Args:
        group_width: channels per group; divides `in_dim`.
        expand_ratio: hidden width relative to the input width.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 1,
        *,
        kernel_size: int = 3,
        group_width: int = 8,
        expand_ratio: int = 4,
        activation: Activation = "silu",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(stride == 1 and in_dim == dim, drop_path_rate)
        groups, hidden = _groups("ConvFirst", in_dim, group_width), in_dim * expand_ratio
        self.spatial = ConvNormAct(in_dim, in_dim, kernel_size, stride, groups=groups, act=None)
        self.expand = ConvNormAct(in_dim, hidden, act=ACTIVATIONS[activation])
        self.project = ConvNormAct(hidden, dim, act=None)

    def branch(self, x: Tensor) -> Tensor:
        return self.project(self.expand(self.spatial(x)))


class MBConv(_Residual):
    """The inverted residual with a grouped convolution: (B, C, H, W) -> (B, C', H', W').

        out = norm(W2 silu(norm(conv_kxk(silu(norm(W1 x)))))) + x

    Arguments are those of `ConvFirst`, but `group_width` divides the hidden width.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 1,
        *,
        kernel_size: int = 3,
        group_width: int = 8,
        expand_ratio: int = 4,
        activation: Activation = "silu",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(stride == 1 and in_dim == dim, drop_path_rate)
        hidden, act = in_dim * expand_ratio, ACTIVATIONS[activation]
        groups = _groups("MBConv", hidden, group_width)
        self.expand = ConvNormAct(in_dim, hidden, act=act)
        self.spatial = ConvNormAct(hidden, hidden, kernel_size, stride, groups=groups, act=act)
        self.project = ConvNormAct(hidden, dim, act=None)

    def branch(self, x: Tensor) -> Tensor:
        return self.project(self.spatial(self.expand(x)))


BLOCKS: dict[str, type[ConvFirst] | type[MBConv]] = {"convfirst": ConvFirst, "mbconv": MBConv}


def _groups(block: str, channels: int, group_width: int) -> int:
    if group_width < 1 or channels % group_width:
        raise ValueError(f"{block}: {channels} channels are not a multiple of group width {group_width}")
    return channels // group_width


class PointwiseMlp(_Residual):
    """Two pointwise convolutions with norms, and a shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, expand_ratio: int = 4, activation: Activation = "silu") -> None:
        super().__init__(residual=True, drop_path_rate=0.0)
        self.expand = ConvNormAct(dim, dim * expand_ratio, act=ACTIVATIONS[activation])
        self.project = ConvNormAct(dim * expand_ratio, dim, act=None)

    def branch(self, x: Tensor) -> Tensor:
        return self.project(self.expand(x))


class BenchmarkStage(nn.Module):
    """The stage that the published code benchmarks: (B, C, H, W) -> (B, C, 1, 1).

    Blocks between MLPs, then the mean over positions. The larger half of the `extra_depth` MLPs comes first.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        extra_depth: int,
        block: str = "convfirst",
        *,
        kernel_size: int = 3,
        group_width: int = 8,
        expand_ratio: int = 4,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        before = math.ceil(extra_depth / 2)
        self.pre = nn.Sequential(*(PointwiseMlp(dim, expand_ratio, activation) for _ in range(before)))
        make = partial(
            BLOCKS[block],
            kernel_size=kernel_size,
            group_width=group_width,
            expand_ratio=expand_ratio,
            activation=activation,
        )
        self.blocks = nn.Sequential(*(make(dim, dim) for _ in range(depth)))
        self.post = nn.Sequential(*(PointwiseMlp(dim, expand_ratio, activation) for _ in range(extra_depth - before)))

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim 1 1"]:
        return self.post(self.blocks(self.pre(x))).mean(dim=(2, 3), keepdim=True)


_init_weights = partial(init_by_fan_out, linear_std=0.01)


class ConvFirstNet(StagedNetwork):
    """A stem of stride 4, four stages (ConvFirst, then inverted residuals), mean over positions, linear classifier."""

    def __init__(self, config: ConvFirstConfig) -> None:
        super().__init__(config)
        dims, act = config.embed_dims, ACTIVATIONS[config.activation]
        self.stem = nn.Sequential(
            ConvNormAct(config.in_chans, dims[0] // 2, 3, 2, act=act),
            ConvNormAct(dims[0] // 2, dims[0], 3, 2, act=None),
        )
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList(self._stage(index, rates[index]) for index in range(len(dims)))
        self.level_norms = nn.ModuleDict()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(_init_weights)
        for block in self.modules():
            if isinstance(block, ConvFirst | MBConv) and block.residual:
                # Every block starts as an identity.
                nn.init.zeros_(block.project.norm.get_parameter("weight"))

    def _stage(self, index: int, rates: list[float]) -> Stage:
        """Build a stage. In every stage but the first, the first block halves the map and changes the width."""
        config = self.config
        make = partial(
            BLOCKS[config.blocks[index]],
            kernel_size=config.kernel_size,
            group_width=config.group_width,
            expand_ratio=config.expand_ratios[index],
            activation=config.activation,
        )
        dim = config.embed_dims[index]
        downsample = make(config.embed_dims[index - 1], dim, 2) if index else nn.Identity()
        rest = rates[1:] if index else rates
        return Stage(downsample, [make(dim, dim, drop_path_rate=rate) for rate in rest])

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, _init_weights)


# Our names for the members of a block's sequence in the published code.
MEMBERS: dict[str, tuple[Rule, ...]] = {
    "convfirst": (
        ("layers.0", "spatial.conv"),
        ("layers.1", "spatial.norm"),
        ("layers.2", "expand.conv"),
        ("layers.3", "expand.norm"),
        ("layers.5", "project.conv"),
        ("layers.6", "project.norm"),
    ),
    "mbconv": (
        ("layers.0", "expand.conv"),
        ("layers.1", "expand.norm"),
        ("layers.3", "spatial.conv"),
        ("layers.4", "spatial.norm"),
        ("layers.6", "project.conv"),
        ("layers.7", "project.norm"),
    ),
    "mlp": (
        ("layers.0", "expand.conv"),
        ("layers.1", "expand.norm"),
        ("layers.3", "project.conv"),
        ("layers.4", "project.norm"),
    ),
}


def below(prefix: str, kind: str) -> list[Rule]:
    return [(f"{prefix}.{theirs}", f"{prefix}.{ours}") for theirs, ours in MEMBERS[kind]]


def layouts(config: ConvFirstConfig) -> list[KeyLayout]:
    """Return the layout of the published blocks within stages. No weights are published."""
    rules: list[Rule] = []
    for index, block in enumerate(config.blocks):
        rules += below(f"^stages.{index}.downsample", block) + below(f"^stages.{index}.blocks.{{j}}", block)
    return [KeyLayout("official", tuple((theirs.removeprefix("^"), ours.removeprefix("^")) for theirs, ours in rules))]


register(
    ConvFirstNet,
    paper="convfirst",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "convfirstnet_small": Variant(ConvFirstConfig(), (3, 256, 256)),
        "convfirstnet_medium": Variant(
            ConvFirstConfig(depths=(3, 3, 9, 3), embed_dims=(64, 128, 256, 512)), (3, 256, 256)
        ),
        "convfirstnet_large": Variant(
            ConvFirstConfig(depths=(3, 3, 9, 3), embed_dims=(96, 192, 384, 768)), (3, 256, 256)
        ),
    },
)
