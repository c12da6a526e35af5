"""UniRepLKNet: few but very large kernels, trained with the help of small dilated ones.

A network needs large kernels to see far and small ones to go deep, but it does not need both in every block. 13x13
depthwise kernels are trained with parallel dilated branches that merge into them exactly. 3x3 kernels add depth between
them, and squeeze-excitation and response normalization let the channels of a block interact.

Papers: Ding et al., "UniRepLKNet", 2023, arXiv:2311.15599, and "Scaling Up Your Kernels: Large Kernel Design in
ConvNets towards Universal Representations", 2024, arXiv:2410.08049. Parameters and FLOPs are published for the merged
form; checkpoints hold the training form.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.dilated_reparam import DilatedReparam, reparam_rules
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import fold_into_previous, scale_outputs
from gatewise.layers.grn import GlobalResponseNorm
from gatewise.layers.init_weights import init_weights
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork

Kernels = tuple[tuple[int, ...], ...]

BRANCHES = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
"""Large kernel -> (kernel, dilation) of its branches. arXiv:2311.15599, table of section 3.1, and published code."""

SMALL_KERNELS = (3, 5)
"""Kernel sizes of blocks with one plain convolution, although the table has branches for 5."""

SCHEDULES: dict[tuple[int, ...], Kernels] = {
    (2, 2, 6, 2): ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    (2, 2, 8, 2): ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    (3, 3, 18, 3): ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3),
    (3, 3, 27, 3): ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (13,) * 3),
}
"""Depths -> kernel size of each block, for the published sizes."""


@dataclass(frozen=True)
class UniRepLKNetConfig(ImageConfig):
    """Sizes and options of a UniRepLKNet.

    Args:
        kernel_sizes: kernel size of each block, by stage. 0 is for no convolution over positions, 3 and 5 for a plain
            one, 7 to 17 for a large kernel with branches. None uses the published schedule for these depths.
        layer_scale_init: initial scale of the residual branches; None disables layer scale.
        head_init_scale: factor on the classifier's initial weights (0.001 for fine-tuning from ImageNet-22K).
        deploy: whether to build the merged form, as in the result of `merged()`, without branches, batch norms or
            scales.
        out_indices: stages that `forward_pyramid` returns.
        pyramid_norm: whether returned stages have norms instead of a final norm and head (the dense-prediction form).
    """

    depths: tuple[int, ...] = (3, 3, 27, 3)
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_sizes: Kernels | None = None
    mlp_ratio: int = 4
    layer_scale_init: float | None = 1e-6
    head_init_scale: float = 1.0
    deploy: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    pyramid_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        if self.drop_rate:
            raise ValueError(f"UniRepLKNet has no dropout: drop_rate must be 0, not {self.drop_rate}")
        if len(self.embed_dims) != stages:
            raise ValueError(f"embed_dims must have one entry per stage ({stages}), not {self.embed_dims}")
        if self.embed_dims[0] % 2:
            raise ValueError(f"the stem halves the first width, which must be even, not {self.embed_dims[0]}")
        for dim in self.embed_dims:
            check_width(dim)
        lengths = tuple(len(kernels) for kernels in self.kernels)
        if lengths != self.depths:
            raise ValueError(
                f"kernel_sizes must have one entry per block, {self.depths}, not {lengths}: {self.kernels}"
            )
        for kernel_size in {size for kernels in self.kernels for size in kernels}:
            check_kernel(kernel_size)
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")
        if self.pyramid_norm and self.num_classes:
            raise ValueError("the dense-prediction form (pyramid_norm) has no classifier: pass num_classes=0 with it")

    @property
    def kernels(self) -> Kernels:
        """Kernel size of each block, by stage."""
        if self.kernel_sizes is not None:
            return self.kernel_sizes
        if self.depths not in SCHEDULES:
            known = ", ".join(map(str, SCHEDULES))
            raise ValueError(
                f"depths {self.depths} have no published kernel schedule (those with one: {known}), and kernel_sizes "
                "is None: pass one kernel size per block and stage"
            )
        return SCHEDULES[self.depths]

    @property
    def patch_size(self) -> int:
        """Stride of the stem."""
        return 4


def check_width(dim: int) -> None:
    if dim < 4 or dim % 4:
        raise ValueError(f"widths must be multiples of 4 (the squeeze-excitation takes a quarter), not {dim}")


def check_kernel(kernel_size: int) -> None:
    legal = (0, *SMALL_KERNELS, *(size for size in BRANCHES if size not in SMALL_KERNELS))
    if kernel_size not in legal:
        raise ValueError(f"kernel sizes must be of {', '.join(map(str, legal))}, not {kernel_size}")


def depthwise(dim: int, kernel_size: int, deploy: bool) -> nn.Module:
    """Return the layer that mixes positions in a block."""
    check_kernel(kernel_size)
    if kernel_size == 0:
        return nn.Identity()
    if kernel_size in SMALL_KERNELS:
        return DepthwiseConv2d(dim, kernel_size, bias=deploy)
    return DilatedReparam(dim, kernel_size, BRANCHES, deploy)


class UniRepLKNetBlock(nn.Module):
    """Spatial mixing, gated channels and a normalized MLP in one residual branch: (B, C, H, W) -> (B, C, H, W).

        y = scale * BN(W2 GRN(gelu(W1 SE(BN(depthwise(x)))))),   x + y

    The merged form has a depthwise convolution with bias, no norms, no scale, and the bias of GRN folded into W2.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        drop_path_rate: float = 0.0,
        mlp_ratio: int = 4,
        layer_scale_init: float | None = 1e-6,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        check_width(dim)
        hidden = mlp_ratio * dim
        self.depthwise = depthwise(dim, kernel_size, deploy)
        self.norm = nn.Identity() if deploy or kernel_size == 0 else nn.BatchNorm2d(dim)
        self.se = SqueezeExcite(dim, dim // 4)
        self.expand = nn.Linear(dim, hidden)
        self.grn = GlobalResponseNorm(hidden, channels="last")
        self.project = nn.Linear(hidden, dim, bias=deploy)
        self.project_norm = nn.Identity() if deploy else nn.BatchNorm2d(dim)
        self.scale = None
        if deploy:
            self.grn.bias = None
        elif layer_scale_init is not None:
            self.scale = nn.Parameter(torch.full((dim,), layer_scale_init))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        y = self.se(self.norm(self.depthwise(x)))
        y = self.grn(F.gelu(self.expand(y.permute(0, 2, 3, 1))))
        y = self.project_norm(self.project(y).permute(0, 3, 1, 2))
        if self.scale is not None:
            y = y * self.scale[:, None, None]
        return x + self.drop_path(y)

    def merged(self) -> UniRepLKNetBlock:
        """Return the merged form, equal in eval mode, or a copy if it is already merged.

        It is computed in float64 and rounded once, to the dtype of the weights.

        Raises:
            ValueError: if called in training mode, where batch norms use batch statistics.
        """
        if self.training:
            raise ValueError("blocks can only be merged in eval mode, where norms are fixed: call .eval() first")
        dtype = self.project.weight.dtype
        new = deepcopy(self).double()
        if isinstance(new.depthwise, DilatedReparam):
            new.depthwise = new.depthwise.merged()
        if isinstance(new.norm, nn.BatchNorm2d):
            fold_into_previous(_convolution(new.depthwise), new.norm)
            new.norm = nn.Identity()
        if new.grn.bias is not None:
            _move_bias(new.grn, new.project)
        if isinstance(new.project_norm, nn.BatchNorm2d):
            fold_into_previous(new.project, new.project_norm)
            new.project_norm = nn.Identity()
        if new.scale is not None:
            scale_outputs(new.project, new.scale)
            new.scale = None
        return new.to(dtype)


def _convolution(depthwise: nn.Module) -> nn.Conv2d:
    """Return the single convolution that mixes positions in a merged block."""
    convolution = depthwise.large if isinstance(depthwise, DilatedReparam) else depthwise
    if not isinstance(convolution, nn.Conv2d):
        raise TypeError(f"a norm folds into a convolution, not into {type(convolution).__name__}")
    return convolution


@torch.no_grad()
def _move_bias(grn: GlobalResponseNorm, layer: nn.Linear) -> None:
    """Fold the preceding bias of `grn` into `layer`."""
    if grn.bias is None:
        return
    shift = layer.weight @ grn.bias.flatten()
    layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift, layer.weight.requires_grad)
    grn.bias = None


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2 with norms and a GELU between them: (B, C, H, W) -> (B, C', H / 4, W / 4)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim // 2, 3, stride=2, padding=1)
        self.norm1 = LayerNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm2 = LayerNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """3x3 convolution of stride 2 and norm: (B, C, H, W) -> (B, C', H / 2, W / 2), sizes rounded up."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = LayerNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.norm(self.conv(x))


class UniRepLKNet(StagedNetwork):
    """Stem, stages of blocks, global pooling, norm, linear classifier. Takes any size; strides round up."""

    def __init__(self, config: UniRepLKNetConfig) -> None:
        super().__init__(config)
        dims = config.embed_dims
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stem = Stem(config.in_chans, dims[0])
        self.stages = nn.ModuleList(
            Stage(
                Downsample(dims[i - 1], dims[i]) if i else nn.Identity(),
                [
                    UniRepLKNetBlock(
                        dims[i], kernel_size, rate, config.mlp_ratio, config.layer_scale_init, config.deploy
                    )
                    for kernel_size, rate in zip(config.kernels[i], rates[i], strict=True)
                ],
            )
            for i in range(len(dims))
        )
        normed_levels = config.out_indices if config.pyramid_norm else ()
        self.level_norms = nn.ModuleDict({str(i): LayerNorm2d(dims[i]) for i in normed_levels})
        self.norm = nn.Identity() if config.pyramid_norm else nn.LayerNorm(dims[-1], eps=1e-6)
        self.apply(init_weights)
        self.head = self.make_head(config.num_classes)

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's map before pooling and norm, at 1 / 32 of the image size, rounded up."""
        return self._run_stages(x)[-1]

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.norm(super().pool_features(features))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, init_weights, self.config.head_init_scale)

    def merged(self) -> UniRepLKNet:
        """Return the merged form, equal in eval mode, to deploy or to save in the published layout.

        Raises:
            ValueError: if called in training mode, where batch norms use batch statistics.
        """
        new = deepcopy(self)
        for stage in new.stages:
            stage.blocks = nn.ModuleList(block.merged() for block in stage.blocks)
        new.config = replace(self.config, deploy=True)
        return new


# Covers both the training and the merged form: parts that a form lacks have no keys.
OFFICIAL = KeyLayout(
    "official",
    (
        ("^downsample_layers.0.0", "stem.conv1"),
        ("^downsample_layers.0.1", "stem.norm1"),
        ("^downsample_layers.0.3", "stem.conv2"),
        ("^downsample_layers.0.4", "stem.norm2"),
        ("^downsample_layers.{i}.0", "stages.{i}.downsample.conv"),
        ("^downsample_layers.{i}.1", "stages.{i}.downsample.norm"),
        ("^norm{i}", "level_norms.{i}"),
        ("^stages.{i}.{j}", "stages.{i}.blocks.{j}"),
        ("blocks.{j}.dwconv", "blocks.{j}.depthwise"),
        *reparam_rules("depthwise"),
        ("blocks.{j}.se.down", "blocks.{j}.se.reduce"),
        ("blocks.{j}.se.up", "blocks.{j}.se.expand"),
        ("blocks.{j}.pwconv1.1", "blocks.{j}.expand"),
        ("blocks.{j}.act.1.gamma", "blocks.{j}.grn.weight"),
        ("blocks.{j}.act.1.beta", "blocks.{j}.grn.bias"),
        ("blocks.{j}.pwconv2.0", "blocks.{j}.project"),
        ("blocks.{j}.pwconv2.2", "blocks.{j}.project_norm"),
        ("blocks.{j}.gamma", "blocks.{j}.scale"),
    ),
)


_FILES = "https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_"


def _in1k(letter: str, top1: str, file_score: str) -> Weights:
    score = f"{top1} % top-1, ImageNet-1K at 224 (model zoo)"
    return Weights(f"{_FILES}{letter}_in1k_224_acc{file_score}.pth", "Apache-2.0", score)


def _in22k(letter: str) -> Weights:
    score = "pre-trained on ImageNet-22K"
    return Weights(f"{_FILES}{letter}_in22k_pretrain.pth", "Apache-2.0", score, num_classes=21841)


def _fine_tuned(letter: str, top1: str, file_score: str) -> Weights:
    score = f"{top1} % top-1, ImageNet-1K at 384 after ImageNet-22K (model zoo)"
    return Weights(f"{_FILES}{letter}_in22k_to_in1k_384_acc{file_score}.pth", "Apache-2.0", score, crop_pct=1.0)


def _config(depths: tuple[int, ...], width: int) -> UniRepLKNetConfig:
    return UniRepLKNetConfig(depths=depths, embed_dims=(width, 2 * width, 4 * width, 8 * width))


_A, _F, _P = (_config((2, 2, 6, 2), width) for width in (40, 48, 64))
_N = _config((2, 2, 8, 2), 80)
_T = _config((3, 3, 18, 3), 80)
_S, _B, _L, _XL = (_config((3, 3, 27, 3), width) for width in (96, 128, 192, 256))

register(
    UniRepLKNet,
    paper="unireplknet",
    layouts=lambda config: [OFFICIAL],
    # A classification checkpoint fills all of a dense-prediction network except its level norms, and vice versa.
    fresh_with_head=("head.", "norm.", "level_norms."),
    variants={
        "unireplknet_a": Variant(_A, weights=_in1k("a", "77.0", "77.03")),
        "unireplknet_f": Variant(_F, weights=_in1k("f", "78.6", "78.58")),
        "unireplknet_p": Variant(_P, weights=_in1k("p", "80.2", "80.23")),
        "unireplknet_n": Variant(_N, weights=_in1k("n", "81.6", "81.64")),
        "unireplknet_t": Variant(_T, weights=_in1k("t", "83.2", "83.21")),
        "unireplknet_s": Variant(_S, weights=_in1k("s", "83.9", "83.91")),
        # L and XL are pre-trained at 192 pixels; the table states the cost of all sizes at 224.
        "unireplknet_b": Variant(_B, weights=_in22k("b")),
        "unireplknet_l": Variant(_L, weights=_in22k("l")),
        "unireplknet_xl": Variant(_XL, weights=_in22k("xl")),
        "unireplknet_s_in22k": Variant(_S, weights=_in22k("s")),
        "unireplknet_s_384": Variant(_S, (3, 384, 384), _fine_tuned("s", "86.4", "86.44")),
        "unireplknet_b_384": Variant(_B, (3, 384, 384), _fine_tuned("b", "87.4", "87.40")),
        "unireplknet_l_384": Variant(_L, (3, 384, 384), _fine_tuned("l", "87.9", "87.88")),
        "unireplknet_xl_384": Variant(_XL, (3, 384, 384), _fine_tuned("xl", "88.0", "87.96")),
    },
)
