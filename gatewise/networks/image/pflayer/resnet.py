"""PfLayer, residual form: max pooling in place of 3x3 convolutions.

A bottleneck mixes channels in its 1x1 convolutions and positions in its 3x3 convolution. Mixing positions needs no
weights: a 3x3 max pool does it too, and leaves a block with half the parameters and multiplications. The hybrid keeps a
trained convolution only where a stage halves the resolution.

Paper: Han et al., "Learning Features with Parameter-Free Layers", 2022, arXiv:2202.02777. Only the abstract of the
paper was available. Blocks, sizes and initial values follow the published code, which initializes as PyTorch does and
ignores its own `zero_init_residual`. The transformers of the same paper are in `transformers.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.ops.spatial_pool import spatial_max_pool

STAGES = 4
STEM_DIM = 64
EXPANSION = 4
RELU: Callable[[], nn.Module] = partial(nn.ReLU, inplace=True)


@dataclass(frozen=True)
class PfResNetConfig(ImageConfig):
    """Sizes and options of a residual network. `depths` and `planes` have one entry per stage.

    Args:
        spatial: operator that mixes positions in a bottleneck, a key of `SPATIAL`. "conv" is ResNet-50 itself, "max"
            and "hybrid" are the paper's, and "depthwise" and "average" are the paper's baselines.
        planes: bottleneck width of each stage at `width_mult` 1; a stage has four times as many output channels.
        width_mult: multiplier of the planes, but not of the stem's 64 channels.
        groups: number of groups of the 3x3 convolutions (ResNeXt); only for "conv".
        base_width: channels of a bottleneck per 64 planes and group (wide ResNets); only for "conv".
        dilated_stages: whether stages 2, 3 and 4 dilate their 3x3 convolutions instead of striding.
        ceil_mode: whether the hybrid's average pooling rounds odd sizes up, like its shortcut, so that any size works.
            It changes nothing for sizes that work without it.
        drop_path_rate: stochastic depth of the last block. This option is ours; the published networks have none.
        out_indices: stages that `forward_pyramid` returns.
    """

    spatial: str = "max"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    planes: tuple[int, ...] = (64, 128, 256, 512)
    width_mult: float = 1.0
    groups: int = 1
    base_width: int = 64
    dilated_stages: tuple[bool, ...] = (False, False, False)
    ceil_mode: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate:
            raise ValueError(f"the residual networks have no dropout: drop_rate must be 0, not {self.drop_rate}")
        if self.spatial not in SPATIAL:
            raise ValueError(f"spatial must be one of {', '.join(SPATIAL)}, not {self.spatial!r}")
        for name, entries in (("depths", STAGES), ("planes", STAGES), ("dilated_stages", STAGES - 1)):
            if len(getattr(self, name)) != entries:
                raise ValueError(f"{name} must have {entries} entries, not {getattr(self, name)}")
        if min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, depths cannot be {self.depths}")
        if self.groups < 1 or self.base_width < 1:
            raise ValueError(f"groups and base_width must be positive, not {self.groups} and {self.base_width}")
        if self.spatial != "conv" and (self.groups != 1 or self.base_width != 64):
            raise ValueError(
                f"groups and base_width shape 3x3 convolutions: with spatial={self.spatial!r} they must be 1 and 64, "
                f"not {self.groups} and {self.base_width}"
            )
        if min(self.widths) < 1:
            raise ValueError(
                f"width_mult {self.width_mult} and base_width {self.base_width} leave no channels: "
                f"bottleneck widths are {self.widths}"
            )
        if not set(self.out_indices) <= set(range(STAGES)):
            raise ValueError(f"out_indices must be stages 0..{STAGES - 1}, not {self.out_indices}")

    @property
    def scaled_planes(self) -> tuple[int, ...]:
        """Planes times the width multiplier, rounded down as in the published code."""
        return tuple(int(planes * self.width_mult) for planes in self.planes)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels of each stage's spatial operator."""
        return tuple(int(planes * self.base_width / 64) * self.groups for planes in self.scaled_planes)

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Number of output channels of each stage."""
        return tuple(EXPANSION * planes for planes in self.scaled_planes)

    @property
    def stage_strides(self) -> tuple[int, ...]:
        return (1, *(1 if dilated else 2 for dilated in self.dilated_stages))

    @property
    def dilations(self) -> tuple[int, ...]:
        """Dilation of each stage, for all of its blocks including the first."""
        dilations = [1]
        for dilated in self.dilated_stages:
            dilations.append(dilations[-1] * (2 if dilated else 1))
        return tuple(dilations)


class SpatialMaxPool(nn.Module):
    """3x3 max pooling with minus infinity around the map: (B, C, H, W) -> (B, C, H', W'), sizes rounded up."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        return spatial_max_pool(x, 3, self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


def _convolution(config: PfResNetConfig, width: int, stride: int, dilation: int) -> nn.Module:
    return ConvNormAct(width, width, 3, stride, dilation=dilation, groups=config.groups, act=RELU)


def _depthwise(config: PfResNetConfig, width: int, stride: int, dilation: int) -> nn.Module:
    return ConvNormAct(width, width, 3, stride, dilation=dilation, groups=width, act=RELU)


def _max_pool(config: PfResNetConfig, width: int, stride: int, dilation: int) -> nn.Module:
    return SpatialMaxPool(stride)


def _average_pool(config: PfResNetConfig, width: int, stride: int, dilation: int) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


def _hybrid(config: PfResNetConfig, width: int, stride: int, dilation: int) -> nn.Module:
    """Return a 2x2 mean and a convolution if the resolution changes, else a max pool."""
    if stride == 1:
        return SpatialMaxPool()
    return nn.Sequential(
        nn.AvgPool2d(stride, stride, ceil_mode=config.ceil_mode), ConvNormAct(width, width, 3, act=RELU)
    )


SPATIAL: dict[str, Callable[[PfResNetConfig, int, int, int], nn.Module]] = {
    "conv": _convolution,
    "max": _max_pool,
    "hybrid": _hybrid,
    "depthwise": _depthwise,
    "average": _average_pool,
}
"""Name -> builder of a bottleneck's spatial operator from configuration, width, stride and dilation."""


class Bottleneck(nn.Module):
    """Reduce, mix positions, expand: (B, C, H, W) -> (B, C', H', W').

        relu(shortcut(x) + BN(W2 spatial(relu(BN(W1 x)))))

    The shortcut is the identity where shapes allow, else a strided 1x1 convolution with norm.

    Args:
        width: number of channels of `spatial`.
        spatial: module that mixes positions; its stride is `stride`.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        dim: int,
        spatial: nn.Module,
        stride: int = 1,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.reduce = ConvNormAct(in_dim, width, act=RELU)
        self.spatial = spatial
        self.expand = ConvNormAct(width, dim, act=None)
        projected = stride != 1 or in_dim != dim
        self.shortcut = ConvNormAct(in_dim, dim, 1, stride, act=None) if projected else nn.Identity()
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = self.expand(self.spatial(self.reduce(x)))
        return F.relu(self.shortcut(x) + self.drop_path(y))


class PfResNet(ImageNetwork):
    """Stem, four stages of bottlenecks, global pooling, linear classifier. Strides round odd sizes up."""

    def __init__(self, config: PfResNetConfig) -> None:
        super().__init__(config)
        self.stem = ConvNormAct(config.in_chans, STEM_DIM, 7, 2, act=RELU)
        self.stem_pool = SpatialMaxPool(stride=2)
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        dims = (STEM_DIM, *config.embed_dims)
        self.stages = nn.ModuleList(_stage(config, stage, dims[stage], rates[stage]) for stage in range(STAGES))
        self.min_size = next(size for size in range(1, 1024) if not self._odd_pooling(size))
        self.head = self.make_head(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        stride, info = 4, []
        for dim, own in zip(self.config.embed_dims, self.config.stage_strides, strict=True):
            stride *= own
            info.append(FeatureInfo(dim, stride))
        return [info[stage] for stage in self.config.out_indices]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's map.

        Raises:
            ValueError: if the hybrid, without `ceil_mode`, cannot halve one of the maps for this size.
        """
        return self._run_stages(x)[-1]

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return the maps of the stages in `out_indices`. Raises the errors of `forward_features`."""
        levels = self._run_stages(x)
        return [levels[stage] for stage in self.config.out_indices]

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        for side, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if odd := self._odd_pooling(size):
                raise ValueError(self._size_message(side, size, odd))
        x = self.stem_pool(self.stem(x))
        return self.run_rows(self.stages, x)

    def _odd_pooling(self, size: int) -> int | None:
        """Return the first length at which the hybrid's pooling and its shortcut round differently, if any."""
        config = self.config
        if config.spatial != "hybrid" or config.ceil_mode:
            return None
        length = -(-size // 4)
        for stride in config.stage_strides:
            if length % stride:
                return length
            length //= stride
        return None

    def _size_message(self, side: str, size: int, odd: int) -> str:
        total = 4 * math.prod(self.config.stage_strides)
        return (
            f"{self.variant or type(self).__name__} cannot halve {odd}, which {side} {size} becomes on the way: "
            f"ceil({side} / 4) must be divisible by {total // 4}, as it is for multiples of {total}; resize or pad the "
            "images, or set ceil_mode=True"
        )

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes)


def _stage(config: PfResNetConfig, stage: int, in_dim: int, rates: list[float]) -> nn.Sequential:
    width, dim, dilation = config.widths[stage], config.embed_dims[stage], config.dilations[stage]
    blocks = []
    for index, rate in enumerate(rates):
        stride = config.stage_strides[stage] if index == 0 else 1
        spatial = SPATIAL[config.spatial](config, width, stride, dilation)
        blocks.append(Bottleneck(dim if index else in_dim, width, dim, spatial, stride, rate))
    return nn.Sequential(*blocks)


def layouts(config: PfResNetConfig) -> list[KeyLayout]:
    """Return the official layout and, for ResNet-50 itself, also the one that torchvision and timm share."""
    official: tuple[Rule, ...] = (
        ("^conv1.0", "stem.conv"),
        ("^conv1.1", "stem.norm"),
        ("^fc", "head"),
        ("^layer{i+1}", "stages.{i}"),
        *_unit_rules("reduction_block", "reduce"),
        *_unit_rules("conv_block.1" if config.spatial == "hybrid" else "conv_block", _spatial_unit(config)),
        *_unit_rules("expansion_block", "expand"),
        *_unit_rules("downsample", "shortcut"),
    )
    torchvision: tuple[Rule, ...] = (
        ("^conv1", "stem.conv"),
        ("^bn1", "stem.norm"),
        ("^fc", "head"),
        ("^layer{i+1}", "stages.{i}"),
        *((f"conv{i}", f"{unit}.conv") for i, unit in enumerate(("reduce", "spatial", "expand"), start=1)),
        *((f"bn{i}", f"{unit}.norm") for i, unit in enumerate(("reduce", "spatial", "expand"), start=1)),
        *_unit_rules("downsample", "shortcut"),
    )
    both = [KeyLayout("official", official), KeyLayout("torchvision", torchvision)]
    return both if config.spatial == "conv" else both[:1]


def _spatial_unit(config: PfResNetConfig) -> str:
    return "spatial.1" if config.spatial == "hybrid" else "spatial"


def _unit_rules(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return (f"{theirs}.0", f"{ours}.conv"), (f"{theirs}.1", f"{ours}.norm")


register(
    PfResNet,
    paper="pflayer",
    layouts=layouts,
    variants={
        "resnet50": Variant(PfResNetConfig(spatial="conv")),
        "resnet50_max": Variant(PfResNetConfig(spatial="max")),
        "resnet50_hybrid": Variant(PfResNetConfig(spatial="hybrid")),
    },
)
