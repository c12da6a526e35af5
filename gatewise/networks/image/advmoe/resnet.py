"""AdvMoE: convolutions that hold experts, and a small router that picks one of them for each image.

Every convolution of a backbone is split into experts, each a fraction of its width. A router, a ResNet-20 on the raw
image, chooses one expert per image for all layers at once. An image thus costs only a thin network, while the whole has
the capacity of several. Norms, stem, classifier and some shortcuts are shared by all experts.

Paper: Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", 2023, arXiv:2308.10110. This
file has the ResNets; `wrn`, `vgg` and `densenet` have the other backbones, and `routed` has the parts that all share.
The published code computes all experts and masks them; here only the chosen one runs
(`gatewise.ops.expert_conv`). The dense networks the paper compares with (`_ori`) are the same networks with a single
expert and no router. How the paper trains router and experts in alternation is a method, not a part of the networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.networks.image._base import FeatureInfo
from gatewise.networks.image.advmoe.keys import official_layout
from gatewise.networks.image.advmoe.routed import AdvMoEConfig, ConvNorm, ConvStem, Maps, OutMaps, RoutedNetwork
from gatewise.ops.expert_conv import ExpertRouting


@dataclass(frozen=True)
class ResNetMoEConfig(AdvMoEConfig):
    """Sizes of a ResNet.

    Args:
        depths: number of blocks per stage.
        bottleneck: whether blocks have three convolutions instead of two.
        scale_stem: whether `ratio` also scales the 64 channels of the stem for small images. It does in the published
            dense networks, but not in those with experts. The stem for large images is always scaled.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    scale_stem: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.width(64)
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"depths must be positive, not {self.depths}")

    @property
    def stem_width(self) -> int:
        """Number of channels of the stem."""
        return self.width(64) if self.scale_stem or self.stem == "imagenet" else 64


class ResidualBlock(nn.Module):
    """relu(shortcut + convolutions), with experts in all convolutions: (B, C, H, W) -> (B, C', H', W').

    Args:
        hidden: width within the block, and of its output unless it is a bottleneck.
    """

    def __init__(self, in_dim: int, hidden: int, stride: int, config: ResNetMoEConfig) -> None:
        super().__init__()
        dim = 4 * hidden if config.bottleneck else hidden
        experts = config.n_expert
        if config.bottleneck:
            kernels = [(in_dim, hidden, 1, 1), (hidden, hidden, 3, stride), (hidden, dim, 1, 1)]
        else:
            kernels = [(in_dim, dim, 3, stride), (dim, dim, 3, 1)]
        self.units = nn.ModuleList(ConvNorm(*shape, n_expert=experts) for shape in kernels)
        # The published networks for small images share the shortcut; those for large images give it experts as well.
        shared = config.stem == "cifar"
        self.shortcut: ConvNorm | None = None
        if stride != 1 or in_dim != dim:
            self.shortcut = ConvNorm(in_dim, dim, 1, stride, n_expert=1 if shared else experts)

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        y = x
        for unit in self.units[:-1]:
            y = F.relu(unit(y, routing))
        y = self.units[-1](y, routing)
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x, routing)))


class ResNetMoE(RoutedNetwork):
    """Shared stem, four stages of residual blocks with experts, global pooling, shared linear classifier."""

    def __init__(self, config: ResNetMoEConfig) -> None:
        super().__init__(config)
        dim = config.stem_width
        self.stem = ConvStem(config.in_chans, dim, config.stem)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            blocks = nn.ModuleList()
            for index in range(depth):
                hidden = config.width(64 * 2**stage)
                blocks.append(ResidualBlock(dim, hidden, 2 if stage and not index else 1, config))
                dim = 4 * hidden if config.bottleneck else hidden
            self.stages.append(blocks)
        self.finish()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        config = self.config
        expansion, first = (4 if config.bottleneck else 1), (1 if config.stem == "cifar" else 4)
        return [
            FeatureInfo(expansion * config.width(64 * 2**stage), first * 2**stage)
            for stage in range(len(config.depths))
        ]

    def run_stages(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        x = self.run_block(self.stem, x)
        levels = []
        for stage in self.stages:
            x = self.run_routed(stage, x, routing)
            levels.append(x)
        return levels


def layouts(config: ResNetMoEConfig) -> list[KeyLayout]:
    """Return the official layout."""
    shortcut, head = ("shortcut", "linear") if config.stem == "cifar" else ("downsample", "fc")
    rules = (
        ("^conv1", "^stem.unit.conv"),
        ("^bn1", "^stem.unit.norm"),
        ("^layer{i+1}.{j}.conv{k+1}", "^stages.{i}.{j}.units.{k}.conv"),
        ("^layer{i+1}.{j}.bn{k+1}", "^stages.{i}.{j}.units.{k}.norm"),
        (f"^layer{{i+1}}.{{j}}.{shortcut}.0", "^stages.{i}.{j}.shortcut.conv"),
        (f"^layer{{i+1}}.{{j}}.{shortcut}.1", "^stages.{i}.{j}.shortcut.norm"),
        (f"^{head}", "^head"),
    )
    return [official_layout(rules)]


_SHAPES: dict[int, dict[str, Any]] = {
    18: {"depths": (2, 2, 2, 2)},
    34: {"depths": (3, 4, 6, 3)},
    50: {"depths": (3, 4, 6, 3), "bottleneck": True},
    101: {"depths": (3, 4, 23, 3), "bottleneck": True},
    152: {"depths": (3, 8, 36, 3), "bottleneck": True},
}
DENSE: dict[str, Any] = {"n_expert": 1, "ratio": 1.0, "scale_stem": True}


def _cifar(layers: int, **fields: Any) -> Variant:
    return Variant(ResNetMoEConfig(num_classes=10, **_SHAPES[layers], **fields), (3, 32, 32))


def _imagenet(layers: int, **fields: Any) -> Variant:
    return Variant(ResNetMoEConfig(stem="imagenet", **_SHAPES[layers], **fields))


register(
    ResNetMoE,
    paper="advmoe",
    layouts=layouts,
    variants={
        "resnet18_cifar_moe": _cifar(18),
        "resnet34_cifar_moe": _cifar(34),
        "resnet50_cifar_moe": _cifar(50),
        "resnet101_cifar_moe": _cifar(101),
        "resnet152_cifar_moe": _cifar(152),
        "resnet18_cifar_ori": _cifar(18, **DENSE),
        "resnet34_cifar_ori": _cifar(34, **DENSE),
        "resnet50_cifar_ori": _cifar(50, **DENSE),
        "resnet101_cifar_ori": _cifar(101, **DENSE),
        "resnet152_cifar_ori": _cifar(152, **DENSE),
        "resnet18_imagenet_moe": _imagenet(18),
        "resnet34_imagenet_moe": _imagenet(34),
        "resnet50_imagenet_moe": _imagenet(50),
        "resnet101_imagenet_moe": _imagenet(101),
        "resnet152_imagenet_moe": _imagenet(152),
        "resnet18_imagenet_ori": _imagenet(18, **DENSE),
        "resnet34_imagenet_ori": _imagenet(34, **DENSE),
        "resnet50_imagenet_ori": _imagenet(50, **DENSE),
        "resnet101_imagenet_ori": _imagenet(101, **DENSE),
        "resnet152_imagenet_ori": _imagenet(152, **DENSE),
    },
)
