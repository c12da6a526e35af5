"""Networks of inverted residuals with EvoNorm: MobileNetV2, EfficientNet and RegNetZ.

All three widen a thin tensor, filter it in groups of channels (single channels in the first two), weigh the result with
squeeze-excitation (except MobileNetV2), and narrow it without an activation. EvoNorm replaces each norm with its
activation. The narrow ends have no activation, so the layer there is only a weight and a bias. The S0a, S1a and S2a
layers of the RegNetZ weights are exceptions, which also normalize there.

Paper: Liu et al., "Evolving Normalization-Activation Layers", 2020, arXiv:2004.02967; the networks are those of Sandler
et al. 2018 (arXiv:1801.04381), Tan and Le 2019 (arXiv:1905.11946) and Dollar et al. 2021 (arXiv:2103.06877).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.evonorm import ConvEvoNorm
from gatewise.layers.init_weights import init_by_fan_out
from gatewise.layers.linear_head import linear_head
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.networks.image._base import FeatureInfo, ImageNetwork
from gatewise.networks.image.evonorm.keys import norm_key
from gatewise.networks.image.evonorm.resnet import EvoNormConfig
from gatewise.networks.image.mobilenetv2 import ROWS, round_channels

Maps = Float[Tensor, "batch channels height width"]
Row = tuple[int, int, int, int, int]

MOBILENET_ROWS: tuple[Row, ...] = tuple((3, *row) for row in ROWS)
"""Kernel, expansion, channels, repeats and stride of each stage of MobileNetV2 (table 2 of its paper)."""

EFFICIENTNET_ROWS: tuple[Row, ...] = (
    (3, 1, 16, 1, 1),
    (3, 6, 24, 2, 2),
    (5, 6, 40, 2, 2),
    (3, 6, 80, 3, 2),
    (5, 6, 112, 3, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)
"""The same for EfficientNet-B0 (table 1 of its paper)."""


@dataclass(frozen=True)
class EvoNormMobileConfig(EvoNormConfig):
    """Sizes and options of a network of inverted residuals.

    Args:
        rows: kernel, expansion, channels, repeats and stride of each stage.
        width_mult: multiplier of all channel counts; the last convolution never shrinks.
        depth_mult: multiplier of the repeats, which are rounded up.
        group_width: channels per group of the middle convolution.
        stem_channels: channels of the stem, before `width_mult`.
        tiered_stem: whether the stem has three 3x3 convolutions of strides 2, 1 and 2.
        head_channels: channels of the last convolution, before `width_mult`.
        se_ratio: hidden width of the squeeze-excitation, as a ratio of the block's input; 0 for none.
        se_of_hidden: whether `se_ratio` is relative to the wide channels and rounds to multiples of 8, as in RegNetZ.
        se_act: activation between the layers of the squeeze-excitation.
    """

    rows: tuple[Row, ...] = MOBILENET_ROWS
    width_mult: float = 1.0
    depth_mult: float = 1.0
    group_width: int = 1
    stem_channels: int = 32
    tiered_stem: bool = False
    head_channels: int = 1280
    se_ratio: float = 0.0
    se_of_hidden: bool = False
    se_act: str = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_mult <= 0 or self.depth_mult <= 0:
            raise ValueError(f"multipliers must be positive, not {self.width_mult} and {self.depth_mult}")
        if not 0 <= self.se_ratio <= 1:
            raise ValueError(f"se_ratio must be from 0 (none) to 1, not {self.se_ratio}")
        if self.se_act not in _ACTIVATIONS:
            raise ValueError(f"se_act must be one of {', '.join(_ACTIVATIONS)}, not {self.se_act!r}")
        if any(row[4] not in (1, 2) or row[0] % 2 == 0 for row in self.rows):
            raise ValueError(f"rows need odd kernels and strides of 1 or 2, not {self.rows}")

    def channels(self, value: float) -> int:
        """Return `value` times the width multiplier, rounded to a multiple of 8."""
        return round_channels(value * self.width_mult)

    @property
    def stem_width(self) -> int:
        return self.channels(self.stem_channels)

    @property
    def head_width(self) -> int:
        return round_channels(self.head_channels * max(1.0, self.width_mult))

    @property
    def repeats(self) -> tuple[int, ...]:
        """Number of blocks per stage."""
        return tuple(ceil(row[3] * self.depth_mult) for row in self.rows)

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Index and stride of the last stage at each resolution from stride 4 on."""
        stride, found = (4 if self.tiered_stem else 2), []
        for index, row in enumerate(self.rows):
            stride *= row[4]
            if stride >= 4 and (index + 1 == len(self.rows) or self.rows[index + 1][4] > 1):
                found.append((index, stride))
        return tuple(found)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


class GatedInvertedResidual(nn.Module):
    """Expand, filter, weigh, project, and add the input if the shapes match: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_dim: int, dim: int, row: Row, stride: int, rate: float, config: EvoNormMobileConfig) -> None:
        super().__init__()
        kernel_size, expand, *_ = row
        hidden, norm = in_dim * expand, config.norm
        if hidden % config.group_width:
            raise ValueError(f"group_width must divide the {hidden} hidden channels, not be {config.group_width}")
        self.residual = stride == 1 and in_dim == dim
        self.expand = ConvEvoNorm(in_dim, hidden, 1, norm=norm) if expand != 1 else nn.Identity()
        self.spatial = ConvEvoNorm(hidden, hidden, kernel_size, stride, norm=norm, groups=hidden // config.group_width)
        self.gate: nn.Module = nn.Identity()
        if config.se_ratio:
            counted = round_channels(hidden * config.se_ratio) if config.se_of_hidden else int(in_dim * config.se_ratio)
            self.gate = SqueezeExcite(hidden, counted, _ACTIVATIONS[config.se_act])
        self.project = ConvEvoNorm(hidden, dim, 1, norm=norm, act=False)
        self.drop_path = DropPath(rate if self.residual else 0.0)

    def forward(self, x: Maps) -> Float[Tensor, "batch dim h w"]:
        y = self.project(self.gate(self.spatial(self.expand(x))))
        return x + self.drop_path(y) if self.residual else y


_init_weights = partial(init_by_fan_out, linear_std=0.01)


class EvoNormMobile(ImageNetwork):
    """Stem, stages of inverted residuals, a last 1x1 convolution, global pooling, linear classifier."""

    def __init__(self, config: EvoNormMobileConfig) -> None:
        super().__init__(config)
        dim = config.stem_width
        units = [ConvEvoNorm(config.in_chans, dim, 3, 2, norm=config.norm)]
        if config.tiered_stem:
            units += [ConvEvoNorm(dim, dim, 3, stride, norm=config.norm) for stride in (1, 2)]
        self.stem = nn.Sequential(*units)
        rates = drop_path_rates(config.drop_path_rate, config.repeats)
        self.stages = nn.ModuleList()
        for row, row_rates in zip(config.rows, rates, strict=True):
            blocks = nn.ModuleList()
            for index, rate in enumerate(row_rates):
                width = config.channels(row[2])
                blocks.append(GatedInvertedResidual(dim, width, row, row[4] if index == 0 else 1, rate, config))
                dim = width
            self.stages.append(blocks)
        self.head_conv = ConvEvoNorm(dim, config.head_width, 1, norm=config.norm)
        self.drop = nn.Dropout(config.drop_rate)
        self.head = self.make_head(config.num_classes)
        self.apply(_init_weights)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        config = self.config
        return [FeatureInfo(config.channels(config.rows[row][2]), stride) for row, stride in config.levels]

    def forward_features(self, x: Maps) -> Float[Tensor, "batch features h w"]:
        """Return the map before pooling. Odd sizes round up at every stride."""
        return self.head_conv(self._run_rows(x)[-1])

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.drop(super().pool_features(features))

    def forward_pyramid(self, x: Maps) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the last block's output at each resolution, without the last 1x1 convolution."""
        maps = self._run_rows(x)
        return [maps[row] for row, _ in self.config.levels]

    def _run_rows(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        return self.run_rows(self.stages, x)

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.head_width, num_classes, _init_weights)


def layouts(config: EvoNormMobileConfig) -> list[KeyLayout]:
    """Return timm's layouts: that of its RegNetZ, and that of its MobileNetV2 and EfficientNet."""
    return [regnet(config), _efficientnet(config)]


def regnet(config: EvoNormMobileConfig) -> KeyLayout:
    inner = norm_key(config.norm)
    stem = [(f"^stem.conv{i + 1}", f"stem.{i}") for i in range(3)] if config.tiered_stem else [("^stem", "stem.0")]
    rules: list[Rule] = [
        # Rules for a unit's parts precede those for the unit. In reverse, a stem's `conv` would match its first unit.
        ("bn", f"norm{inner}"),
        *stem,
        ("conv1_1x1", "expand"),
        ("conv2_kxk", "spatial"),
        ("attn.fc1", "gate.reduce"),
        ("attn.fc2", "gate.expand"),
        ("conv3_1x1", "project"),
        ("^final_conv", "head_conv"),
        ("^head.fc", "head"),
    ]
    return KeyLayout("timm", tuple(rules))


def _efficientnet(config: EvoNormMobileConfig) -> KeyLayout:
    inner = norm_key(config.norm)
    rules: list[Rule] = [("^conv_stem", "stem.0.conv"), ("^bn1", f"stem.0.norm{inner}"), ("^blocks", "stages")]
    for index, (row, repeats) in enumerate(zip(config.rows, config.repeats, strict=True)):
        for b in range(repeats):
            convs = {"conv_pw": "expand", "conv_dw": "spatial", "conv_pwl": "project"}
            if row[1] == 1:
                convs = {"conv_dw": "spatial", "conv_pw": "project"}
            block = f"stages.{index}.{b}"
            for number, (conv, unit) in enumerate(convs.items(), start=1):
                rules += [(f"^{block}.{conv}", f"{block}.{unit}.conv")]
                rules += [(f"^{block}.bn{number}", f"{block}.{unit}.norm{inner}")]
    rules += [("se.conv_reduce", "gate.reduce"), ("se.conv_expand", "gate.expand")]
    rules += [("^classifier", "head"), ("^conv_head", "head_conv.conv"), ("^bn2", f"head_conv.norm{inner}")]
    return KeyLayout("timm_efficientnet", tuple(rules))


def _regnetz(
    size: int, weights: str | None, expand: int, widths: tuple[int, ...], depths: tuple[int, ...], **fields: Any
) -> Variant:
    strides = (1, 2, 2, 2) if fields.get("tiered_stem") else (2, 2, 2, 2)
    rows = zip((3,) * 4, (expand,) * 4, widths, depths, strides, strict=True)
    published = None
    if weights is not None:
        score = "81.9 % top-1 (a third party's listing)" if weights.startswith("regnetz_c16") else "not published"
        mean = (0.5, 0.5, 0.5)
        published = Weights(f"timm/{weights}", "Apache-2.0", score, 0.95, mean=mean, std=mean)
    config = EvoNormMobileConfig(
        rows=tuple(rows),
        se_ratio=0.25,
        se_of_hidden=True,
        se_act="relu",
        norm_layer="S0a",
        norm_group_size=16,
        **fields,
    )
    return Variant(config, (3, size, size), published)


def _mobilenet(layer: Any) -> Variant:
    return Variant(EvoNormMobileConfig(drop_rate=0.2, norm_layer=layer, norm_eps=1e-5))


def _efficient(layer: Any, size: int = 224, **fields: Any) -> Variant:
    config = EvoNormMobileConfig(
        **{"drop_rate": 0.2, "drop_path_rate": 0.2} | fields,
        rows=EFFICIENTNET_ROWS,
        se_ratio=0.25,
        norm_layer=layer,
        norm_eps=1e-5,
    )
    return Variant(config, (3, size, size))


BC: dict[str, Any] = {
    "widths": (48, 96, 192, 288),
    "depths": (2, 6, 12, 2),
    "group_width": 16,
    "head_channels": 1536,
}
D: dict[str, Any] = {"widths": (64, 128, 256, 384), "depths": (3, 6, 12, 3), "group_width": 8, "head_channels": 1792}
B5: dict[str, Any] = {"width_mult": 1.6, "depth_mult": 2.2, "drop_rate": 0.4, "drop_path_rate": 0.2}

register(
    EvoNormMobile,
    paper="evonorm",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "regnetz_b16_evos": _regnetz(224, None, 3, **BC),
        "regnetz_c16_evos": _regnetz(256, "regnetz_c16_evos.ch_in1k", 4, **BC),
        "regnetz_d8_evos": _regnetz(256, "regnetz_d8_evos.ch_in1k", 4, **D, stem_channels=64, tiered_stem=True),
        "mobilenetv2_evonorm_b0": _mobilenet("B0"),
        "mobilenetv2_evonorm_b1": _mobilenet("B1"),
        "mobilenetv2_evonorm_b2": _mobilenet("B2"),
        "mobilenetv2_evonorm_s0": _mobilenet("S0"),
        "mobilenetv2_evonorm_s1": _mobilenet("S1"),
        "mobilenetv2_evonorm_s2": _mobilenet("S2"),
        "efficientnet_b0_evonorm_b0": _efficient("B0"),
        "efficientnet_b0_evonorm_b1": _efficient("B1"),
        "efficientnet_b0_evonorm_b2": _efficient("B2"),
        "efficientnet_b0_evonorm_s0": _efficient("S0"),
        "efficientnet_b0_evonorm_s1": _efficient("S1"),
        "efficientnet_b0_evonorm_s2": _efficient("S2"),
        "efficientnet_b5_evonorm_b0": _efficient("B0", 456, **B5),
        "efficientnet_b5_evonorm_s0": _efficient("S0", 456, **B5),
    },
)
