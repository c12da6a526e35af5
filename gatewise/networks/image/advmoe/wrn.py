"""AdvMoE's WideResNet with experts, and its dense form.

Paper: Zhang et al. 2023, arXiv:2308.10110; `resnet` explains the idea, `routed` has the parts that the networks share.
As in the published code, and unlike the WideResNet paper, a block that changes the width convolves its raw input and
leaves its first norm unused.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

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
class WideResNetMoEConfig(AdvMoEConfig):
    """Sizes of a WideResNet.

    Args:
        depth: number of convolutions in sequence: 6 n + 4 with n blocks per group.
        widen_factor: width of the groups relative to 16, 32 and 64.
        preactivate_transitions: whether blocks that change the width convolve the normalized input, as in the
            WideResNet paper. Otherwise they convolve the raw input, as in the published code of this paper. Their first
            norm is then computed but not used, and its weights get no gradients.
    """

    depth: int = 28
    widen_factor: int = 10
    preactivate_transitions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.width(16)
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"a WideResNet's depth must be 6 n + 4 with n blocks per group, not {self.depth}")
        if self.widen_factor < 1:
            raise ValueError(f"widen_factor must be at least 1, not {self.widen_factor}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of one expert in each group."""
        return tuple(self.width(dim * self.widen_factor) for dim in (16, 32, 64))


class WideBlock(nn.Module):
    """shortcut + convolutions after norms, with experts in all convolutions: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, stride: int, config: WideResNetMoEConfig) -> None:
        super().__init__()
        experts = config.n_expert
        self.norm1: nn.Module = nn.BatchNorm2d(in_dim)
        self.conv1 = ConvNorm(in_dim, dim, 3, stride, experts)
        self.conv2 = conv2d(dim, dim, 3, 1, experts)
        self.shortcut = conv2d(in_dim, dim, 1, stride, experts) if in_dim != dim else None
        self.preactivates_shortcut = config.preactivate_transitions

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        normed = F.relu(self.norm1(x)) if self._uses_norm or self.training else x
        y = F.relu(self.conv1(normed if self._uses_norm else x, routing))
        y = convolve(self.conv2, y, routing)
        if self.shortcut is None:
            return x + y
        return y + convolve(self.shortcut, normed if self.preactivates_shortcut else x, routing)

    @property
    def _uses_norm(self) -> bool:
        """Whether the norm's output is used. If not, the norm only tracks statistics in training, as published."""
        return self.shortcut is None or self.preactivates_shortcut

    def merged(self) -> WideBlock:
        """Return an equivalent block for eval mode, with the first norm folded to an affine map or dropped."""
        new = deepcopy(self)
        new.norm1 = without_statistics(self.norm1) if self._uses_norm else nn.Identity()
        return new


class WideResNetMoE(RoutedNetwork):
    """Shared stem, three groups of wide blocks with experts, norm, global pooling, shared linear classifier."""

    def __init__(self, config: WideResNetMoEConfig) -> None:
        super().__init__(config)
        dim = config.width(16)
        small = config.stem == "cifar"
        self.stem: nn.Module = conv2d(config.in_chans, dim, 3) if small else ConvStem(config.in_chans, dim, config.stem)
        self.stages = nn.ModuleList()
        for group, width in enumerate(config.widths):
            blocks = nn.ModuleList()
            for index in range((config.depth - 4) // 6):
                blocks.append(WideBlock(dim, width, 2 if group and not index else 1, config))
                dim = width
            self.stages.append(blocks)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.finish()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        first = 1 if self.config.stem == "cifar" else 4
        return [FeatureInfo(width, first * 2**group) for group, width in enumerate(self.config.widths)]

    def run_stages(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        x = self.run_block(self.stem, x)
        levels = []
        for stage in self.stages:
            x = self.run_routed(stage, x, routing)
            levels.append(x)
        return [*levels[:-1], F.relu(self.norm(x))]

    def merged(self) -> WideResNetMoE:
        """Return an equivalent network for eval mode, with its last norm as a multiplication and a sum."""
        new = deepcopy(self)
        new.norm = without_statistics(self.norm)
        return new


def wide_layouts(config: WideResNetMoEConfig) -> list[KeyLayout]:
    """Return the official layout."""
    conv, norm = ("^stem", "") if config.stem == "cifar" else ("^stem.unit.conv", "^stem.unit.norm")
    rules: list[Rule] = [
        ("^block{g+1}.layer.{i}.conv1", "^stages.{g}.{i}.conv1.conv"),
        ("^block{g+1}.layer.{i}.bn2", "^stages.{g}.{i}.conv1.norm"),
        ("^block{g+1}.layer.{i}.bn1", "^stages.{g}.{i}.norm1"),
        ("^block{g+1}.layer.{i}.convShortcut", "^stages.{g}.{i}.shortcut"),
        ("^block{g+1}.layer.{i}.conv2", "^stages.{g}.{i}.conv2"),
        ("^conv1", conv),
        ("^bn1", "^norm"),
        ("^fc", "^head"),
    ]
    return [official_layout((*rules, *([("^bn0", norm)] if norm else [])))]


DENSE: dict[str, Any] = {"n_expert": 1, "ratio": 1.0}
SMALL: dict[str, Any] = {"num_classes": 10}
LARGE: dict[str, Any] = {"stem": "imagenet"}


def _wide(depth: int, widen_factor: int, **fields: Any) -> Variant:
    config = WideResNetMoEConfig(depth=depth, widen_factor=widen_factor, **fields)
    return Variant(config, (3, 32, 32) if config.stem == "cifar" else (3, 224, 224))


register(
    WideResNetMoE,
    paper="advmoe",
    layouts=wide_layouts,
    variants={
        "wrn_28_4_cifar_moe": _wide(28, 4, **SMALL),
        "wrn_28_10_cifar_moe": _wide(28, 10, **SMALL),
        "wrn_34_10_cifar_moe": _wide(34, 10, **SMALL),
        "wrn_28_4_cifar_ori": _wide(28, 4, **SMALL, **DENSE),
        "wrn_28_10_cifar_ori": _wide(28, 10, **SMALL, **DENSE),
        "wrn_34_10_cifar_ori": _wide(34, 10, **SMALL, **DENSE),
        "wrn_28_4_imagenet_moe": _wide(28, 4, **LARGE),
        "wrn_28_10_imagenet_moe": _wide(28, 10, **LARGE),
        "wrn_34_10_imagenet_moe": _wide(34, 10, **LARGE),
        "wrn_28_4_imagenet_ori": _wide(28, 4, **LARGE, **DENSE),
        "wrn_28_10_imagenet_ori": _wide(28, 10, **LARGE, **DENSE),
        "wrn_34_10_imagenet_ori": _wide(34, 10, **LARGE, **DENSE),
    },
)
