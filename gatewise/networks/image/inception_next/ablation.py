"""The starting point of InceptionNeXt: a ConvNeXt whose depthwise convolution acts on only a part of the channels.

Convolving an eighth of the channels costs little accuracy and saves most of the time, which led to Inception depthwise
convolution.

Paper: Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", 2023, arXiv:2303.16900, partial depthwise ablation.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import scale_outputs
from gatewise.layers.init_weights import init_weights
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.inception_next.network import Downsample, Stem, check_odd, depthwise
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork


@dataclass(frozen=True)
class PartialConvNeXtConfig(ImageConfig):
    """ConvNeXt with a depthwise convolution on the last `conv_ratio` of the channels (the paper's ablation)."""

    patch_size: int = 4
    depths: tuple[int, ...] = (3, 3, 9, 3)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int = 7
    conv_ratio: float = 1.0
    layer_scale_init: float | None = 1e-6
    out_indices: tuple[int, ...] = (0, 1, 2, 3)


class PartialDepthwise(nn.Module):
    """A depthwise convolution on the last channels, the first ones unchanged: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, kernel_size: int, conv_ratio: float) -> None:
        super().__init__()
        check_odd(kernel_size)
        width = int(dim * conv_ratio)
        if not 1 <= width <= dim:
            raise ValueError(f"conv_ratio must leave 1 to {dim} of {dim} channels to convolve, not {width}")
        self.split = [dim - width, width]
        self.conv = depthwise(width, (kernel_size, kernel_size))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        untouched, convolved = x.split(self.split, dim=1)
        return torch.cat([untouched, self.conv(convolved)], dim=1) if self.split[0] else self.conv(x)


class ConvNeXtBlock(nn.Module):
    """Partial depthwise convolution, layer norm and MLP in one residual branch: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, config: PartialConvNeXtConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.mixer = PartialDepthwise(dim, config.kernel_size, config.conv_ratio)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        init = config.layer_scale_init
        self.scale = nn.Parameter(torch.full((dim,), init)) if init is not None else None
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        branch = self.fc2(F.gelu(self.fc1(self.norm(self.mixer(x).permute(0, 2, 3, 1)))))
        if self.scale is not None:
            branch = branch * self.scale
        return x + self.drop_path(branch.permute(0, 3, 1, 2))

    def merged(self) -> ConvNeXtBlock:
        """Return the same block with the layer scale folded into fc2."""
        new = deepcopy(self)
        if self.scale is not None:
            scale_outputs(new.fc2, self.scale)
            new.scale = None
        return new


class PartialConvNeXt(StagedNetwork):
    """Four stages of ConvNeXt blocks, global pooling, norm, linear classifier."""

    def __init__(self, config: PartialConvNeXtConfig) -> None:
        super().__init__(config)
        dims = config.embed_dims
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stem = Stem(config.in_chans, dims[0], config.patch_size, "layer")
        self.stages = nn.ModuleList(
            Stage(
                Downsample(dims[i - 1], dims[i], "layer") if i else nn.Identity(),
                [ConvNeXtBlock(dims[i], config, rate) for rate in rates[i]],
            )
            for i in range(len(dims))
        )
        self.level_norms = nn.ModuleDict()
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.min_size = config.patch_size * 2 ** (len(dims) - 1)
        self.apply(init_weights)
        self.head = self.make_head(config.num_classes)

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.norm(super().pool_features(features))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, init_weights)


OFFICIAL = KeyLayout(
    "official",
    (
        ("^downsample_layers.0.0", "stem.conv"),
        ("^downsample_layers.0.1", "stem.norm"),
        ("^downsample_layers.{i}.0", "stages.{i}.downsample.norm"),
        ("^downsample_layers.{i}.1", "stages.{i}.downsample.conv"),
        ("^stages.{i}.{j}", "stages.{i}.blocks.{j}"),
        ("dwconv.conv", "mixer.conv"),
        ("pwconv1", "fc1"),
        ("pwconv2", "fc2"),
        ("blocks.{j}.gamma", "blocks.{j}.scale"),
    ),
)


_RELEASE = "https://github.com/sail-sg/inceptionnext/releases/download/model"


def _variant(kernel: int, top1: str, share: str = "") -> Variant:
    ratio = Fraction(share.replace("_", "/")) if share else Fraction(1)
    file = f"convnext_tiny_k{kernel}_par{share}.pth" if share else f"convnext_tiny_k{kernel}.pth"
    weights = Weights(f"{_RELEASE}/{file}", "Apache-2.0", f"{top1} % top-1, ImageNet-1K at 224 (model zoo)")
    return Variant(PartialConvNeXtConfig(kernel_size=kernel, conv_ratio=float(ratio)), weights=weights)


register(
    PartialConvNeXt,
    paper="inception_next",
    layouts=lambda config: [OFFICIAL],
    fresh_with_head=("head.",),
    variants={
        "convnext_tiny_k5": _variant(5, "82.0"),
        "convnext_tiny_k3": _variant(3, "81.5"),
        "convnext_tiny_k3_par1_2": _variant(3, "81.4", "1_2"),
        "convnext_tiny_k3_par3_8": _variant(3, "81.4", "3_8"),
        "convnext_tiny_k3_par1_4": _variant(3, "81.3", "1_4"),
        "convnext_tiny_k3_par1_8": _variant(3, "80.8", "1_8"),
        "convnext_tiny_k3_par1_16": _variant(3, "80.1", "1_16"),
    },
)
