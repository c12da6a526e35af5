"""InceptionNeXt: a large depthwise kernel split into four cheap branches.

A 7x7 depthwise convolution spends most of its time on memory traffic. InceptionNeXt leaves most channels untouched and
gives an eighth each to a 3x3, a 1x11 and an 11x1 kernel. That takes a tenth of the arithmetic and a fraction of the
traffic, with a wider field of view.

Paper: Yu et al., "InceptionNeXt: When Inception Meets ConvNeXt", 2023, arXiv:2303.16900. The channels are ordered as
in the published code (identity, square, row, column).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import fold_into_next, fold_into_previous, scale_outputs
from gatewise.layers.init_weights import init_weights
from gatewise.layers.norm import LayerNorm2d
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork

Norm = Literal["batch", "layer"]
NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}
BRANCHES = ("identity", "square", "row", "column")


@dataclass(frozen=True)
class InceptionNeXtConfig(ImageConfig):
    """Sizes and options of an InceptionNeXt. A single band size or branch ratio applies to all stages.

    Args:
        patch_size: kernel size and stride of the stem.
        mlp_ratios: hidden width relative to the block's width, per stage.
        band_kernel_size: length of the row and column kernels.
        branch_ratio: fraction of the channels for each of the three convolutions.
        branches: which of identity, square, row and column to use. Channels of an omitted convolution pass unchanged;
            without the identity, its channels are divided among the convolutions.
        norm: norm after the mixer, in the stem and in the downsampling.
        layer_scale_init: initial scale of the residual branches; None disables layer scale.
        out_indices: stages that `forward_pyramid` returns.
        pyramid_norm: norm for each level of the pyramid; None leaves the levels unchanged.
    """

    patch_size: int = 4
    depths: tuple[int, ...] = (3, 3, 9, 3)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 3)
    square_kernel_size: int = 3
    band_kernel_size: int | tuple[int, ...] = 11
    branch_ratio: float | tuple[float, ...] = 1 / 8
    branches: tuple[str, ...] = BRANCHES
    norm: Norm = "batch"
    layer_scale_init: float | None = 1e-6
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    pyramid_norm: Norm | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("embed_dims", "mlp_ratios", "band_kernel_size", "branch_ratio"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {value}")
        for name in ("norm", "pyramid_norm"):
            if getattr(self, name) not in (*NORMS, *([None] if name == "pyramid_norm" else [])):
                raise ValueError(f"{name} must be one of {', '.join(NORMS)}, not {getattr(self, name)!r}")
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")

    def band(self, stage: int) -> int:
        """Return the length of the row and column kernels in a stage."""
        return self.band_kernel_size[stage] if isinstance(self.band_kernel_size, tuple) else self.band_kernel_size

    def ratio(self, stage: int) -> float:
        """Return the fraction of the channels for each convolution in a stage."""
        return self.branch_ratio[stage] if isinstance(self.branch_ratio, tuple) else self.branch_ratio


class InceptionDepthwise(nn.Module):
    """Identity, square, row and column branches over disjoint channel groups: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        square_kernel_size: int = 3,
        band_kernel_size: int = 11,
        branch_ratio: float = 1 / 8,
        branches: tuple[str, ...] = BRANCHES,
    ) -> None:
        super().__init__()
        check_odd(square_kernel_size, band_kernel_size)
        width = int(dim * branch_ratio)
        if width < 1 or 3 * width > dim:
            raise ValueError(
                f"the three convolutions must fit into the channels: {dim} channels at branch_ratio {branch_ratio} "
                f"give {width} to each; each needs at least 1 and at most a third"
            )
        if not branches or not set(branches) <= set(BRANCHES):
            raise ValueError(f"branches must be some of {', '.join(BRANCHES)}, not {branches}")
        kernels = {
            "square": (square_kernel_size, square_kernel_size),
            "row": (1, band_kernel_size),
            "column": (band_kernel_size, 1),
        }
        present = [name for name in kernels if name in branches]
        widths = dict.fromkeys(present, width)
        identity = dim - width * len(present)
        if "identity" not in branches:
            share, rest = divmod(identity, len(present))
            widths = {name: width + share + (i < rest) for i, name in enumerate(present)}
            identity = 0
        self.split = [identity, *widths.values()]
        self.convs = nn.ModuleDict({name: depthwise(widths[name], kernels[name]) for name in present})

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        if x.shape[1] != sum(self.split):
            raise ValueError(f"InceptionDepthwise expects {sum(self.split)} channels, not {x.shape[1]}")
        untouched, *parts = x.split(self.split, dim=1)
        return torch.cat([untouched, *(conv(p) for conv, p in zip(self.convs.values(), parts, strict=True))], dim=1)

    def fold_norm(self, norm: nn.BatchNorm2d) -> slice:
        """Fold the following norm into the convolutions in place; return the channels that none of them covers."""
        start = self.split[0]
        for conv, width in zip(self.convs.values(), self.split[1:], strict=True):
            fold_into_previous(cast(nn.Conv2d, conv), norm, slice(start, start + width))
            start += width
        return slice(self.split[0])


def check_odd(*kernel_sizes: int) -> None:
    for size in kernel_sizes:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"kernel sizes must be odd and positive, not {size}")


def depthwise(dim: int, kernel_size: tuple[int, int]) -> nn.Conv2d:
    return DepthwiseConv2d(dim, kernel_size)


class ConvMlp(nn.Module):
    """Two 1x1 convolutions with a GELU between them: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return self.fc2(F.gelu(self.fc1(x)))


class MetaNeXtBlock(nn.Module):
    """Mixer, norm and MLP in one residual branch: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: InceptionNeXtConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        dim = config.embed_dims[stage]
        self.mixer = InceptionDepthwise(
            dim, config.square_kernel_size, config.band(stage), config.ratio(stage), config.branches
        )
        self.norm = NORMS[config.norm](dim)
        self.mlp = ConvMlp(dim, int(dim * config.mlp_ratios[stage]))
        self.scale = None
        if config.layer_scale_init is not None:
            self.scale = nn.Parameter(torch.full((dim,), config.layer_scale_init))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        branch = self.mlp(self.norm(self.mixer(x)))
        if self.scale is not None:
            branch = branch * self.scale[:, None, None]
        return x + self.drop_path(branch)

    def merged(self) -> MetaNeXtBlock:
        """Return an equivalent block for eval mode, with batch norm and layer scale folded.

        The batch norm is folded into the convolutions and fc1, the layer scale into fc2.

        fc1 could absorb the whole norm. But when quantized to integers, all channels of the mixer then share one range,
        and weak channels, which fc1 would amplify, get few codes.
        """
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_next(self.norm, new.mlp.fc1, new.mixer.fold_norm(self.norm))
            new.norm = nn.Identity()
        if self.scale is not None:
            scale_outputs(new.mlp.fc2, self.scale)
            new.scale = None
        return new


class Stem(nn.Module):
    """Patch convolution and norm: (B, C, H, W) -> (B, C', H // patch, W // patch)."""

    def __init__(self, in_dim: int, dim: int, patch_size: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, patch_size, stride=patch_size)
        self.norm = NORMS[norm](dim)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.norm(self.conv(x))

    def merged(self) -> Stem:
        """Return an equivalent stem for eval mode, with a batch norm folded into the convolution."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_previous(new.conv, self.norm)
            new.norm = nn.Identity()
        return new


class Downsample(nn.Module):
    """Norm and 2x2 convolution of stride 2: (B, C, H, W) -> (B, C', H // 2, W // 2)."""

    def __init__(self, in_dim: int, dim: int, norm: Norm) -> None:
        super().__init__()
        self.norm = NORMS[norm](in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.conv(self.norm(x))

    def merged(self) -> Downsample:
        """Return an equivalent module for eval mode. A batch norm folds exactly, as the convolution has no padding."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_next(self.norm, new.conv)
            new.norm = nn.Identity()
        return new


class MlpHead(nn.Module):
    """Classifier of pooled features with a hidden layer three times as wide: (B, C) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 3 * dim)
        self.norm = nn.LayerNorm(3 * dim, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(3 * dim, num_classes)

    def forward(self, x: Float[Tensor, "batch channels"]) -> Float[Tensor, "batch classes"]:
        return self.fc2(self.drop(self.norm(F.gelu(self.fc1(x)))))


class InceptionNeXt(StagedNetwork):
    """Four stages of MetaNeXt blocks, global pooling, MLP head."""

    def __init__(self, config: InceptionNeXtConfig) -> None:
        super().__init__(config)
        dims = config.embed_dims
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stem = Stem(config.in_chans, dims[0], config.patch_size, config.norm)
        self.stages = nn.ModuleList(
            Stage(
                Downsample(dims[i - 1], dims[i], config.norm) if i else nn.Identity(),
                [MetaNeXtBlock(config, i, rate) for rate in rates[i]],
            )
            for i in range(len(dims))
        )
        norm = config.pyramid_norm
        self.level_norms = nn.ModuleDict({str(i): NORMS[norm](dims[i]) for i in config.out_indices} if norm else {})
        self.min_size = config.patch_size * 2 ** (len(dims) - 1)
        self.apply(init_weights)
        self.head = self.make_head(config.num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        if num_classes == 0:
            return nn.Identity()
        return MlpHead(self.config.embed_dims[-1], num_classes, self.config.drop_rate).apply(init_weights)


OFFICIAL = KeyLayout(
    "official",
    (
        ("^stem.0", "stem.conv"),
        ("^stem.1", "stem.norm"),
        ("downsample.0", "downsample.norm"),
        ("downsample.1", "downsample.conv"),
        ("token_mixer", "mixer"),
        ("mixer.dwconv_hw", "mixer.convs.square"),
        ("mixer.dwconv_w", "mixer.convs.row"),
        ("mixer.dwconv_h", "mixer.convs.column"),
        ("blocks.{j}.gamma", "blocks.{j}.scale"),
    ),
)


def _variant(name: str, top1: str, resolution: int = 224, **fields: Any) -> Variant:
    crop = {"base": 0.95, "base_384": 1.0}.get(name, 0.875)
    tag = "base.sail_in1k_384" if name == "base_384" else f"{name}.sail_in1k"
    score = f"{top1} % top-1, ImageNet-1K at {resolution} (model zoo)"
    weights = Weights(f"timm/inception_next_{tag}", "Apache-2.0", score, crop)
    return Variant(InceptionNeXtConfig(**fields), (3, resolution, resolution), weights)


DEEP = (3, 3, 27, 3)
WIDE = (128, 256, 512, 1024)
ATTO: dict[str, Any] = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (40, 80, 160, 320),
    "band_kernel_size": 9,
    "branch_ratio": 0.25,
}

register(
    InceptionNeXt,
    paper="inception_next",
    layouts=lambda config: [OFFICIAL],
    fresh_with_head=("head.", "level_norms."),
    variants={
        "inception_next_atto": _variant("atto", "75.3", **ATTO),
        "inception_next_tiny": _variant("tiny", "82.3"),
        "inception_next_small": _variant("small", "83.5", depths=DEEP),
        "inception_next_base": _variant("base", "84.0", depths=DEEP, embed_dims=WIDE),
        "inception_next_base_384": _variant("base_384", "85.2", resolution=384, depths=DEEP, embed_dims=WIDE),
    },
)
