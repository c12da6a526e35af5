"""TVConv networks: MobileNetV2 and ShuffleNetV2 for aligned faces, with position-dependent kernels.

If every image has eyes, nose and mouth at the same positions, one kernel for all positions is a poor fit, and kernels
computed from the image are more than is needed. TVConv learns a depthwise kernel for each position and shares it among
all images, so at inference it costs as much as a depthwise convolution. The networks keep a higher resolution than
those for ImageNet (the stem has stride 1) and end in an embedding. Plain depthwise networks are included for
comparison.

Paper: Chen et al., "TVConv: Efficient Translation Variant Convolution for Layout-aware Visual Processing", 2022,
arXiv:2203.10489. No weights are published. The paper's segmentation network is in `networks/dense/tvconv_deeplab.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.fold_norm import fold_into_next, fold_into_previous
from gatewise.layers.init_weights import init_kaiming
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.layers.tvconv import Size, TVConvInvertedResidual, TVConvNormAct, TVConvOptions
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.mobilenetv2 import ROWS, round_channels
from gatewise.networks.image.tvconv.keys import block_rules, face_layouts, pair_rules, resized, unit_rules
from gatewise.ops.translation_variant_conv import output_size


@dataclass(frozen=True)
class FaceConfig(ImageConfig):
    """Configuration shared by the face networks.

    Args:
        num_classes: number of identities of the cosine classifier; 0 for no classifier, so that the network returns
            embeddings.
        drop_rate: dropout rate before the embedding.
        operator: options of the TVConvs; None for plain depthwise 3x3 convolutions instead.
        input_size: height and width that a TVConv network is built for. Plain ones take any.
        logit_scale: factor on the cosines.
    """

    num_classes: int = 0
    operator: TVConvOptions | None = field(default_factory=TVConvOptions)
    input_size: Size = (96, 96)
    embed_dim: int = 512
    logit_scale: float = 32.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ValueError(f"input_size must be a positive height and width, not {self.input_size}")
        if self.embed_dim < 1:
            raise ValueError(f"embed_dim must be positive, not {self.embed_dim}")


@dataclass(frozen=True)
class TVConvMobileNetV2Config(FaceConfig):
    """A MobileNetV2 for faces.

    Args:
        rows: expansion, channels, repeats and stride of each stage.
        width_mult: multiplier of all channel counts except the last convolution's; results are rounded to multiples of
            8.
        head_channels: channels of the last 1x1 convolution.
    """

    rows: tuple[tuple[int, int, int, int], ...] = ROWS
    width_mult: float = 1.0
    head_channels: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_mult <= 0:
            raise ValueError(f"width_mult must be positive, not {self.width_mult}")

    def channels(self, value: int) -> int:
        """Return `value` channels scaled to this network's width."""
        return round_channels(value * self.width_mult)

    @property
    def levels(self) -> tuple[int, ...]:
        """Index of the last stage at each resolution below that of the images."""
        last = len(self.rows) - 1
        ends = [row for row in range(len(self.rows)) if row == last or self.rows[row + 1][3] > 1]
        return tuple(row for row in ends if any(stride > 1 for *_, stride in self.rows[: row + 1]))


@dataclass(frozen=True)
class TVConvShuffleNetV2Config(FaceConfig):
    """A ShuffleNetV2 for faces.

    Args:
        widths: channels of the stem, of the three stages (even), and of the last convolution.
        depths: number of units of each stage.
    """

    widths: tuple[int, int, int, int, int] = (24, 116, 232, 464, 1024)
    depths: tuple[int, int, int] = (4, 8, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.widths) != 5 or any(width < 2 or width % 2 for width in self.widths[1:4]):
            raise ValueError(f"widths must be five numbers, those of the stages even, not {self.widths}")
        if len(self.depths) != 3 or min(self.depths) < 1:
            raise ValueError(f"depths must be three positive numbers, not {self.depths}")


class FaceEmbedding(nn.Module):
    """Batch norm, dropout, mean over positions, linear layer, batch norm: (B, C, h, w) -> (B, D), not normalized."""

    def __init__(self, dim: int, embed_dim: int, drop_rate: float) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.drop = nn.Dropout(drop_rate)
        self.project = nn.Linear(dim, embed_dim)
        self.embed_norm: nn.Module = nn.BatchNorm1d(embed_dim)

    def forward(self, features: Float[Tensor, "batch dim h w"]) -> Float[Tensor, "batch embed_dim"]:
        pooled = self.drop(self.norm(features)).mean(dim=(2, 3))
        return self.embed_norm(self.project(pooled))

    def merged(self) -> FaceEmbedding:
        """Return an equivalent module for eval mode, with both norms folded into the linear layer."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d) and isinstance(self.embed_norm, nn.BatchNorm1d):
            fold_into_next(self.norm, new.project)
            fold_into_previous(new.project, self.embed_norm)
            new.norm, new.embed_norm = nn.Identity(), nn.Identity()
        return new


class CosineClassifier(nn.Module):
    """logit_scale * cosine between the embedding and a direction per identity: (B, D) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int, logit_scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, dim))
        self.logit_scale = logit_scale

    def forward(self, embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        return self.logit_scale * F.linear(F.normalize(embedding, dim=1), F.normalize(self.weight, dim=1))

    def with_margin(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], margin: float = 0.35
    ) -> Float[Tensor, "batch classes"]:
        """Return logits for training with cross entropy, where `margin` is subtracted from the true class's cosine.

        Source: the additive-margin softmax of Wang et al. 2018, arXiv:1801.05599, as in TVConv's training.
        """
        return logits - self.logit_scale * margin * F.one_hot(labels, logits.shape[1]).to(logits.dtype)


class FaceNetwork(ImageNetwork):
    """Stem and stages, then an embedding and, if identities are given, a cosine classifier.

    A network builds `embedding` and `head`, and sets `first_stride` to the stride, in input pixels, of its first map
    with position-dependent kernels.
    """

    config: FaceConfig
    first_stride = 1

    def __init__(self, config: FaceConfig, dim: int) -> None:
        super().__init__(config)
        self.embedding = FaceEmbedding(dim, config.embed_dim, config.drop_rate)
        self.head = self.make_head(config.num_classes)
        if config.operator is not None:
            # Smallest image that gives the same number of positions.
            self.min_size = self.first_stride * (output_size(min(config.input_size), self.first_stride) - 1) + 1

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch embedding"]:
        return self.embedding(features)

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        stride = self.first_stride
        found, wanted = (subsampled(size, stride) for size in (x.shape[2:], self.config.input_size))
        if self.config.operator is not None and found != wanted:
            (height, width), (rows, columns) = self.config.input_size, x.shape[2:]
            raise ValueError(
                f"TVConv built for {height}x{width} images, got {rows}x{columns}: it has kernels for each position; "
                f"build it with input_size=({rows}, {columns}), and load weights into that with adapt=True"
            )

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with maps interpolated to our input size."""
        return resized(state, self.state_dict())

    def make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return CosineClassifier(self.config.embed_dim, num_classes, self.config.logit_scale)


def subsampled(size: Size | torch.Size, stride: int) -> Size:
    """Return the size of a map after a padded kernel with this stride."""
    return output_size(size[0], stride), output_size(size[1], stride)


class TVConvMobileNetV2(FaceNetwork):
    """MobileNetV2 at full resolution: stem of stride 1, inverted residuals, a last 1x1 convolution, embedding."""

    config: TVConvMobileNetV2Config

    def __init__(self, config: TVConvMobileNetV2Config) -> None:
        super().__init__(config, config.head_channels)
        dim, size = config.channels(32), config.input_size
        self.stem = ConvNormAct(config.in_chans, dim, 3)
        self.stages = nn.ModuleList()
        for expand, width, repeats, stride in config.rows:
            row = nn.Sequential()
            for block_stride in [stride, *[1] * (repeats - 1)]:
                size = subsampled(size, block_stride)
                row.append(_inverted_residual(config, dim, config.channels(width), block_stride, expand, size))
                dim = config.channels(width)
            self.stages.append(row)
        self.head_conv = ConvNormAct(dim, config.head_channels)
        self.apply(init_kaiming)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        rows = self.config.rows
        strides = [2 ** sum(stride > 1 for *_, stride in rows[: row + 1]) for row in self.config.levels]
        widths = [self.config.channels(rows[row][1]) for row in self.config.levels]
        return [FeatureInfo(*level) for level in zip(widths, strides, strict=True)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling."""
        return self.head_conv(self._rows(x)[-1])

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the last block's output at strides 2, 4, 8 and 16."""
        maps = self._rows(x)
        return [maps[row] for row in self.config.levels]

    def _rows(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        return self.run_rows(self.stages, x)


def _inverted_residual(
    config: FaceConfig, in_dim: int, dim: int, stride: int, expand: int, size: Size
) -> InvertedResidual:
    if config.operator is None:
        return InvertedResidual(in_dim, dim, stride, expand)
    return TVConvInvertedResidual(in_dim, dim, stride, expand, size, config.operator)


class ShuffleUnit(nn.Module):
    """Three convolutions on half of the channels, then a shuffle with the unchanged other half.

    With stride 2, both halves are computed from the whole input: (B, C, H, W) -> (B, C', h, w).

    Args:
        operator: options of the TVConvs that replace depthwise convolutions; None to keep these.
        map_size: rows and columns of the output.
    """

    def __init__(self, in_dim: int, dim: int, stride: int, operator: TVConvOptions | None, map_size: Size) -> None:
        super().__init__()
        if stride == 1 and in_dim != dim:
            raise ValueError(f"a unit of stride 1 keeps its {in_dim} channels, not {dim}")
        half = dim // 2

        def filtered(channels: int) -> nn.Module:
            if operator is not None:
                return TVConvNormAct(channels, map_size, stride, operator, act=None)
            return ConvNormAct(channels, channels, 3, stride, groups=channels, act=None)

        self.shortcut = nn.Sequential()
        if stride == 2:
            self.shortcut.add_module("spatial", filtered(in_dim))
            self.shortcut.add_module("project", ConvNormAct(in_dim, half, act=nn.ReLU))
        self.branch = nn.Sequential()
        self.branch.add_module("expand", ConvNormAct(in_dim if stride == 2 else half, half, act=nn.ReLU))
        self.branch.add_module("spatial", filtered(half))
        self.branch.add_module("project", ConvNormAct(half, half, act=nn.ReLU))

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        past, through = (x, x) if len(self.shortcut) else x.chunk(2, dim=1)
        y = torch.stack([self.shortcut(past), self.branch(through)], dim=2)
        # Stacking after the channel axis interleaves the halves.
        return y.flatten(1, 2)


class TVConvShuffleNetV2(FaceNetwork):
    """ShuffleNetV2 with a stem of stride 1: max pool, three stages of shuffle units, a last 1x1, embedding."""

    config: TVConvShuffleNetV2Config
    first_stride = 4

    def __init__(self, config: TVConvShuffleNetV2Config) -> None:
        super().__init__(config, config.widths[-1])
        dim, *widths, last = config.widths
        size = subsampled(config.input_size, 2)
        self.stem = ConvNormAct(config.in_chans, dim, 3, act=nn.ReLU)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        for width, depth in zip(widths, config.depths, strict=True):
            size = subsampled(size, 2)
            units = [ShuffleUnit(dim, width, 2, config.operator, size)]
            units += [ShuffleUnit(width, width, 1, config.operator, size) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*units))
            dim = width
        self.head_conv = ConvNormAct(dim, last, act=nn.ReLU)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(width, 2 ** (level + 1)) for level, width in enumerate(self.config.widths[:-1])]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling."""
        return self.head_conv(self.forward_pyramid(x)[-1])

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the maps of the pooled stem and the stages, at strides 2, 4, 8 and 16."""
        self.check_input(x)
        maps = [self.pool(self.run_block(self.stem, x))]
        for stage in self.stages:
            y = maps[-1]
            for unit in stage.children():
                y = self.run_block(unit, y)
            maps.append(y)
        return maps


def _face(config: FaceConfig) -> Variant:
    return Variant(config, (3, *config.input_size))


def _mobilenet(width: float, **fields: Any) -> Variant:
    return _face(TVConvMobileNetV2Config(width_mult=width, **fields))


def _shufflenet(widths: tuple[int, int, int], **fields: Any) -> Variant:
    return _face(TVConvShuffleNetV2Config(widths=(24, *widths, 1024), **fields))


X0_5, X1_0, X1_5 = (48, 96, 192), (116, 232, 464), (176, 352, 704)


def mobilenet_layouts(config: TVConvMobileNetV2Config) -> list[KeyLayout]:
    """Return layouts with one flat list of blocks, as in torchvision."""
    rules = pair_rules("features.0", "stem")
    number = 0
    for row, (expand, _, repeats, _) in enumerate(config.rows):
        for block in range(repeats):
            number += 1
            path = f"stages.{row}.{block}"
            rules += [(f"^features.{number}", path), *block_rules(f"{path}.", expand != 1)]
    rules += pair_rules(f"features.{number + 1}", "head_conv")
    return face_layouts(
        rules,
        lambda: TVConvMobileNetV2(config),
        operator=config.operator,
        dropout=config.drop_rate > 0,
        head=bool(config.num_classes),
    )


def shufflenet_layouts(config: TVConvShuffleNetV2Config) -> list[KeyLayout]:
    """Return layouts in which stages are counted from 2."""
    rules = pair_rules("conv1", "stem")
    for stage, depth in enumerate(config.depths):
        rules.append((f"^stage{stage + 2}", f"stages.{stage}"))
        for unit in range(depth):
            rules += unit_rules(f"stages.{stage}.{unit}.")
    rules += pair_rules("conv5", "head_conv")
    return face_layouts(
        rules,
        lambda: TVConvShuffleNetV2(config),
        operator=config.operator,
        dropout=config.drop_rate > 0,
        head=bool(config.num_classes),
    )


register(
    TVConvMobileNetV2,
    paper="tvconv",
    layouts=mobilenet_layouts,
    fresh_with_head=("head.",),
    variants={
        "tvconv_mobilenet_v2_x0_1": _mobilenet(0.1),
        "tvconv_mobilenet_v2_x0_2": _mobilenet(0.2),
        "tvconv_mobilenet_v2_x0_3": _mobilenet(0.3),
        "tvconv_mobilenet_v2_x0_5": _mobilenet(0.5),
        "tvconv_mobilenet_v2_x1_0": _mobilenet(1.0),
        "tvconv_mobilenet_v2_x0_1_base": _mobilenet(0.1, operator=None),
        "tvconv_mobilenet_v2_x0_2_base": _mobilenet(0.2, operator=None),
        "tvconv_mobilenet_v2_x0_3_base": _mobilenet(0.3, operator=None),
        "tvconv_mobilenet_v2_x0_5_base": _mobilenet(0.5, operator=None),
        "tvconv_mobilenet_v2_x1_0_base": _mobilenet(1.0, operator=None),
    },
)

register(
    TVConvShuffleNetV2,
    paper="tvconv",
    layouts=shufflenet_layouts,
    fresh_with_head=("head.",),
    variants={
        "tvconv_shufflenet_v2_x0_5": _shufflenet(X0_5),
        "tvconv_shufflenet_v2_x1_0": _shufflenet(X1_0),
        "tvconv_shufflenet_v2_x1_5": _shufflenet(X1_5),
        "tvconv_shufflenet_v2_x0_5_base": _shufflenet(X0_5, operator=None),
        "tvconv_shufflenet_v2_x1_0_base": _shufflenet(X1_0, operator=None),
        "tvconv_shufflenet_v2_x1_5_base": _shufflenet(X1_5, operator=None),
    },
)
