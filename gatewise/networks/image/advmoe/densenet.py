"""AdvMoE's DenseNet with experts, and its dense form.

Paper: Zhang et al. 2023, arXiv:2308.10110; `resnet` explains the idea, `routed` has the parts that the networks share.
The published DenseNet with experts cannot be built (it passes a ratio that its layers do not accept). Here the ratio
scales the growth and the first convolution, as in the published dense form. The default of 1 gives layers of the
published sizes. The form for large images has the usual stem of DenseNets.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.networks.image._base import FeatureInfo
from gatewise.networks.image.advmoe.keys import official_layout
from gatewise.networks.image.advmoe.routed import (
    AdvMoEConfig,
    ConvNorm,
    ConvStem,
    Maps,
    OutMaps,
    RoutedNetwork,
    conv2d,
    convolve,
    without_statistics,
)
from gatewise.ops.expert_conv import ExpertRouting


@dataclass(frozen=True)
class DenseNetMoEConfig(AdvMoEConfig):
    """Sizes of a DenseNet of three blocks.

    Args:
        depth: number of convolutions in sequence: three blocks of (depth - 4) // 6 layers with two each.
        growth_rate: channels that each layer adds, before scaling by `ratio`.
        init_features: channels of the first convolution, before scaling by `ratio`.
        bottleneck_factor: width within a layer relative to its growth.
        compression: fraction of the channels that a transition keeps.
    """

    ratio: float = 1.0
    depth: int = 40
    growth_rate: int = 12
    init_features: int = 24
    bottleneck_factor: int = 4
    compression: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.width(min(self.growth_rate, self.init_features))
        if self.depth < 10:
            raise ValueError(f"depth must leave every block a layer, that is at least 10, not {self.depth}")
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression must be in (0, 1], not {self.compression}")

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """Channels before and after each block."""
        widths: list[tuple[int, int]] = []
        dim = self.width(self.init_features)
        for _ in range(3):
            last = dim + (self.depth - 4) // 6 * self.width(self.growth_rate)
            widths.append((dim, last))
            dim = int(last * self.compression)
        return tuple(widths)


class DenseLayer(nn.Module):
    """Input concatenated with the output of two routed convolutions: (B, C, H, W) -> (B, C + growth, H, W)."""

    def __init__(self, in_dim: int, config: DenseNetMoEConfig) -> None:
        super().__init__()
        growth, experts = config.width(config.growth_rate), config.n_expert
        hidden = config.bottleneck_factor * growth
        self.norm1: nn.Module = nn.BatchNorm2d(in_dim)
        self.conv1 = ConvNorm(in_dim, hidden, 1, n_expert=experts)
        self.conv2 = conv2d(hidden, growth, 3, n_expert=experts)

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        y = F.relu(self.conv1(F.relu(self.norm1(x)), routing))
        return torch.cat([x, convolve(self.conv2, y, routing)], dim=1)

    def merged(self) -> DenseLayer:
        """Return an equivalent layer for eval mode, with its first norm as a multiplication and a sum."""
        new = deepcopy(self)
        new.norm1 = without_statistics(self.norm1)
        return new


class Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution and average pooling for all experts: (B, C, H, W) -> (B, C', H // 2, W // 2)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(in_dim)
        self.conv = conv2d(in_dim, dim, 1)

    def forward(self, x: Maps) -> OutMaps:
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2)

    def merged(self) -> Transition:
        """Return an equivalent transition for eval mode, with the norm as a multiplication and a sum."""
        new = deepcopy(self)
        new.norm = without_statistics(self.norm)
        return new


class DenseNetMoE(RoutedNetwork):
    """Shared stem, three dense blocks with experts, shared transitions, norm, global pooling and classifier."""

    def __init__(self, config: DenseNetMoEConfig) -> None:
        super().__init__(config)
        small, widths = config.stem == "cifar", config.widths
        first = config.width(config.init_features)
        self.stem: nn.Module = (
            conv2d(config.in_chans, first, 3) if small else ConvStem(config.in_chans, first, config.stem)
        )
        growth = config.width(config.growth_rate)
        self.stages = nn.ModuleList(
            nn.ModuleList(DenseLayer(dim, config) for dim in range(start, last, growth)) for start, last in widths
        )
        self.transitions = nn.ModuleList(Transition(last, start) for (_, last), (start, _) in pairwise(widths))
        self.norm: nn.Module = nn.BatchNorm2d(widths[-1][1])
        # Two transitions halve the map, rounding down. Before them, the stem for large images rounds up twice.
        self.min_size = 4 if small else 13
        self.finish()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        first = 1 if self.config.stem == "cifar" else 4
        return [FeatureInfo(last, first * 2**block) for block, (_, last) in enumerate(self.config.widths)]

    def run_stages(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        x = self.run_block(self.stem, x)
        levels: list[Tensor] = []
        for stage, transition in zip(self.stages, [nn.Identity(), *self.transitions], strict=True):
            x = self.run_routed(stage, transition(x), routing)
            levels.append(x)
        return [*levels[:-1], F.relu(self.norm(x))]

    def merged(self) -> DenseNetMoE:
        """Return an equivalent network for eval mode, with its last norm as a multiplication and a sum."""
        new = deepcopy(self)
        new.norm = without_statistics(self.norm)
        return new


def dense_layouts(config: DenseNetMoEConfig) -> list[KeyLayout]:
    """Return the official layout."""
    stem = "^stem" if config.stem == "cifar" else "^stem.unit.conv"
    rules: list[Rule] = [
        ("^features.conv0", stem),
        ("^features.denseblock{i+1}.denselayer{j+1}", "^stages.{i}.{j}"),
        ("^stages.{i}.{j}.conv1", "^stages.{i}.{j}.conv1.conv"),
        ("^stages.{i}.{j}.norm2", "^stages.{i}.{j}.conv1.norm"),
        ("^features.transition{i+1}", "^transitions.{i}"),
        ("^features.norm_final", "^norm"),
        ("^classifier", "^head"),
    ]
    return [official_layout((*rules, *([] if config.stem == "cifar" else [("^features.norm0", "^stem.unit.norm")])))]


DENSE: dict[str, Any] = {"n_expert": 1, "ratio": 1.0}
SMALL: dict[str, Any] = {"num_classes": 10}
LARGE: dict[str, Any] = {"stem": "imagenet"}


def _dense(**fields: Any) -> Variant:
    config = DenseNetMoEConfig(**fields)
    return Variant(config, (3, 32, 32) if config.stem == "cifar" else (3, 224, 224))


register(
    DenseNetMoE,
    paper="advmoe",
    layouts=dense_layouts,
    variants={
        "densenet_cifar_moe": _dense(**SMALL),
        "densenet_imagenet_moe": _dense(**LARGE),
        "densenet_cifar_ori": _dense(**SMALL, **DENSE),
        "densenet_imagenet_ori": _dense(**LARGE, **DENSE),
    },
)
