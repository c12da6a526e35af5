"""HorNet: high-order spatial interactions through recursive gated convolutions.

Self-attention multiplies what positions hold: a content-dependent interaction of the second order. gnConv also
multiplies, but to any order. One large depthwise convolution or global filter computes gates from the surroundings.
These gates are multiplied in one after the other, along a chain of 1x1 convolutions of doubling width. The chain costs
little more than its last step. The rest of the network is a ConvNeXt.

Paper: Rao et al., "HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions", 2022,
arXiv:2207.14284. As in the published code, the scale acts on the gates of every order. The isotropic form is described
in the paper but not in its code. Here its sizes follow DeiT-S, and no weights are published for it.

With global filters (the GF variants), the later stages see the whole map through a learned spectrum, which is stored
for one image size. Other sizes run with an interpolated spectrum, which is close to, but not equal to, the trained
function.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout, Rule
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import scale_outputs
from gatewise.layers.gnconv import GnConv, Grid, check_gnconv
from gatewise.layers.linear_head import linear_head
from gatewise.layers.mlp import Mlp
from gatewise.layers.norm import LayerNorm2d
from gatewise.networks.image._base import ImageConfig
from gatewise.networks.image.skeletons.staged import Stage, StagedNetwork
from gatewise.ops.global_filter import resize_spectrum

Grids = tuple[Grid | None, ...]

NORM_EPS = 1e-6


@dataclass(frozen=True)
class HorNetConfig(ImageConfig):
    """Sizes and options of a HorNet. `depths`, `embed_dims`, `orders` and `grids` have one entry per stage.

    Args:
        patch_size: kernel size and stride of the stem.
        orders: orders of the interactions.
        gate_scale: factor on the gates of every order, for all stages or one per stage.
        kernel_size: kernel size of the depthwise convolutions that compute the gates.
        grids: rows and columns of the spectrum of a stage's global filters, (H, W // 2 + 1) for maps of H x W. None,
            for one stage or for all, uses a depthwise convolution instead.
        layer_scale_init: initial scale of the residual branches; None disables layer scale.
        head_init_scale: factor on the classifier's initial weights.
        uniform_init: whether initial weights are Glorot-uniform instead of normal with standard deviation 0.02.
        out_indices: stages that `forward_pyramid` returns.
        pyramid_norm: whether returned stages have norms instead of a final norm and head (the dense-prediction form).
    """

    patch_size: int = 4
    depths: tuple[int, ...] = (2, 3, 18, 2)
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    orders: tuple[int, ...] = (2, 3, 4, 5)
    gate_scale: float | tuple[float, ...] = 1 / 3
    kernel_size: int = 7
    grids: Grids | None = None
    mlp_ratio: int = 4
    layer_scale_init: float | None = 1e-6
    head_init_scale: float = 1.0
    uniform_init: bool = False
    out_indices: tuple[int, ...] = (0, 1, 2, 3)
    pyramid_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        if self.drop_rate:
            raise ValueError(f"HorNet has no dropout: drop_rate must be 0, not {self.drop_rate}")
        for name in ("embed_dims", "orders", "grids", "gate_scale"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {value}")
        for stage in range(stages):
            check_gnconv(self.embed_dims[stage], self.orders[stage], self.grid(stage) is not None)
        if not set(self.out_indices) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")
        if self.pyramid_norm and self.num_classes:
            raise ValueError("the dense-prediction form (pyramid_norm) has no classifier: pass num_classes=0 with it")

    def grid(self, stage: int) -> Grid | None:
        """Return the size of the spectrum of a stage's global filters, or None if it has convolutions."""
        return None if self.grids is None else self.grids[stage]

    def scale(self, stage: int) -> float:
        """Return the factor on the gates of a stage."""
        return self.gate_scale[stage] if isinstance(self.gate_scale, tuple) else self.gate_scale


class HorNetBlock(nn.Module):
    """gnConv and an MLP, each in a residual branch: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, config: HorNetConfig, stage: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        dim = config.embed_dims[stage]
        self.norm1 = LayerNorm2d(dim, NORM_EPS)
        self.gnconv = GnConv(
            dim,
            config.orders[stage],
            scale=config.scale(stage),
            kernel_size=config.kernel_size,
            grid=config.grid(stage),
        )
        self.norm2 = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = Mlp(dim, config.mlp_ratio * dim)
        self.drop_path = DropPath(drop_path_rate)
        self.scale1 = self.scale2 = None
        if config.layer_scale_init is not None:
            self.scale1 = nn.Parameter(torch.full((dim,), config.layer_scale_init))
            self.scale2 = nn.Parameter(torch.full((dim,), config.layer_scale_init))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        branch = self.gnconv(self.norm1(x))
        if self.scale1 is not None:
            branch = branch * self.scale1[:, None, None]
        x = (x + self.drop_path(branch)).permute(0, 2, 3, 1)
        branch = self.mlp(self.norm2(x))
        if self.scale2 is not None:
            branch = branch * self.scale2
        return (x + self.drop_path(branch)).permute(0, 3, 1, 2)

    def merged(self) -> HorNetBlock:
        """Return the same block with layer scales folded into each branch's last layer, and with gnConv merged."""
        new = deepcopy(self)
        new.gnconv = self.gnconv.merged()
        if self.scale1 is not None and self.scale2 is not None:
            scale_outputs(new.gnconv.project_out, self.scale1)
            scale_outputs(new.mlp.fc2, self.scale2)
            new.scale1 = new.scale2 = None
        return new


class Stem(nn.Module):
    """Patch convolution and norm: (B, C, H, W) -> (B, C', H // patch, W // patch)."""

    def __init__(self, in_dim: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, patch_size, stride=patch_size)
        self.norm = LayerNorm2d(dim, NORM_EPS)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.norm(self.conv(x))


class Downsample(nn.Module):
    """Norm and 2x2 convolution of stride 2: (B, C, H, W) -> (B, C', H // 2, W // 2)."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_dim, NORM_EPS)
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.conv(self.norm(x))


class HorNet(StagedNetwork):
    """Four stages of gnConv blocks (one in the isotropic form), global pooling, norm, linear classifier."""

    def __init__(self, config: HorNetConfig) -> None:
        super().__init__(config)
        dims = config.embed_dims
        rates = drop_path_rates(config.drop_path_rate, config.depths)
        self.stem = Stem(config.in_chans, dims[0], config.patch_size)
        self.stages = nn.ModuleList(
            Stage(
                Downsample(dims[i - 1], dims[i]) if i else nn.Identity(),
                [HorNetBlock(config, i, rate) for rate in rates[i]],
            )
            for i in range(len(dims))
        )
        normed_levels = config.out_indices if config.pyramid_norm else ()
        self.level_norms = nn.ModuleDict({str(i): LayerNorm2d(dims[i], NORM_EPS) for i in normed_levels})
        self.norm = nn.Identity() if config.pyramid_norm else nn.LayerNorm(dims[-1], NORM_EPS)
        self.min_size = config.patch_size * 2 ** (len(dims) - 1)
        self._init_weights(self)
        self.head = self.make_head(config.num_classes)

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        return self.norm(super().pool_features(features))

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dims[-1], num_classes, self._init_weights, self.config.head_init_scale)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with spectra resized to this network's grids.

        Resizing them once gives the same result as resizing them in every pass.
        """
        wanted = self.state_dict()
        adapted = dict(state)
        for key, tensor in state.items():
            if key.endswith(".spectrum") and key in wanted:
                rows, columns = wanted[key].shape[1:3]
                adapted[key] = resize_spectrum(tensor, rows, 2 * (columns - 1))
        return adapted

    def _init_weights(self, root: nn.Module) -> None:
        for module in root.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if self.config.uniform_init:
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


GNCONV_RULES: tuple[Rule, ...] = (
    ("proj_in", "project_in"),
    ("proj_out", "project_out"),
    ("pws.{m}", "widen.{m}"),
    ("dwconv", "spatial"),
    ("spatial.dw", "spatial.local"),
    ("spatial.complex_weight", "spatial.spectrum"),
)

OFFICIAL = KeyLayout(
    "official",
    (
        ("^downsample_layers.0", "stem"),
        ("^stem.0", "stem.conv"),
        ("^stem.1", "stem.norm"),
        ("^downsample_layers.{i}", "stages.{i}.downsample"),
        ("downsample.0", "downsample.norm"),
        ("downsample.1", "downsample.conv"),
        ("^norm{i}", "level_norms.{i}"),
        ("^stages.{i}.{j}", "stages.{i}.blocks.{j}"),
        ("blocks.{j}.gamma{k}", "blocks.{j}.scale{k}"),
        ("blocks.{j}.pwconv{k}", "blocks.{j}.mlp.fc{k}"),
        *GNCONV_RULES,
    ),
)
"""Layout for both classification and dense prediction."""


def _grids(pixels: int) -> Grids:
    """Return grids with spectra in stages 2 and 3 for square images with sides of `pixels`."""
    return None, None, *((side, side // 2 + 1) for side in (pixels // 16, pixels // 32))


def _in1k(name: str, width: int, top1: str | None = None, pixels: int = 224, **fields: Any) -> Variant:
    weights = None if top1 is None else _weights(name, f"{top1} % top-1, ImageNet-1K at {pixels} (model zoo)", pixels)
    return Variant(_config(width, **fields), (3, pixels, pixels), weights)


def _in22k(name: str, pixels: int = 224, **fields: Any) -> Variant:
    # The published sizes fit a head of 10,450 classes: the processed release of ImageNet-21K.
    weights = replace(_weights(name, "pre-trained on ImageNet-22K", pixels), num_classes=10450)
    return Variant(_config(192, **fields), (3, pixels, pixels), weights)


def _weights(name: str, score: str, pixels: int) -> Weights:
    # The files are behind cloud-drive share links, which come and go. Download them manually into the working folder,
    # where they are looked up.
    return Weights(f"{name}.pth", "MIT", score, crop_pct=1.0 if pixels >= 384 else 0.875)


def _config(width: int, **fields: Any) -> HorNetConfig:
    return HorNetConfig(embed_dims=(width, 2 * width, 4 * width, 8 * width), **fields)


def _iso(**fields: Any) -> Variant:
    shape: dict[str, Any] = {"patch_size": 16, "depths": (12,), "embed_dims": (384,), "orders": (4,)}
    return Variant(HorNetConfig(out_indices=(0,), **shape, **fields))


GF_224, GF_384 = _grids(224), _grids(384)

register(
    HorNet,
    paper="hornet",
    layouts=lambda config: [OFFICIAL],
    # A classification checkpoint fills all of a dense-prediction network except its level norms, and vice versa.
    fresh_with_head=("head.", "norm.", "level_norms."),
    variants={
        "hornet_tiny_7x7": _in1k("hornet_tiny_7x7", 64, "82.8"),
        "hornet_tiny_gf": _in1k("hornet_tiny_gf", 64, "83.0", grids=GF_224),
        "hornet_small_7x7": _in1k("hornet_small_7x7", 96, "83.8"),
        "hornet_small_gf": _in1k("hornet_small_gf", 96, "84.0", grids=GF_224),
        "hornet_base_7x7": _in1k("hornet_base_7x7", 128, "84.2"),
        "hornet_base_gf": _in1k("hornet_base_gf", 128, "84.3", grids=GF_224),
        "hornet_base_gf_img384": _in1k("hornet_base_gf_img384", 128, pixels=384, grids=GF_384),
        "hornet_large_7x7": _in22k("hornet_large_7x7"),
        "hornet_large_gf": _in22k("hornet_large_gf", grids=GF_224),
        "hornet_large_gf_img384": _in22k("hornet_large_gf_img384", 384, grids=GF_384),
        "hornet_small_iso_7x7": _iso(),
        "hornet_small_iso_gf": _iso(grids=((14, 8),)),
    },
)
