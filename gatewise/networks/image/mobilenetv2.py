"""MobileNetV2: inverted residuals with linear bottlenecks.

A block expands a thin tensor, filters each channel separately, and projects back to a thin tensor. The projection has
no activation, since a ReLU in few dimensions destroys what it cuts off. Shortcuts join the thin ends, so the wide
middle never has to be kept.

Paper: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, arXiv:1801.04381. Weights come in
three versions of the same network: torchvision's, timm's, and TensorFlow's with its own padding and norm epsilon.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import ceil
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.conv import PADDINGS, ConvNormAct, Padding
from gatewise.layers.init_weights import init_kaiming
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork

ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats and stride of each stage (table 2 of the paper)."""


@dataclass(frozen=True)
class MobileNetV2Config(ImageConfig):
    """Sizes and options of a MobileNetV2.

    Args:
        rows: expansion, channels, repeats and stride of each stage.
        width_mult: multiplier of all channel counts; the last convolution never shrinks below 1280.
        depth_mult: multiplier of the repeats (rounded up), except in the first and last stage.
        fixed_ends: whether the stem has 32 and the last convolution 1280 channels regardless of `width_mult`.
        channel_divisor: rounding unit of channel counts; 1 turns rounding off.
        output_stride: stride of the last map: 32, or 16 or 8 with dilation in place of stride.
        padding: "symmetric", or "same" for weights converted from TensorFlow.
        norm_eps: epsilon of the norms: 1e-5, or 1e-3 for weights converted from TensorFlow.
        features_only: whether to omit the last convolution and the classifier.
        out_indices: levels of `forward_pyramid`, counted from stride 2; None for all from stride 4 on.
    """

    drop_rate: float = 0.2
    rows: tuple[tuple[int, int, int, int], ...] = ROWS
    width_mult: float = 1.0
    depth_mult: float = 1.0
    fixed_ends: bool = False
    channel_divisor: int = 8
    output_stride: int = 32
    padding: Padding = "symmetric"
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    features_only: bool = False
    out_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, not {self.output_stride}")
        if self.width_mult <= 0 or self.depth_mult <= 0:
            raise ValueError(f"multipliers must be positive, not {self.width_mult} and {self.depth_mult}")
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, not {self.padding!r}")
        if self.features_only and self.num_classes:
            raise ValueError("features_only has no classifier: pass num_classes=0 with it")
        levels = len(self.level_rows)
        if self.out_indices is not None and not set(self.out_indices) <= set(range(levels)):
            raise ValueError(f"out_indices must be levels 0..{levels - 1}, not {self.out_indices}")
        if self.width_mult < 0.35:
            warnings.warn(
                f"width_mult {self.width_mult} is below 0.35, where stages reach the minimum of {self.channel_divisor} "
                "channels and stop shrinking",
                stacklevel=3,
            )

    def channels(self, value: float) -> int:
        """Return `value` times the width multiplier, rounded as in the published networks."""
        return round_channels(value * self.width_mult, self.channel_divisor)

    @property
    def stem_channels(self) -> int:
        return 32 if self.fixed_ends else self.channels(32)

    @property
    def head_channels(self) -> int:
        return 1280 if self.fixed_ends else round_channels(1280 * max(1.0, self.width_mult), self.channel_divisor)

    @property
    def repeats(self) -> tuple[int, ...]:
        """Number of blocks per stage."""
        last = len(self.rows) - 1
        return tuple(n if i in (0, last) else ceil(n * self.depth_mult) for i, (_, _, n, _) in enumerate(self.rows))

    @property
    def level_rows(self) -> tuple[int, ...]:
        """Index of the last stage at each resolution."""
        last = len(self.rows) - 1
        return tuple(i for i in range(len(self.rows)) if i == last or self.rows[i + 1][3] > 1)

    @property
    def levels(self) -> tuple[int, ...]:
        """Levels that the pyramid returns; level 0 has stride 2."""
        return self.out_indices if self.out_indices is not None else tuple(range(1, len(self.level_rows)))

    def plan(self) -> list[list[tuple[int, int]]]:
        """Return (stride, dilation) of every block per stage, keeping the total stride within `output_stride`."""
        running, dilation = 2, 1
        plan = []
        for (_, _, _, stride), repeats in zip(self.rows, self.repeats, strict=True):
            first = dilation
            if stride > 1 and running >= self.output_stride:
                dilation *= stride
                stride = 1
            running *= stride
            plan.append([(stride, first), *[(1, dilation)] * (repeats - 1)])
        return plan


def round_channels(value: float, divisor: int = 8) -> int:
    """Round to a multiple of `divisor` that is at least `divisor` and not less than 0.9 `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class MobileNetV2(ImageNetwork):
    """Stem, stages of inverted residuals, a last 1x1 convolution, global pooling, linear classifier."""

    def __init__(self, config: MobileNetV2Config) -> None:
        super().__init__(config)
        shared: dict[str, Any] = {
            "padding": config.padding,
            "norm_eps": config.norm_eps,
            "norm_momentum": config.norm_momentum,
        }
        self.stem = ConvNormAct(config.in_chans, config.stem_channels, 3, 2, **shared)
        self.stages = nn.ModuleList()
        dim = config.stem_channels
        for (expand, width, _, _), blocks in zip(config.rows, config.plan(), strict=True):
            row = nn.Sequential()
            for stride, dilation in blocks:
                row.append(InvertedResidual(dim, config.channels(width), stride, expand, dilation=dilation, **shared))
                dim = config.channels(width)
            self.stages.append(row)
        self.head_conv = nn.Identity() if config.features_only else ConvNormAct(dim, config.head_channels, **shared)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(init_kaiming)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        config = self.config
        return [
            FeatureInfo(config.channels(config.rows[config.level_rows[i]][1]), min(2 ** (i + 1), config.output_stride))
            for i in config.levels
        ]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling. Odd sizes round up at every stride."""
        self.check_input(x)
        x = self.stem(x)
        for row in self.stages:
            x = self.run_blocks(row.children(), x)
        return self.head_conv(x)

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the last block's output at each resolution (linear bottlenecks, without the last 1x1 convolution)."""
        self.check_input(x)
        x = self.stem(x)
        maps = []
        for index, row in enumerate(self.stages):
            x = self.run_blocks(row.children(), x)
            if index in self.config.level_rows:
                maps.append(x)
        return [maps[level] for level in self.config.levels]

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.head_channels, num_classes, init_kaiming)


def layouts(config: MobileNetV2Config) -> list[KeyLayout]:
    """Return torchvision's layout (one flat list of blocks), timm's (blocks by stage) and TensorFlow's."""
    blocks = [(row, i) for row, repeats in enumerate(config.repeats) for i in range(repeats)]
    expands = [config.rows[row][0] != 1 for row, _ in blocks]
    torchvision: list[Rule] = [("^features.0", "stem"), ("^stem.0", "stem.conv"), ("^stem.1", "stem.norm")]
    timm: list[Rule] = [
        ("^conv_stem", "stem.conv"),
        ("^bn1", "stem.norm"),
        ("^blocks", "stages"),
        ("^classifier", "head"),
    ]
    tensorflow: list[Rule] = [("^MobilenetV2.Conv", "stem"), ("^MobilenetV2.Conv_1", "head_conv")]
    for number, ((row, i), expand) in enumerate(zip(blocks, expands, strict=True)):
        ours = f"stages.{row}.{i}"
        torchvision += [(f"^features.{number + 1}", ours), *_torchvision_block(ours, expand)]
        timm += _timm_block(ours, expand)
        tensorflow.append((f"^MobilenetV2.expanded_conv{f'_{number}' if number else ''}", ours))
    last = len(blocks) + 1
    torchvision += [(f"^features.{last}", "head_conv"), ("^head_conv.0", "head_conv.conv")]
    torchvision += [("^head_conv.1", "head_conv.norm"), ("^classifier.1", "head")]
    timm += [("^conv_head", "head_conv.conv"), ("^bn2", "head_conv.norm")]
    return [
        KeyLayout("torchvision", tuple(torchvision)),
        KeyLayout("timm", tuple(timm)),
        _tensorflow(tensorflow, config),
    ]


def _torchvision_block(block: str, expand: bool) -> list[Rule]:
    units = ["expand", "spatial"] if expand else ["spatial"]
    rules = []
    for position, unit in enumerate(units):
        rules += [(f"^{block}.conv.{position}.0", f"{block}.{unit}.conv")]
        rules += [(f"^{block}.conv.{position}.1", f"{block}.{unit}.norm")]
    rules += [(f"^{block}.conv.{len(units)}", f"{block}.project.conv")]
    return [*rules, (f"^{block}.conv.{len(units) + 1}", f"{block}.project.norm")]


def _timm_block(block: str, expand: bool) -> list[Rule]:
    convs = {"conv_pw": "expand", "conv_dw": "spatial", "conv_pwl": "project"}
    if not expand:
        convs = {"conv_dw": "spatial", "conv_pw": "project"}
    rules = []
    for number, (conv, unit) in enumerate(convs.items(), start=1):
        rules += [(f"^{block}.{conv}", f"{block}.{unit}.conv"), (f"^{block}.bn{number}", f"{block}.{unit}.norm")]
    return rules


def _tensorflow(blocks: list[Rule], config: MobileNetV2Config) -> KeyLayout:
    rules = (
        ("^MobilenetV2.Logits.Conv2d_1c_1x1.weights", "head.weight"),
        ("^MobilenetV2.Logits.Conv2d_1c_1x1.biases", "head.bias"),
        *blocks,
        ("depthwise.depthwise_weights", "spatial.conv.weight"),
        ("depthwise", "spatial"),
        ("weights", "conv.weight"),
        ("BatchNorm.gamma", "norm.weight"),
        ("BatchNorm.beta", "norm.bias"),
        ("BatchNorm.moving_mean", "norm.running_mean"),
        ("BatchNorm.moving_variance", "norm.running_var"),
    )

    def to_ours(key: str, tensor: Tensor) -> Tensor:
        if key.endswith("depthwise_weights"):
            tensor = tensor.permute(2, 3, 0, 1)
        elif tensor.ndim == 4:
            tensor = tensor.permute(3, 2, 0, 1)
        # Class 0 is the background, which no other checkpoint has.
        return tensor[1:] if "/Logits/" in key and tensor.shape[0] == config.num_classes + 1 else tensor

    dropped = r"global_step|.*/(ExponentialMovingAverage|RMSProp(_1)?|Momentum)"
    return KeyLayout("tensorflow", rules, dropped, to_ours, separator="/")


def _timm_variant(tag: str, top1: str | None, **fields: Any) -> Variant:
    weights = None
    if top1 is not None:
        recipe = "lamb" if tag == "050" else "ra"
        score = f"about {top1} % top-1, ImageNet-1K at 224 (recalled)"
        weights = Weights(f"timm/mobilenetv2_{tag}.{recipe}_in1k", "Apache-2.0", score)
    return Variant(MobileNetV2Config(**fields), weights=weights)


def _tf_variant(width: float) -> Variant:
    return Variant(MobileNetV2Config(width_mult=width, padding="same", norm_eps=1e-3))


register(
    MobileNetV2,
    paper="mobilenetv2",
    layouts=layouts,
    # A classification checkpoint fills all of the features_only form.
    fresh_with_head=("head.", "head_conv."),
    variants={
        "mobilenetv2_035": _timm_variant("035", None, width_mult=0.35),
        "mobilenetv2_050": _timm_variant("050", "65.9", width_mult=0.5),
        "mobilenetv2_075": _timm_variant("075", None, width_mult=0.75),
        "mobilenetv2_100": _timm_variant("100", "73.0"),
        "mobilenetv2_130": _timm_variant("130", None, width_mult=1.3),
        "mobilenetv2_140": _timm_variant("140", "76.5", width_mult=1.4),
        "mobilenetv2_110d": _timm_variant("110d", "75.0", width_mult=1.1, depth_mult=1.2, fixed_ends=True),
        "mobilenetv2_120d": _timm_variant("120d", "77.3", width_mult=1.2, depth_mult=1.4, fixed_ends=True),
        # Forms for weights converted from TensorFlow, whose padding and norm epsilon differ.
        "tf_mobilenetv2_035": _tf_variant(0.35),
        "tf_mobilenetv2_050": _tf_variant(0.5),
        "tf_mobilenetv2_075": _tf_variant(0.75),
        "tf_mobilenetv2_100": _tf_variant(1.0),
        "tf_mobilenetv2_130": _tf_variant(1.3),
        "tf_mobilenetv2_140": _tf_variant(1.4),
    },
)
