"""DeepLabV3+ on MobileNetV2 for eye scans, with TVConv in its pyramid pooling.

Crops of the optic disc and cup have similar layouts. The three middle branches of the pyramid pooling, which normally
cover long ranges by dilation, therefore become inverted residuals with a kernel for each position. There are two logits
per pixel: cup and disc, which contains the cup.

Paper: Chen et al. 2022, arXiv:2203.10489, section 4; the network is DeepLabV3+, Chen et al. 2018, arXiv:1802.02611. The
backbone takes torchvision's MobileNetV2 weights, but has unusual padding: the stem has none, and each block pads before
its expansion, so that the border of the hidden map is relu6(norm(0)) instead of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.layers.tvconv import Size, TVConvInvertedResidual, TVConvOptions
from gatewise.networks.image._base import FeatureInfo
from gatewise.networks.image.mobilenetv2 import MobileNetV2Config
from gatewise.networks.image.tvconv import keys as reference
from gatewise.ops.translation_variant_conv import output_size

Atom = Literal["tvconv", "depthwise", "base"]
ATOMS = {"tvconv": "tvconv", "dw": "depthwise", "base": "base"}
"""Published name, in lower case -> our name."""


@dataclass(frozen=True)
class TVConvDeepLabConfig:
    """Sizes and options.

    Args:
        num_classes: number of logits per pixel.
        atom: middle branches of the pyramid pooling: dilated 3x3 convolutions ("base"), inverted residuals, or inverted
            residuals with TVConv.
        operator: options of the TVConvs; ignored by the other atoms.
        input_size: height and width that a TVConv network is built for. The others take any.
        width_mult: multiplier of the backbone's channels, which are rounded down.
        output_stride: stride of the last map, 16 or 8; at 8, dilations double (arXiv:1706.05587, section 3.3).
        drop_rate: dropout rate after the pyramid pooling.
    """

    num_classes: int = 2
    in_chans: int = 3
    atom: Atom = "tvconv"
    operator: TVConvOptions | None = field(default_factory=TVConvOptions)
    input_size: Size = (256, 256)
    width_mult: float = 1.0
    output_stride: int = 16
    pooling_dim: int = 256
    low_level_dim: int = 48
    expand_ratio: int = 6
    drop_rate: float = 0.1

    per_pixel = True

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be positive, not {self.num_classes}")
        if self.atom not in ATOMS.values():
            raise ValueError(f"atom must be one of {', '.join(ATOMS.values())}, not {self.atom!r}")
        if self.atom == "tvconv" and self.operator is None:
            raise ValueError("atom tvconv needs an operator: not None")
        if self.output_stride not in (8, 16):
            raise ValueError(f"output_stride must be 8 or 16, not {self.output_stride}")
        if self.width_mult < 1 / 16:
            raise ValueError(f"width_mult must leave a channel of 16: at least 1/16, not {self.width_mult}")
        if len(self.input_size) != 2 or min(self.input_size) < MIN_SIZE:
            raise ValueError(f"input_size must be a height and width of at least {MIN_SIZE}, not {self.input_size}")

    def channels(self, value: int) -> int:
        """Return `value` channels scaled to this network's width."""
        return int(value * self.width_mult)

    @property
    def backbone(self) -> MobileNetV2Config:
        """Configuration of the backbone's stages, strides and dilations."""
        return MobileNetV2Config(num_classes=0, features_only=True, output_stride=self.output_stride)

    @property
    def dilations(self) -> tuple[int, int, int]:
        """Dilations of the middle branches of the pyramid pooling, for the "base" atom."""
        return (6, 12, 18) if self.output_stride == 16 else (12, 24, 36)


MIN_SIZE = 3
"""Height and width that a 3x3 convolution without padding needs."""

LOW_LEVEL = 2
"""Number of stages before the decoder's fine features."""


class PaddedInvertedResidual(InvertedResidual):
    """An inverted residual with zeros around its input, not around its hidden map: (B, C, H, W) -> (B, C', h, w)."""

    def __init__(self, in_dim: int, dim: int, stride: int, expand_ratio: float, dilation: int = 1) -> None:
        super().__init__(in_dim, dim, stride, expand_ratio, dilation=dilation)
        self.spatial.conv.padding = (0, 0)
        self.margin = dilation

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = F.pad(x, (self.margin, self.margin, self.margin, self.margin))
        y = y if self.expand is None else self.expand(y)
        y = self.project(self.spatial(y))
        return x + y if self.residual else y


class UnpaddedStem(ConvNormAct):
    """3x3 with stride 2, no padding, norm, ReLU6: (B, C, H, W) -> (B, C', (H - 3) // 2 + 1, (W - 3) // 2 + 1)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__(in_dim, dim, 3, 2)
        self.conv.padding = (0, 0)


def _relu_unit(in_dim: int, dim: int, kernel_size: int = 1, dilation: int = 1) -> ConvNormAct:
    return ConvNormAct(in_dim, dim, kernel_size, dilation=dilation, act=nn.ReLU)


class ImagePooling(nn.Module):
    """Mean over all positions, then a unit, expanded back to all positions: (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.unit = _relu_unit(in_dim, dim)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return self.unit(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])


class PyramidPooling(nn.Module):
    """A 1x1, three middle branches and image pooling, joined by a 1x1: (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, config: TVConvDeepLabConfig, in_dim: int, map_size: Size) -> None:
        super().__init__()
        dim = config.pooling_dim
        self.branches = nn.ModuleList([_relu_unit(in_dim, dim)])
        for dilation in config.dilations:
            self.branches.append(_middle_branch(config, in_dim, dilation, map_size))
        self.branches.append(ImagePooling(in_dim, dim))
        self.project = _relu_unit(5 * dim, dim)
        self.drop = nn.Dropout(config.drop_rate)

    def forward(self, x: Float[Tensor, "batch in_dim h w"]) -> Float[Tensor, "batch dim h w"]:
        return self.drop(self.project(torch.cat([branch(x) for branch in self.branches], dim=1)))


def _middle_branch(config: TVConvDeepLabConfig, in_dim: int, dilation: int, map_size: Size) -> nn.Module:
    dim, expand = config.pooling_dim, config.expand_ratio
    if config.atom == "base":
        return _relu_unit(in_dim, dim, 3, dilation)
    if config.atom == "depthwise":
        return InvertedResidual(in_dim, dim, 1, expand)
    return TVConvInvertedResidual(in_dim, dim, 1, expand, map_size, config.operator)


class TVConvDeepLabV3Plus(nn.Module):
    """Backbone, pyramid pooling, decoder: images (B, C, H, W) -> logits (B, classes, H, W)."""

    variant: str | None = None

    def __init__(self, config: TVConvDeepLabConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.channels(32)
        self.stem = UnpaddedStem(config.in_chans, dim)
        self.stages = nn.ModuleList()
        for (expand, width, _, _), blocks in zip(config.backbone.rows, config.backbone.plan(), strict=True):
            row = nn.Sequential()
            for stride, dilation in blocks:
                row.append(PaddedInvertedResidual(dim, config.channels(width), stride, expand, dilation))
                dim = config.channels(width)
            self.stages.append(row)
        self.pooling = PyramidPooling(config, dim, map_size(config, config.input_size))
        low_level = config.channels(config.backbone.rows[LOW_LEVEL - 1][1])
        self.low_level = _relu_unit(low_level, config.low_level_dim)
        self.decoder = _relu_unit(config.low_level_dim + config.pooling_dim, config.pooling_dim, 3)
        self.head = nn.Conv2d(config.pooling_dim, config.num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        for module in (*self.stem.modules(), *self.stages.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Channels and stride of each level of `forward_pyramid`."""
        rows, stride = self.config.backbone.rows, self.config.output_stride
        return [
            FeatureInfo(self.config.channels(rows[row][1]), min(2 ** (level + 1), stride))
            for level, row in enumerate(self.config.backbone.level_rows)
        ]

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes height width"]:
        """Return the logits of each pixel.

        Raises:
            ValueError: if `x` is not a float batch of images with the expected channels and a supported size.
        """
        maps = self._rows(x)
        logits = self._decode(maps[LOW_LEVEL - 1], self.pooling(maps[-1]))
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the backbone's maps from fine to coarse, as described by `feature_info`, after an unpadded stem."""
        maps = self._rows(x)
        return [maps[row] for row in self.config.backbone.level_rows]

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with maps interpolated to our input size."""
        return reference.resized(state, self.state_dict())

    def _rows(self, x: Tensor) -> list[Tensor]:
        self._check_input(x)
        x = self.stem(x)
        maps = []
        for row in self.stages:
            x = row(x)
            maps.append(x)
        return maps

    def _decode(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.decoder(torch.cat([self.low_level(fine), coarse], dim=1)))

    def _check_input(self, x: Tensor) -> None:
        title, config = self.variant or type(self).__name__, self.config
        if x.ndim != 4 or not x.is_floating_point() or x.shape[1] != config.in_chans:
            raise ValueError(
                f"{title} expects floating-point images (batch, {config.in_chans}, height, width), not {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )
        if x.shape[0] < 1:
            raise ValueError(f"{title} expects at least one sample, not a batch of shape {tuple(x.shape)}")
        height, width = x.shape[2:]
        if min(height, width) < MIN_SIZE:
            raise ValueError(f"{title} expects height and width of at least {MIN_SIZE}, not {height} x {width}")
        wanted, found = map_size(config, config.input_size), map_size(config, (height, width))
        if config.atom == "tvconv" and wanted != found:
            raise ValueError(
                f"{title} was built for images of {config.input_size[0]}x{config.input_size[1]}, got {height}x{width}: "
                f"it has kernels for each position; build it with input_size=({height}, {width}), and load weights "
                "into that with adapt=True"
            )


def map_size(config: TVConvDeepLabConfig, size: Size) -> Size:
    """Return the rows and columns of the backbone's last map for images of this size."""

    def along(length: int) -> int:
        length = (length - 3) // 2 + 1
        for row in config.backbone.plan():
            length = output_size(length, row[0][0])
        return length

    return along(size[0]), along(size[1])


def layouts(config: TVConvDeepLabConfig) -> list[KeyLayout]:
    """Return the layouts of the whole network and of torchvision's MobileNetV2, which fills only the backbone."""
    rules = _backbone_rules(config, "backbone.low_level_features", "backbone.high_level_features")
    rules += [("^classifier.aspp", "pooling"), *reference.pair_rules("pooling.convs.0", "pooling.branches.0")]
    for branch in ("1", "2", "3"):
        ours = f"pooling.branches.{branch}"
        if config.atom == "base":
            rules += reference.pair_rules(f"pooling.convs.{branch}", ours)
        else:
            rules += [(f"^pooling.convs.{branch}.0", ours), *reference.block_rules(f"{ours}.")]
    rules += [
        ("^pooling.convs.4.1", "pooling.branches.4.unit.conv"),
        ("^pooling.convs.4.2", "pooling.branches.4.unit.norm"),
        *reference.pair_rules("pooling.project", "pooling.project"),
        *reference.pair_rules("classifier.project", "low_level"),
        ("^classifier.classifier.0", "decoder.conv"),
        ("^classifier.classifier.1", "decoder.norm"),
        ("^classifier.classifier.3", "head"),
        *reference.operator_rules(config.operator),
    ]
    torchvision = _backbone_rules(config, "features", "features")
    last = 1 + sum(config.backbone.repeats)
    return [
        reference.layout("official", rules, lambda: TVConvDeepLabV3Plus(config)),
        KeyLayout("torchvision", tuple(torchvision), dropped=rf"(features\.{last}|classifier)\..*"),
    ]


def _backbone_rules(config: TVConvDeepLabConfig, low: str, high: str) -> list[Rule]:
    """Return rules for the backbone's halves, across which blocks are numbered consecutively."""
    rules = reference.pair_rules(f"{low}.0", "stem")
    number = 0
    for row, repeats in enumerate(config.backbone.repeats):
        for block in range(repeats):
            number += 1
            path, expand = f"stages.{row}.{block}", config.backbone.rows[row][0] != 1
            rules.append((f"^{low if row < LOW_LEVEL else high}.{number}", path))
            rules += reference.block_rules(f"{path}.", expand)
    return rules


register(
    TVConvDeepLabV3Plus,
    paper="tvconv",
    layouts=layouts,
    # Backbone weights leave everything after the backbone at its initial values.
    fresh_with_head=("head.", "decoder.", "low_level.", "pooling."),
    variants={
        "tvconv_deeplabv3plus": Variant(TVConvDeepLabConfig(), (3, 256, 256)),
        "tvconv_deeplabv3plus_depthwise": Variant(TVConvDeepLabConfig(atom="depthwise"), (3, 256, 256)),
        "tvconv_deeplabv3plus_base": Variant(TVConvDeepLabConfig(atom="base"), (3, 256, 256)),
    },
)
