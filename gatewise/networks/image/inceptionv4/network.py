"""Inception-v4 and Inception-ResNet: modules of parallel branches, with and without shortcuts around them.

A module looks at its input through several short stacks of small kernels at once and concatenates their outputs. With
shortcuts, such networks train faster. Very wide ones then need their branches scaled down, or they die early in
training.

Paper: Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", 2016,
arXiv:1602.07261. Published weights differ from the paper in the order of some kernel pairs and, for the residual
networks, in depth and widths. `inception_v4`, `inception_resnet_v2` and the face network `inception_resnet_v1_face`
follow the weights. The `..._paper` forms follow the paper's figures, with widths that match the concatenations where
the paper's do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.fold_norm import fold_into_previous, scale_outputs
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.inceptionv4 import keys as reference

Architecture = Literal["v4", "resnet_v2", "resnet_v1_paper", "resnet_v2_paper", "resnet_v1_face"]
NORM_EPS = 1e-3


@dataclass(frozen=True)
class InceptionConfig(ImageConfig):
    """Sizes and options of an Inception network.

    Args:
        architecture: kinds of modules and their order, a key of `ARCHITECTURES`.
        depths: number of modules A, B and C (blocks 35, 17 and 8 in the published code).
        scales: scales of the branches in the three kinds of residual block; unused in Inception-v4.
        width: multiplier of all channel counts.
        embed_dim: width of the face network's embedding; without a classifier, the normalized embedding is the output.
    """

    drop_rate: float = 0.2
    architecture: Architecture = "v4"
    depths: tuple[int, int, int] = (4, 7, 3)
    scales: tuple[float, float, float] = (0.17, 0.1, 0.2)
    width: float = 1.0
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, not {self.architecture!r}")
        if len(self.depths) != 3 or min(self.depths) < 1:
            raise ValueError(f"depths must be three positive numbers, not {self.depths}")
        if len(self.scales) != 3:
            raise ValueError(f"scales must be three numbers, not {self.scales}")
        if self.width <= 0:
            raise ValueError(f"width must be positive, not {self.width}")


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU: (B, C, H, W) -> (B, C', H', W').

    Args:
        kernel_size: rows and columns.
        padded: whether zero padding keeps the map's size at stride 1; otherwise a border is lost.
    """

    def __init__(
        self, in_dim: int, dim: int, kernel_size: tuple[int, int], stride: int = 1, *, padded: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel_size[0] // 2, kernel_size[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, stride, padding, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(dim, eps=NORM_EPS)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return F.relu(self.norm(self.conv(x)))

    def merged(self) -> Unit:
        """Return an equivalent unit for eval mode, with the batch norm folded into the convolution."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_previous(new.conv, self.norm)
            new.norm = nn.Identity()
        return new


class Fork(nn.ModuleList):
    """Parallel units on one input, with concatenated outputs: (B, C, H, W) -> (B, sum of C', H', W')."""

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return torch.cat([unit(x) for unit in self], dim=1)


class Branches(nn.Module):
    """Parallel branches on one input, with concatenated outputs: (B, C, H, W) -> (B, sum of C', H', W')."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = Fork(branches)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.branches(x)


class ResidualBranches(nn.Module):
    """act(x + scale * project(concatenated branches)): (B, C, H, W) -> (B, C, H, W).

    The projection has a bias and no norm, so the residual stream is never normalized. Source:
    arXiv:1602.07261, section 3.2, and section 3.3 for the scale.
    """

    def __init__(self, dim: int, branches: Sequence[nn.Module], inner: int, scale: float, act: bool = True) -> None:
        super().__init__()
        self.branches = Fork(branches)
        self.project = nn.Conv2d(inner, dim, 1)
        self.branch_scale, self.act = scale, act

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        y = self.project(self.branches(x))
        x = x + (y if self.branch_scale == 1 else self.branch_scale * y)
        return F.relu(x) if self.act else x

    def merged(self) -> ResidualBranches:
        """Return the same block with the scale folded into its projection."""
        new = deepcopy(self)
        scale_outputs(new.project, torch.full((self.project.out_channels,), self.branch_scale).to(self.project.weight))
        new.branch_scale = 1.0
        return new


def _max_pool() -> nn.Module:
    return nn.MaxPool2d(3, 2)


def _mean_pool() -> nn.Module:
    # At the border, only values inside the map count.
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class Builder:
    """Builds a sequence of modules and tracks the width of the last one's output.

    Branches are written as strings such as `1x1 64, 3x3 96 s2 V`: rows x columns, channels, stride (1 if absent), and V
    for no padding. `max` and `mean` are pools, and `1x3 256 / 3x1 256` is a fork at the end of a branch.
    """

    def __init__(self, config: InceptionConfig) -> None:
        self.width = config.width
        self.dim = config.in_chans
        self.modules: list[nn.Module] = []
        self.dims: list[int] = []

    def channels(self, published: int) -> int:
        """Return the number of channels at this network's width."""
        return max(1, round(published * self.width))

    def append(self, module: nn.Module) -> None:
        """Append a module whose output has `self.dim` channels."""
        self.modules.append(module)
        self.dims.append(self.dim)

    def unit(self, text: str) -> None:
        """Append a unit or a pool."""
        module, self.dim = self._branch(text, self.dim)
        self.append(module)

    def branches(self, *texts: str) -> None:
        """Append parallel branches."""
        made = [self._branch(text, self.dim) for text in texts]
        self.dim = sum(dim for _, dim in made)
        self.append(Branches([module for module, _ in made]))

    def residual(self, *texts: str, scale: float, act: bool = True) -> ResidualBranches:
        """Return a residual block around branches."""
        made = [self._branch(text, self.dim) for text in texts]
        return ResidualBranches(self.dim, [module for module, _ in made], sum(dim for _, dim in made), scale, act)

    def residuals(self, depth: int, *texts: str, scale: float) -> None:
        """Append several residual blocks as one module."""
        self.append(nn.Sequential(*(self.residual(*texts, scale=scale) for _ in range(depth))))

    def _branch(self, text: str, dim: int) -> tuple[nn.Module, int]:
        steps: list[nn.Module] = []
        for step in text.split(", "):
            made = [self._step(part, dim) for part in step.split(" / ")]
            steps.append(Fork([module for module, _ in made]) if len(made) > 1 else made[0][0])
            dim = sum(width for _, width in made)
        return (nn.Sequential(*steps) if len(steps) > 1 else steps[0]), dim

    def _step(self, text: str, dim: int) -> tuple[nn.Module, int]:
        if text in ("max", "mean"):
            return (_max_pool() if text == "max" else _mean_pool()), dim
        kernel, published, *options = text.split()
        rows, columns = (int(side) for side in kernel.split("x"))
        stride = 2 if "s2" in options else 1
        width = self.channels(int(published))
        return Unit(dim, width, (rows, columns), stride, padded="V" not in options), width


def _v4_stem(build: Builder) -> None:
    for unit in ("3x3 32 s2 V", "3x3 32 V", "3x3 64"):
        build.unit(unit)
    build.branches("max", "3x3 96 s2 V")
    build.branches("1x1 64, 3x3 96 V", "1x1 64, 1x7 64, 7x1 64, 3x3 96 V")
    build.branches("3x3 192 s2 V", "max")


def _reduction_a(build: Builder, k: int, l: int, m: int, n: int) -> None:  # noqa: E741  (the paper's letters)
    build.branches(f"3x3 {n} s2 V", f"1x1 {k}, 3x3 {l}, 3x3 {m} s2 V", "max")


def _v4(build: Builder, config: InceptionConfig) -> list[int]:
    _v4_stem(build)
    for _ in range(config.depths[0]):
        build.branches("1x1 96", "1x1 64, 3x3 96", "1x1 64, 3x3 96, 3x3 96", "mean, 1x1 96")
    a = len(build.modules) - 1
    _reduction_a(build, 192, 224, 256, 384)
    for _ in range(config.depths[1]):
        build.branches(
            "1x1 384",
            "1x1 192, 1x7 224, 7x1 256",
            "1x1 192, 7x1 192, 1x7 224, 7x1 224, 1x7 256",
            "mean, 1x1 128",
        )
    b = len(build.modules) - 1
    build.branches("1x1 192, 3x3 192 s2 V", "1x1 256, 1x7 256, 7x1 320, 3x3 320 s2 V", "max")
    for _ in range(config.depths[2]):
        build.branches(
            "1x1 256",
            "1x1 384, 1x3 256 / 3x1 256",
            "1x1 384, 3x1 448, 1x3 512, 1x3 256 / 3x1 256",
            "mean, 1x1 256",
        )
    return [2, 3, a, b, len(build.modules) - 1]


def _resnet_stem(build: Builder) -> None:
    for unit in ("3x3 32 s2 V", "3x3 32 V", "3x3 64", "max", "1x1 80", "3x3 192 V"):
        build.unit(unit)


def _resnet_v2(build: Builder, config: InceptionConfig) -> list[int]:
    _resnet_stem(build)
    build.unit("max")
    build.branches("1x1 96", "1x1 48, 5x5 64", "1x1 64, 3x3 96, 3x3 96", "mean, 1x1 64")
    build.residuals(config.depths[0], "1x1 32", "1x1 32, 3x3 32", "1x1 32, 3x3 48, 3x3 64", scale=config.scales[0])
    _reduction_a(build, 256, 256, 384, 384)
    build.residuals(config.depths[1], "1x1 192", "1x1 128, 1x7 160, 7x1 192", scale=config.scales[1])
    build.branches("1x1 256, 3x3 384 s2 V", "1x1 256, 3x3 288 s2 V", "1x1 256, 3x3 288, 3x3 320 s2 V", "max")
    _last_residuals(build, config, "1x1 192", "1x1 192, 1x3 224, 3x1 256")
    build.unit("1x1 1536")
    return [2, 5, 8, 10, 14]


def _last_residuals(build: Builder, config: InceptionConfig, *branches: str) -> None:
    """Append the last residual blocks, with a final one that has no scale and no ReLU, as in the published code."""
    build.residuals(config.depths[2], *branches, scale=config.scales[2])
    build.append(build.residual(*branches, scale=1.0, act=False))


def _resnet_v1_body(build: Builder, config: InceptionConfig) -> None:
    _resnet_stem(build)
    build.unit("3x3 256 s2 V")
    build.residuals(config.depths[0], "1x1 32", "1x1 32, 3x3 32", "1x1 32, 3x3 32, 3x3 32", scale=config.scales[0])
    _reduction_a(build, 192, 192, 256, 384)
    build.residuals(config.depths[1], "1x1 128", "1x1 128, 1x7 128, 7x1 128", scale=config.scales[1])


V1_REDUCTION_B = ("1x1 256, 3x3 384 s2 V", "1x1 256, 3x3 256 s2 V", "1x1 256, 3x3 256, 3x3 256 s2 V")


def _resnet_v1_face(build: Builder, config: InceptionConfig) -> list[int]:
    _resnet_v1_body(build, config)
    build.branches(*V1_REDUCTION_B, "max")
    _last_residuals(build, config, "1x1 192", "1x1 192, 1x3 192, 3x1 192")
    return [2, 5, 7, 9, 12]


def _resnet_v1_paper(build: Builder, config: InceptionConfig) -> list[int]:
    _resnet_v1_body(build, config)
    build.branches("max", *V1_REDUCTION_B)
    build.residuals(config.depths[2], "1x1 192", "1x1 192, 1x3 192, 3x1 192", scale=config.scales[2])
    return [2, 5, 7, 9, 11]


def _resnet_v2_paper(build: Builder, config: InceptionConfig) -> list[int]:
    _v4_stem(build)
    build.residuals(config.depths[0], "1x1 32", "1x1 32, 3x3 32", "1x1 32, 3x3 48, 3x3 64", scale=config.scales[0])
    _reduction_a(build, 256, 256, 384, 384)
    build.residuals(config.depths[1], "1x1 192", "1x1 128, 1x7 160, 7x1 192", scale=config.scales[1])
    build.branches("max", "1x1 256, 3x3 384 s2 V", "1x1 256, 3x3 288 s2 V", "1x1 256, 3x3 288, 3x3 320 s2 V")
    build.residuals(config.depths[2], "1x1 192", "1x1 192, 1x3 224, 3x1 256", scale=config.scales[2])
    return [2, 3, 6, 8, 10]


ARCHITECTURES: dict[str, Callable[[Builder, InceptionConfig], list[int]]] = {
    "v4": _v4,
    "resnet_v2": _resnet_v2,
    "resnet_v1_paper": _resnet_v1_paper,
    "resnet_v2_paper": _resnet_v2_paper,
    "resnet_v1_face": _resnet_v1_face,
}
"""Functions that append an architecture's modules and return the pyramid's module indices (strides 2 to 32)."""


class Inception(ImageNetwork):
    """A sequence of modules, mean over positions, dropout and linear classifier. The face network embeds first.

    Without a classifier the face network returns its embedding, scaled to length 1.
    """

    # Kernels without padding would leave nothing of a smaller map.
    min_size = 75

    def __init__(self, config: InceptionConfig) -> None:
        super().__init__(config)
        build = Builder(config)
        self.levels = ARCHITECTURES[config.architecture](build, config)
        self.stages = nn.Sequential(*build.modules)
        self.dim = build.dim
        self.drop = nn.Dropout(config.drop_rate)
        self.embed: nn.Module | None = None
        self.embed_norm: nn.Module | None = None
        if config.embed_dim is not None:
            self.embed = nn.Linear(self.dim, config.embed_dim, bias=False)
            self.embed_norm = nn.BatchNorm1d(config.embed_dim, eps=NORM_EPS)
        self.head = self.make_head(config.num_classes)
        self._channels = build.dims

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self._channels[index], 2 ** (level + 1)) for level, index in enumerate(self.levels)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        self.check_input(x)
        for module in self.stages:
            x = self.run_block(module, x)
        return x

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        pooled = self.drop(features.mean(dim=(2, 3)))
        if self.embed is None or self.embed_norm is None:
            return self.head(pooled)
        embedding = self.embed_norm(self.embed(pooled))
        return self.head(embedding) if self.config.num_classes else F.normalize(embedding, dim=1)

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return maps at strides 2, 4, 8, 16 and 32, without the borders lost to unpadded kernels."""
        self.check_input(x)
        levels = []
        for index, module in enumerate(self.stages):
            x = self.run_block(module, x)
            if index in self.levels:
                levels.append(x)
        return levels

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.dim if self.config.embed_dim is None else self.config.embed_dim, num_classes)


_HALF = (0.5, 0.5, 0.5)


def _tf(source: str, score: str) -> Weights:
    return Weights(source, "Apache-2.0", score, crop_pct=0.875, mean=_HALF, std=_HALF)


_RESNET_V2 = InceptionConfig(architecture="resnet_v2", depths=(10, 20, 9))
_FACE = InceptionConfig(
    num_classes=0,
    architecture="resnet_v1_face",
    depths=(5, 10, 5),
    embed_dim=512,
    drop_rate=0.6,
)
_FACENET = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9"

register(
    Inception,
    paper="inceptionv4",
    layouts=reference.layouts,
    fresh_with_head=("head.",),
    variants={
        "inception_v4": Variant(
            InceptionConfig(), (3, 299, 299), _tf("timm/inception_v4.tf_in1k", "80.1 % top-1, ImageNet-1K at 299")
        ),
        "inception_resnet_v2": Variant(
            _RESNET_V2, (3, 299, 299), _tf("timm/inception_resnet_v2.tf_in1k", "80.2 % top-1, ImageNet-1K at 299")
        ),
        "inception_resnet_v1_face": Variant(
            _FACE,
            (3, 160, 160),
            Weights(
                f"{_FACENET}/20180402-114759-vggface2.pt",
                "MIT",
                "0.9965 on LFW",
                mean=(127.5 / 255,) * 3,
                std=(128 / 255,) * 3,
            ),
        ),
        "inception_resnet_v1_paper": Variant(
            InceptionConfig(architecture="resnet_v1_paper", depths=(5, 10, 5)), (3, 299, 299)
        ),
        "inception_resnet_v2_paper": Variant(
            InceptionConfig(architecture="resnet_v2_paper", depths=(5, 10, 5)), (3, 299, 299)
        ),
    },
)
