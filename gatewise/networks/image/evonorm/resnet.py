"""ResNets with EvoNorm: one layer, found by evolution, in place of every pair of batch norm and ReLU.

The search assembled layers from sums, quotients, maxima and means, trained each in three networks at once, and kept
those that did well in all of them. Most of them divide x by something that is large where x is small or negative: an
activation that is also a norm. The layers are in `gatewise.layers.evonorm` and their operators in
`gatewise.ops.evonorm`; this file has the ResNets that use them.

Paper: Liu et al., "Evolving Normalization-Activation Layers", 2020, arXiv:2004.02967. With the activation last (the
official code), projections and the last layer of a block are only a weight and a bias, and a ReLU follows the sum. With
the activation first (timm's weights), nothing follows the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.conv import PADDINGS, Padding
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.evonorm import ConvEvoNorm, EvoNorm, LayerName, NormActivation
from gatewise.layers.init_weights import init_kaiming
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.evonorm.keys import tensorflow, timm_preact, torchvision
from gatewise.networks.image.mobilenetv2 import round_channels

Maps = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class EvoNormConfig(ImageConfig):
    """Choice of the layer after every convolution, for all networks with EvoNorm.

    Args:
        norm_layer: an EvoNorm layer, B0 to S2a, or a norm and an activation to compare it with, such as BN-ReLU.
        norm_eps: epsilon; None for the layer's default.
        norm_groups: number of groups of the S series and of group norms, reduced one by one until it divides the
            channels.
        norm_group_size: channels per group instead of `norm_groups`; must divide the channels.
        norm_momentum: momentum of the running statistics.
        norm_unbiased: whether the B series has unbiased running variances, like timm and batch norms; the official code
            has biased ones.
        norm_centered: whether B1 and B2 use standard deviations, as the paper writes them, instead of root mean
            squares.
    """

    norm_layer: LayerName = "S0"
    norm_eps: float | None = None
    norm_groups: int = 32
    norm_group_size: int | None = None
    norm_momentum: float = 0.1
    norm_unbiased: bool = True
    norm_centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # Raises for options that no layer supports.
        _ = self.norm

    @property
    def norm(self) -> NormActivation:
        """Layer after every convolution."""
        return NormActivation(
            self.norm_layer,
            self.norm_eps,
            self.norm_groups,
            self.norm_group_size,
            self.norm_momentum,
            self.norm_unbiased,
            self.norm_centered,
        )


@dataclass(frozen=True)
class EvoNormResNetConfig(EvoNormConfig):
    """Sizes and options of a ResNet of bottleneck blocks.

    Args:
        channels: output channels of each stage; blocks use a quarter of them internally.
        stem_channels: output channels of the stem.
        preact: whether EvoNorm precedes the convolutions and nothing follows the sum.
        deep_stem: whether the stem has three 3x3 convolutions instead of one 7x7.
        avg_down: whether shortcuts pool before their 1x1 convolution, which then has no stride.
        pool_padding: padding of the stem's pooling: "symmetric", or "same" as in TensorFlow.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    stem_channels: int = 64
    preact: bool = False
    deep_stem: bool = False
    avg_down: bool = False
    pool_padding: Padding = "symmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.channels) or min(self.depths, default=0) < 1:
            raise ValueError(
                f"every stage needs a depth of at least 1 and its channels, not depths {self.depths} and "
                f"channels {self.channels}"
            )
        if self.pool_padding not in PADDINGS:
            raise ValueError(f"pool_padding must be one of {', '.join(PADDINGS)}, not {self.pool_padding!r}")
        if self.preact and not self.deep_stem:
            raise ValueError("the form with the activation first has the deep stem: pass deep_stem=True with preact")


class Pool(nn.Module):
    """3x3 max pooling of the stem at stride 2: (B, C, H, W) -> (B, C, H', W')."""

    def __init__(self, padding: Padding) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Maps) -> Float[Tensor, "batch channels h w"]:
        if self.padding == "symmetric":
            return F.max_pool2d(x, 3, 2, 1)
        # TensorFlow pads even sizes by one at the right and bottom, and odd sizes by one on each side.
        top, left = x.shape[2] % 2, x.shape[3] % 2
        return F.max_pool2d(F.pad(x, (left, 1, top, 1), value=float("-inf")), 3, 2)


def average_halves(stride: int) -> nn.Module:
    """Return 2x2 average pooling at stride 2, whose last windows may be partial, or an identity at stride 1."""
    return nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()


class Bottleneck(nn.Module):
    """relu(shortcut + expand(spatial(reduce(x)))), with EvoNorm after convolutions: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stride: int, first: bool, rate: float, config: EvoNormResNetConfig):
        super().__init__()
        hidden, norm = round_channels(dim / 4), config.norm
        self.shortcut: nn.Module = nn.Identity()
        if first:
            self.shortcut = nn.Sequential(
                average_halves(stride) if config.avg_down else nn.Identity(),
                ConvEvoNorm(in_dim, dim, 1, 1 if config.avg_down else stride, norm=norm, act=False),
            )
        self.reduce = ConvEvoNorm(in_dim, hidden, 1, norm=norm)
        self.spatial = ConvEvoNorm(hidden, hidden, 3, stride, norm=norm)
        self.expand = ConvEvoNorm(hidden, dim, 1, norm=norm, act=False)
        self.drop_path = DropPath(rate)

    def forward(self, x: Maps) -> Float[Tensor, "batch dim h w"]:
        y = self.drop_path(self.expand(self.spatial(self.reduce(x))))
        return F.relu(self.shortcut(x) + y)

    def start_closed(self) -> None:
        """Make the branch output zero at first (section 4 of the paper follows the usual ResNet recipe)."""
        nn.init.zeros_(affine_of(self.expand.norm).get_parameter("weight"))


def affine_of(layer: nn.Module) -> nn.Module:
    """Return the part of a chosen layer that holds weight and bias."""
    return layer if isinstance(layer, EvoNorm) else layer.get_submodule("norm")


class PreActBottleneck(nn.Module):
    """shortcut + conv3(norm3(conv2(norm2(conv1(norm1(x)))))): (B, C, H, W) -> (B, C', H', W').

    The first block of a stage takes its shortcut after its first layer, the others before it.
    """

    def __init__(self, in_dim: int, dim: int, stride: int, first: bool, rate: float, config: EvoNormResNetConfig):
        super().__init__()
        hidden, norm = round_channels(dim / 4), config.norm
        self.norm1 = norm.build(in_dim)
        self.downsample: nn.Module | None = None
        if first:
            self.downsample = nn.Sequential(
                average_halves(stride) if config.avg_down else nn.Identity(),
                nn.Conv2d(in_dim, dim, 1, 1 if config.avg_down else stride, bias=False),
            )
        self.conv1 = nn.Conv2d(in_dim, hidden, 1, bias=False)
        self.norm2 = norm.build(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, bias=False)
        self.norm3 = norm.build(hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1, bias=False)
        self.drop_path = DropPath(rate)

    def forward(self, x: Maps) -> Float[Tensor, "batch dim h w"]:
        normed = self.norm1(x)
        y = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(normed)))))
        return self.drop_path(y) + (x if self.downsample is None else self.downsample(normed))

    def start_closed(self) -> None:
        """Make the branch output zero at first."""
        nn.init.zeros_(self.conv3.weight)


def deep_stem(in_chans: int, dim: int, config: EvoNormResNetConfig) -> nn.Sequential:
    """Build three 3x3 convolutions (the first with stride 2) and pooling. With `preact`, the last layer is left out."""
    half = dim // 2
    last: nn.Module = nn.Conv2d(half, dim, 3, padding=1, bias=False)
    return nn.Sequential(
        ConvEvoNorm(in_chans, half, 3, 2, norm=config.norm),
        ConvEvoNorm(half, half, 3, norm=config.norm),
        last if config.preact else ConvEvoNorm(half, dim, 3, norm=config.norm),
        Pool(config.pool_padding),
    )


class EvoNormResNet(ImageNetwork):
    """Stem of stride 4, four stages of bottleneck blocks, global pooling, linear classifier."""

    def __init__(self, config: EvoNormResNetConfig) -> None:
        super().__init__(config)
        stem = config.stem_channels
        if config.deep_stem:
            self.stem = deep_stem(config.in_chans, stem, config)
        else:
            self.stem = nn.Sequential(
                ConvEvoNorm(config.in_chans, stem, 7, 2, norm=config.norm), Pool(config.pool_padding)
            )
        block = PreActBottleneck if config.preact else Bottleneck
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList()
        in_dim = stem
        for stage, dim in enumerate(config.channels):
            blocks = nn.ModuleList()
            for index, rate in enumerate(rates[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(in_dim, dim, stride, index == 0, rate, config))
                in_dim = dim
            self.stages.append(blocks)
        self.norm = config.norm.build(in_dim) if config.preact else nn.Identity()
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(init_kaiming)
        for module in self.modules():
            if isinstance(module, Bottleneck | PreActBottleneck):
                module.start_closed()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(channels, 4 * 2**stage) for stage, channels in enumerate(self.config.channels)]

    def forward_features(self, x: Maps) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling. Odd sizes round up at every stride."""
        return self.forward_pyramid(x)[-1]

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Maps) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the outputs of the stages. With the activation first, the last one passes the network's last layer."""
        self.check_input(x)
        x = self.stem(x)
        levels = self.run_rows(self.stages, x)
        return [*levels[:-1], self.norm(levels[-1])]

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.channels[-1], num_classes, init_kaiming)


def layouts(config: EvoNormResNetConfig) -> list[KeyLayout]:
    """Return timm's layout or, with the activation last, torchvision's and TensorFlow's."""
    if config.preact:
        return [timm_preact(config)]
    return [torchvision(config), tensorflow(config)]


def _official(layer: Any, **fields: Any) -> Variant:
    """Return the official code's ResNet: eps 1e-5 everywhere, biased running variances, TensorFlow's pooling."""
    norm: dict[str, Any] = {"norm_layer": layer, "norm_eps": 1e-5, "norm_unbiased": False}
    return Variant(EvoNormResNetConfig(pool_padding="same", **norm, **fields))


DEEP = (3, 4, 23, 3)

register(
    EvoNormResNet,
    paper="evonorm",
    layouts=layouts,
    variants={
        "resnetv2_50d_evos": Variant(
            EvoNormResNetConfig(preact=True, deep_stem=True, avg_down=True),
            weights=Weights(
                "timm/resnetv2_50d_evos.ah_in1k",
                "Apache-2.0",
                crop_pct=0.95,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
        ),
        "resnet50_evonorm_b0": _official("B0"),
        "resnet50_evonorm_b1": _official("B1"),
        "resnet50_evonorm_b2": _official("B2"),
        "resnet50_evonorm_s0": _official("S0"),
        "resnet50_evonorm_s1": _official("S1"),
        "resnet50_evonorm_s2": _official("S2"),
        "resnet101_evonorm_b0": _official("B0", depths=DEEP),
        "resnet101_evonorm_s0": _official("S0", depths=DEEP),
    },
)
