"""OverLoCK: an overview first, a close look next.

A Base-Net computes features of middle resolution. From these, an Overview-Net takes a quick look at the whole image.
The resulting overview guides a Focus-Net, which starts from the same features again. The overview is appended to the
features as channels, and the similarity of a position to regions of the overview determines the position's own
depthwise kernels.

Paper: Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", 2025,
arXiv:2502.20087. Parameters and FLOPs are published for the re-parameterized form without the auxiliary classifier;
checkpoints include it, in both forms. The published network returns the logits of both classifiers in training and of
one otherwise. Here `forward` always returns one, and `forward_with_auxiliary` returns both. The published backbone for
dense prediction also differs from the classifier in that the third stage starts from the norm of the second.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.fold_norm import fold_into_next
from gatewise.layers.gated_context_mixing import check_width, check_windows
from gatewise.layers.init_weights import init_weights
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import LayerNorm2d
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.overlock.blocks import BRANCHES, Affine, FocusBlock, RepConvBlock
from gatewise.networks.image.overlock.keys import OFFICIAL
from gatewise.networks.image.skeletons.staged import Stage

Images = Float[Tensor, "batch channels height width"]

AUXILIARY_WEIGHT = 0.4
"""Weight of the auxiliary classifier's loss relative to the main loss, as in the published training script."""


@dataclass(frozen=True)
class OverLoCKConfig(ImageConfig):
    """Sizes and options of an OverLoCK.

    Args:
        depths: number of blocks of the Base-Net's three stages and of the Overview-Net.
        focus_depths: number of blocks of the Focus-Net's two stages.
        embed_dims: channels of the four stages; the overview has a quarter of the last.
        kernel_sizes: kernel sizes of the four stages; the Focus-Net's two stages use the last two.
        small_kernel_size: size of the smaller window of context mixing.
        focus_num_heads: number of heads; each half of the channels has twice as many.
        focus_mlp_ratios: hidden widths of the MLPs relative to the feature channels only.
        layer_scale_inits: initial scale of the residual connections of the four stages; None for no scale.
        scale_identity: whether to scale the identity that a branch is added to, instead of the branch.
        decay_scales: whether weight decay applies to scales, as published, which pulls identity scales toward 0.
        projection_dim: number of channels before pooling.
        auxiliary_head: whether to add a classifier of the overview, for training.
        deploy: whether large kernels are single convolutions without branches, as in the result of `merged()`.
        pyramid_norm: whether to build the dense-prediction form, with a norm per level instead of projection and
            classifiers.
    """

    depths: tuple[int, ...] = (2, 2, 3, 2)
    focus_depths: tuple[int, ...] = (6, 2)
    embed_dims: tuple[int, ...] = (56, 112, 256, 336)
    kernel_sizes: tuple[int, ...] = (17, 15, 13, 7)
    small_kernel_size: int = 5
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    focus_num_heads: tuple[int, ...] = (4, 6)
    focus_mlp_ratios: tuple[float, ...] = (3, 3)
    layer_scale_inits: tuple[float | None, ...] = (None, None, 1.0, 1.0)
    scale_identity: bool = True
    decay_scales: bool = True
    projection_dim: int = 1024
    auxiliary_head: bool = True
    deploy: bool = False
    pyramid_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_rate:
            raise ValueError(f"OverLoCK has no dropout: drop_rate must be 0, not {self.drop_rate}")
        for name, count in _ENTRIES.items():
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} entries, not {getattr(self, name)}")
        if min(*self.depths, *self.focus_depths) < 1:
            raise ValueError(
                f"every stage needs a block, not depths {self.depths} and focus_depths {self.focus_depths}"
            )
        if self.embed_dims[0] % 2 or self.embed_dims[3] % 4:
            raise ValueError(
                f"the stem halves the first width and the overview quarters the last, not {self.embed_dims}"
            )
        if not set(self.kernel_sizes) <= set(BRANCHES):
            raise ValueError(f"kernel_sizes must be of {', '.join(map(str, BRANCHES))}, not {self.kernel_sizes}")
        for stage in (0, 1):
            check_width(self.embed_dims[2 + stage], self.focus_num_heads[stage])
            check_windows(self.kernel_sizes[2 + stage], self.small_kernel_size)
        if self.pyramid_norm and self.num_classes:
            raise ValueError("the dense-prediction form (pyramid_norm) has no classifier: pass num_classes=0 with it")

    @property
    def context_dim(self) -> int:
        """Number of overview channels in the Focus-Net."""
        return self.embed_dims[3] // 4


_ENTRIES = {
    "depths": 4,
    "focus_depths": 2,
    "embed_dims": 4,
    "kernel_sizes": 4,
    "mlp_ratios": 4,
    "focus_num_heads": 2,
    "focus_mlp_ratios": 2,
    "layer_scale_inits": 4,
}


def halve(in_dim: int, dim: int) -> ConvNormAct:
    """Return a convolution that halves the resolution, rounding sizes up."""
    return ConvNormAct(in_dim, dim, 3, 2, act=None)


def make_stem(in_dim: int, dim: int) -> nn.Sequential:
    """Return four convolutions that reduce the resolution to a quarter: (B, C, H, W) -> (B, C', H / 4, W / 4)."""
    return nn.Sequential(
        ConvNormAct(in_dim, dim // 2, 3, 2, act=nn.GELU),
        ConvNormAct(dim // 2, dim // 2, 3, act=nn.GELU),
        ConvNormAct(dim // 2, dim, 3, 2, act=nn.GELU),
        ConvNormAct(dim, dim, 3, act=None),
    )


def make_stage(config: OverLoCKConfig, stage: int, rates: list[float]) -> Stage:
    """Return a stage of the Base-Net or, for the last index, of the Overview-Net."""
    dim = config.embed_dims[stage]
    options = (config.mlp_ratios[stage], config.layer_scale_inits[stage], config.scale_identity)
    blocks: list[nn.Module] = [
        RepConvBlock(dim, config.kernel_sizes[stage], *options, rate, config.deploy) for rate in rates
    ]
    return Stage(halve(config.embed_dims[stage - 1], dim) if stage else nn.Identity(), blocks)


def make_focus_stage(config: OverLoCKConfig, stage: int, rates: list[float]) -> Stage:
    """Return stage 0 or 1 of the Focus-Net."""
    dim = config.embed_dims[2 + stage]
    blocks: list[nn.Module] = [
        FocusBlock(
            dim,
            config.context_dim,
            config.kernel_sizes[2 + stage],
            config.small_kernel_size,
            config.focus_num_heads[stage],
            config.focus_mlp_ratios[stage],
            config.layer_scale_inits[2 + stage],
            config.scale_identity,
            rate,
            is_first=stage == index == 0,
            deploy=config.deploy,
        )
        for index, rate in enumerate(rates)
    ]
    return Stage(HalveBoth(config.embed_dims[2], dim, config.context_dim) if stage else nn.Identity(), blocks)


class HalveBoth(nn.Module):
    """Separate halving of features and overview: (B, C + D, H, W) -> (B, C' + D, H / 2, W / 2)."""

    def __init__(self, in_dim: int, dim: int, context_dim: int) -> None:
        super().__init__()
        self.dims = [in_dim, context_dim]
        self.features = halve(in_dim, dim)
        self.context = halve(context_dim, context_dim)

    def forward(self, z: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        x, h = z.split(self.dims, dim=1)
        return torch.cat([self.features(x), self.context(h)], dim=1)


class AuxiliaryHead(nn.Module):
    """Norm, pooling and classifier: (B, C, H, W) -> (B, classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch classes"]:
        return self.classifier(self.norm(x).mean(dim=(2, 3)))

    def merged(self) -> AuxiliaryHead:
        """Return an equivalent head for eval mode, with the norm folded into the classifier across the mean."""
        new = deepcopy(self)
        if isinstance(new.norm, nn.BatchNorm2d):
            fold_into_next(new.norm, new.classifier)
            new.norm = nn.Identity()
        return new


class OverLoCK(ImageNetwork):
    """Base-Net, Overview-Net and Focus-Net, then projection, global pooling, linear classifier.

    Takes any size from 32 pixels; strides round up. Maps of the Focus-Net that are smaller than its windows are
    enlarged to them in every block, which affects the cost of small images.
    """

    min_size = 32

    def __init__(self, config: OverLoCKConfig) -> None:
        super().__init__(config)
        dims, context_dim = config.embed_dims, config.context_dim
        rates = drop_path_rates(config.drop_path_rate, (*config.depths, *config.focus_depths))
        self.stem = make_stem(config.in_chans, dims[0])
        self.stages = nn.ModuleList(make_stage(config, stage, rates[stage]) for stage in range(4))
        self.context = nn.Conv2d(dims[3], context_dim, 1)
        self.focus = nn.ModuleList(make_focus_stage(config, stage, rates[4 + stage]) for stage in (0, 1))
        widths = [info.channels for info in self.feature_info]
        self.level_norms = nn.ModuleList(LayerNorm2d(width) for width in widths) if config.pyramid_norm else None
        self.project = (
            nn.Identity() if config.pyramid_norm else ConvNormAct(widths[3], config.projection_dim, act=nn.SiLU)
        )
        self.apply(init_weights)
        self.auxiliary: AuxiliaryHead | None
        self.reset_classifier(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        dims, context_dim = self.config.embed_dims, self.config.context_dim
        widths = (dims[0], dims[1], dims[2] + context_dim, dims[3] + context_dim)
        return [FeatureInfo(width, 4 * 2**stage) for stage, width in enumerate(widths)]

    def forward_features(self, x: Images) -> Float[Tensor, "batch features h w"]:
        """Return the projected map, at 1 / 32 of the image size, rounded up."""
        return self.project(self._focus(*self._base(x))[1])

    def forward_pyramid(self, x: Images) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return two maps of the Base-Net and two of the Focus-Net, which end with the overview's channels."""
        levels, overview = self._base(x)
        levels = [*levels[:2], *self._focus(levels, overview)]
        if self.level_norms is None:
            return levels
        return [level if i == 1 else self.level_norms[i](level) for i, level in enumerate(levels)]

    def forward_with_auxiliary(self, x: Images) -> dict[str, Float[Tensor, "batch classes"]]:
        """Return logits of both classifiers, "main" and "aux", for a loss main + 0.4 aux.

        Raises:
            ValueError: if there is no auxiliary classifier.
        """
        if self.auxiliary is None:
            raise ValueError("this network has no auxiliary classifier: create it with auxiliary_head=True and classes")
        levels, overview = self._base(x)
        features = self.project(self._focus(levels, overview)[1])
        return {"main": self.forward_head(features), "aux": self.auxiliary(overview)}

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both classifiers with newly initialized ones; 0 removes them. The projection stays."""
        super().reset_classifier(num_classes)
        self.auxiliary = None
        if num_classes and self.config.auxiliary_head:
            self.auxiliary = AuxiliaryHead(self.config.embed_dims[3], num_classes).apply(init_weights)

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.projection_dim, num_classes, init_weights)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay: scales, if `decay_scales` is off."""
        if self.config.decay_scales:
            return set()
        return {f"{path}.weight" for path, module in self.named_modules() if isinstance(module, Affine)}

    def merged(self) -> OverLoCK:
        """Return the re-parameterized network, equal in eval mode, to deploy or to save in the published layout.

        Norms stay, as published; `gatewise.efficiency.fold` folds them as well.

        Raises:
            ValueError: if called in training mode, where batch norms use batch statistics.
        """
        new = deepcopy(self)
        for block in (block for stage in new.stages for block in stage.blocks):
            block.large = block.large.merged()
        for block in (block for stage in new.focus for block in stage.blocks):
            block.mixing.local = block.mixing.local.merged()
        new.config = replace(self.config, deploy=True)
        return new

    def _base(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the Base-Net's three maps, the second normed if levels are, and the Overview-Net's map."""
        self.check_input(x)
        x = self.stem(x)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage.downsample(x)
            x = self.run_blocks(stage.blocks.children(), x)
            if index == 1 and self.level_norms is not None:
                # As published; no other level's norm feeds the next stage.
                x = self.level_norms[1](x)
            maps.append(x)
        return maps[:3], maps[3]

    def _focus(self, levels: list[Tensor], overview: Tensor) -> list[Tensor]:
        """Return the maps of the Focus-Net's two stages, features and overview concatenated."""
        context = self.context(overview)
        enlarged = F.interpolate(context, levels[2].shape[2:], mode="bilinear", align_corners=False)
        z = torch.cat([levels[2], enlarged], dim=1)
        maps = []
        for stage, guide in zip(self.focus, (enlarged, context), strict=True):
            z = stage.downsample(z)
            for block in stage.blocks:
                z = self.run_block(partial(block, overview=guide), z)
            maps.append(z)
        return maps


_FILES = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_"


def _in1k(size: str, top1: str, crop_pct: float) -> Weights:
    score = f"{top1} % top-1, ImageNet-1K at 224 (model zoo)"
    return Weights(f"{_FILES}{size}_in1k_224.pth", "Apache-2.0", score, crop_pct)


def _config(
    depths: tuple[int, ...], focus_depths: tuple[int, ...], embed_dims: tuple[int, ...], heads: tuple[int, ...]
) -> OverLoCKConfig:
    return OverLoCKConfig(depths=depths, focus_depths=focus_depths, embed_dims=embed_dims, focus_num_heads=heads)


register(
    OverLoCK,
    paper="overlock",
    layouts=lambda config: [OFFICIAL],
    # A classification checkpoint fills all of a dense-prediction network except its level norms, and vice versa.
    fresh_with_head=("head.", "auxiliary.", "project.", "level_norms."),
    variants={
        "overlock_xt": Variant(
            _config((2, 2, 3, 2), (6, 2), (56, 112, 256, 336), (4, 6)), weights=_in1k("xt", "82.7", 0.925)
        ),
        "overlock_t": Variant(
            _config((4, 4, 6, 2), (12, 2), (64, 128, 256, 512), (4, 8)), weights=_in1k("t", "84.2", 0.95)
        ),
        "overlock_s": Variant(
            _config((6, 6, 8, 3), (16, 3), (64, 128, 320, 512), (8, 16)), weights=_in1k("s", "84.8", 0.95)
        ),
        "overlock_b": Variant(
            _config((8, 8, 10, 4), (20, 4), (80, 160, 384, 576), (6, 9)), weights=_in1k("b", "85.1", 0.975)
        ),
    },
)
