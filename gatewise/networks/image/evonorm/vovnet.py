"""VoVNet with EvoNorm: blocks that aggregate the outputs of all their convolutions once, at the end.

Paper of the layer: Liu et al. 2020, arXiv:2004.02967. Papers of the network: Lee et al. 2019, arXiv:1904.09730, and,
for the squeeze-excitation with a single linear layer (one per stage), 2020, arXiv:1911.06667.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.evonorm import ConvEvoNorm
from gatewise.layers.init_weights import init_kaiming
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageNetwork
from gatewise.networks.image.evonorm.keys import norm_key
from gatewise.networks.image.evonorm.resnet import EvoNormConfig

Maps = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class EvoNormVoVNetConfig(EvoNormConfig):
    """Sizes and options of a VoVNet. Tuples have one entry per stage, except `stem_channels`.

    Args:
        stem_channels: channels of the stem's three convolutions, which have strides 2, 1 and 2.
        layer_channels: channels of the convolutions within a block.
        channels: output channels of a block.
        depths: number of blocks.
        layers: number of convolutions per block.
    """

    stem_channels: tuple[int, int, int] = (64, 64, 128)
    layer_channels: tuple[int, ...] = (128, 160, 192, 224)
    channels: tuple[int, ...] = (256, 512, 768, 1024)
    depths: tuple[int, ...] = (1, 1, 2, 2)
    layers: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.layer_channels) == len(self.channels) == len(self.depths) or min(self.depths) < 1:
            raise ValueError(
                f"every stage needs a depth of at least 1, layer_channels and channels, not {self.depths}, "
                f"{self.layer_channels} and {self.channels}"
            )
        if self.layers < 1:
            raise ValueError(f"a block has at least one convolution, not {self.layers}")


class ChannelGate(nn.Module):
    """x * hard_sigmoid(linear(mean over positions)): (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Maps) -> Maps:
        return x * self.gate(x)

    def gate(self, x: Maps) -> Float[Tensor, "batch channels 1 1"]:
        """Return the factors of the channels."""
        return F.hardsigmoid(self.map(x.mean(dim=(2, 3), keepdim=True)))

    def read_gates(self, x: Maps) -> dict[str, Tensor]:
        """Return one factor per channel: (B, C)."""
        return {"channels": self.gate(x).flatten(1)}


class Aggregation(nn.Module):
    """A sequence of convolutions whose outputs are all joined by a 1x1: (B, C, H, W) -> (B, C', H, W).

    Args:
        first: whether this is the first block of its stage, which does not add its input.
        last: whether this is the last block of its stage, which has the gate.
    """

    def __init__(
        self, in_dim: int, stage: int, first: bool, last: bool, rate: float, config: EvoNormVoVNetConfig
    ) -> None:
        super().__init__()
        width, dim = config.layer_channels[stage], config.channels[stage]
        self.convs = nn.ModuleList(
            ConvEvoNorm(width if index else in_dim, width, 3, norm=config.norm) for index in range(config.layers)
        )
        self.join = ConvEvoNorm(in_dim + config.layers * width, dim, 1, norm=config.norm)
        self.gate = ChannelGate(dim) if last else nn.Identity()
        self.residual = not first
        self.drop_path = DropPath(0.0 if first else rate)

    def forward(self, x: Maps) -> Float[Tensor, "batch dim height width"]:
        maps = [x]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        y = self.gate(self.join(torch.cat(maps, dim=1)))
        return x + self.drop_path(y) if self.residual else y


class EvoNormVoVNet(ImageNetwork):
    """Stem of stride 4, four stages with max pooling between them, global pooling, linear classifier."""

    min_size = 29
    """Below this size, a 3x3 pooling without padding would see fewer than two positions."""

    def __init__(self, config: EvoNormVoVNetConfig) -> None:
        super().__init__(config)
        dims = (config.in_chans, *config.stem_channels)
        self.stem = nn.Sequential(
            *(ConvEvoNorm(dims[i], dims[i + 1], 3, stride, norm=config.norm) for i, stride in enumerate((2, 1, 2)))
        )
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stages = nn.ModuleList()
        dim = config.stem_channels[-1]
        for stage, depth in enumerate(config.depths):
            blocks = nn.ModuleList()
            for b in range(depth):
                blocks.append(Aggregation(dim, stage, b == 0, b == depth - 1, rates[stage][b], config))
                dim = config.channels[stage]
            self.stages.append(blocks)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(init_kaiming)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(channels, 4 * 2**stage) for stage, channels in enumerate(self.config.channels)]

    def forward_features(self, x: Maps) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling."""
        return self.forward_pyramid(x)[-1]

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Maps) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the outputs of the stages."""
        self.check_input(x)
        x = self.stem(x)
        levels = []
        for index, stage in enumerate(self.stages):
            x = self.pool(x) if index else x
            x = self.run_blocks(stage.children(), x)
            levels.append(x)
        return levels

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.channels[-1], num_classes, init_kaiming)


def layouts(config: EvoNormVoVNetConfig) -> list[KeyLayout]:
    """Return timm's layout."""
    rules = (
        ("^head.fc", "head"),
        ("stages.{s}.blocks.{b}", "stages.{s}.{b}"),
        ("conv_mid.{i}", "convs.{i}"),
        ("conv_concat", "join"),
        ("attn.fc", "gate.map"),
        ("bn", f"norm{norm_key(config.norm)}"),
    )
    return [KeyLayout("timm", rules)]


register(
    EvoNormVoVNet,
    paper="evonorm",
    layouts=layouts,
    variants={
        "ese_vovnet39b_evos": Variant(EvoNormVoVNetConfig()),
    },
)
