"""AdvMoE's VGG with experts, and its dense form.

Paper: Zhang et al. 2023, arXiv:2308.10110; `resnet` explains the idea, `routed` has the parts that the networks share.
As in the published code, and unlike the VGG paper, the classifier pools to 2x2 and has three narrow layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.networks.image._base import FeatureInfo
from gatewise.networks.image.advmoe.keys import official_layout
from gatewise.networks.image.advmoe.routed import AdvMoEConfig, ConvNorm, Maps, OutMaps, RoutedNetwork, init_weights
from gatewise.ops.expert_conv import ExpertRouting


@dataclass(frozen=True)
class VGGMoEConfig(AdvMoEConfig):
    """Sizes of a VGG.

    Args:
        widths: widths of the convolutions of each stage; pooling halves the map between stages.
        batch_norm: whether a batch norm follows each convolution.
        hidden_dim: width of the two hidden layers of the classifier, regardless of `ratio`.
    """

    widths: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    batch_norm: bool = True
    hidden_dim: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or not all(self.widths):
            raise ValueError(f"every stage of a VGG needs at least one convolution, not widths {self.widths}")
        self.width(min(min(stage) for stage in self.widths))
        if self.stem != "cifar":
            raise ValueError("the VGG has no other stem: leave stem at cifar, it takes images of any size from 16 on")
        if self.input_mean is not None:
            raise ValueError("the published VGG ignores an input normalization: normalize the images before it")


class VGGLayer(nn.Module):
    """Convolution, norm if there is one, ReLU: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_dim: int, dim: int, n_expert: int, batch_norm: bool) -> None:
        super().__init__()
        self.unit = ConvNorm(in_dim, dim, 3, n_expert=n_expert)
        if not batch_norm:
            self.unit.norm = nn.Identity()

    def forward(self, x: Maps, routing: ExpertRouting | None = None) -> OutMaps:
        return F.relu(self.unit(x, routing))


class VGGMoE(RoutedNetwork):
    """Stages of 3x3 convolutions, the first one shared; pooling to 2x2 and a shared classifier of three layers."""

    def __init__(self, config: VGGMoEConfig) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList()
        dim = config.in_chans
        for widths in config.widths:
            layers = nn.ModuleList()
            for width in map(config.width, widths):
                experts = config.n_expert if len(self.stages) or len(layers) else 1
                layers.append(VGGLayer(dim, width, experts, config.batch_norm))
                dim = width
            self.stages.append(layers)
        self.pool = nn.MaxPool2d(2)
        self.min_size = 2 ** (len(config.widths) - 1)
        self.finish()

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.width(widths[-1]), 2**i) for i, widths in enumerate(self.config.widths)]

    def run_stages(self, x: Tensor, routing: ExpertRouting | None) -> list[Tensor]:
        levels: list[Tensor] = []
        for stage in self.stages:
            x = self.run_routed(stage, self.pool(x) if levels else x, routing)
            levels.append(x)
        return levels

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        if not self.config.num_classes:
            return features.mean(dim=(2, 3))
        return self.head(F.adaptive_avg_pool2d(features, 2).flatten(1))

    def make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        width, hidden = 4 * self.feature_info[-1].channels, self.config.hidden_dim
        layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, num_classes)).apply(init_weights)


def vgg_layouts(config: VGGMoEConfig) -> list[KeyLayout]:
    """Return the official layout: one flat list of convolutions, norms, activations and poolings."""
    rules: list[Rule] = [("^classifier", "^head")]
    position = 0
    for stage, widths in enumerate(config.widths):
        for layer in range(len(widths)):
            unit = f"stages.{stage}.{layer}.unit"
            rules.append((f"^features.{position}", f"^{unit}.conv"))
            if config.batch_norm:
                rules.append((f"^features.{position + 1}", f"^{unit}.norm"))
            position += 3 if config.batch_norm else 2
        position += 1
    return [official_layout(tuple(rules))]


DENSE: dict[str, Any] = {"n_expert": 1, "ratio": 1.0}


def _vgg(**fields: Any) -> Variant:
    return Variant(VGGMoEConfig(num_classes=10, **fields), (3, 32, 32))


register(
    VGGMoE,
    paper="advmoe",
    layouts=vgg_layouts,
    variants={
        "vgg16_moe": _vgg(batch_norm=False),
        "vgg16_bn_moe": _vgg(),
        "vgg16_ori": _vgg(batch_norm=False, **DENSE),
        "vgg16_bn_ori": _vgg(**DENSE),
    },
)
