"""PfLayer, transformer forms: max pooling in place of every second self-attention.

In a vision transformer (ViT, or PiT with its three resolutions), every odd block expands its tokens, takes the maximum
over each token's 3x3 neighbors, and projects back. That costs more weights than attention, but no cost grows with the
square of the number of tokens.

Papers: Han et al., "Learning Features with Parameter-Free Layers", 2022, arXiv:2202.02777 (its residual networks are in
`resnet.py`); ViT of Dosovitskiy et al., 2020, arXiv:2010.11929, without a class token; PiT of Heo et al., 2021,
arXiv:2103.16302. Blocks, sizes and initial values follow the published code. That code reshapes tokens into a square
for any image. Here they stay maps, so that images need not be square, and positions adapt to their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.registry import Variant, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.positions import resize_positions, with_positions_resized
from gatewise.layers.self_attention import SelfAttention, TransformerBlock, head_dim
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork
from gatewise.networks.image.pflayer.keys import pit_layouts, vit_layouts
from gatewise.ops.spatial_pool import spatial_max_pool

LAYER_NORM_EPS = 1e-6
POOL_EXPANSION = 3
"""Width within a pooling mixer, relative to the block's: its weights then have the shape of attention's."""

Tokens = Float[Tensor, "batch height width channels"]


class PoolMixer(nn.Module):
    """Channels expanded, pooled over 3x3 positions and projected: (B, H, W, C) -> (B, H, W, C).

        W2 gelu(maxpool(gelu(W1 x)))

    GELU falls before it rises, so the activations on both sides of the pool are intended, and neither can be left out.
    """

    def __init__(self, dim: int, qkv_bias: bool = True, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, POOL_EXPANSION * dim, bias=qkv_bias)
        self.proj = nn.Linear(POOL_EXPANSION * dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tokens) -> Tokens:
        # The pool sees the tokens as a map with channels last in memory, so nothing is copied.
        pooled = spatial_max_pool(F.gelu(self.qkv(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.proj(F.gelu(pooled)))


MIXERS = ("max", "attention")
"""Mixers available for odd blocks."""


@dataclass(frozen=True)
class PfTransformerConfig(ImageConfig):
    """Configuration shared by both transformers.

    Args:
        image_size: size that positions are stored for, (height, width) or one number for both. Positions are resized
            for images of other sizes.
        patch_size: kernel size of the patch embedding.
        odd_mixer: mixer of every second block of a stage: "max", or "attention" for the plain transformer.
        qkv_bias: whether the first linear layer of either kind of mixer has biases.
        drop_rate: dropout rate after positions, mixers and both layers of the MLPs.
        attn_drop_rate: dropout rate of the attention weights.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    mlp_ratio: float = 4.0
    odd_mixer: str = "max"
    qkv_bias: bool = True
    attn_drop_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.odd_mixer not in MIXERS:
            raise ValueError(f"odd_mixer must be one of {', '.join(MIXERS)}, not {self.odd_mixer!r}")
        if not 0.0 <= self.attn_drop_rate < 1.0:
            raise ValueError(f"attn_drop_rate must be in [0, 1), not {self.attn_drop_rate}")
        if self.patch_size < 1 or self.patch_stride < 1:
            raise ValueError(f"patch size and stride must be positive, not {self.patch_size} and {self.patch_stride}")
        if min(self.image_sides) < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is smaller than a patch of {self.patch_size}")

    @property
    def patch_stride(self) -> int:
        """Stride between patches, in pixels."""
        return self.patch_size

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width that positions are stored for."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size."""
        height, width = ((side - self.patch_size) // self.patch_stride + 1 for side in self.image_sides)
        return height, width

    @property
    def levels(self) -> tuple[int, ...]:
        """Stages that the pyramid returns."""
        return (0,)

    def block(self, dim: int, num_heads: int, index: int, drop_path_rate: float) -> TransformerBlock:
        """Return block number `index` of a stage."""
        mixer: nn.Module
        if index % 2 and self.odd_mixer == "max":
            mixer = PoolMixer(dim, self.qkv_bias, self.drop_rate)
        else:
            mixer = SelfAttention(
                dim,
                num_heads,
                qkv_bias=self.qkv_bias,
                drop_rate=self.drop_rate,
                attn_drop_rate=self.attn_drop_rate,
            )
        return TransformerBlock(
            dim, mixer, mlp_ratio=self.mlp_ratio, drop_rate=self.drop_rate, drop_path_rate=drop_path_rate
        )


@dataclass(frozen=True)
class PfViTConfig(PfTransformerConfig):
    """Sizes and options of a ViT: `depth` blocks of width `embed_dim` at one resolution."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        head_dim(self.embed_dim, self.num_heads)
        if self.depth < 1:
            raise ValueError(f"depth must be positive, not {self.depth}")


@dataclass(frozen=True)
class PfPiTConfig(PfTransformerConfig):
    """Sizes and options of a PiT. `head_dims`, `depths` and `num_heads` have one entry per stage.

    Args:
        stride: stride between patches, in pixels; patches overlap if it is less than `patch_size`.
        head_dims: width of a head; a stage's width is the total of its heads.
        out_indices: stages that `forward_pyramid` returns; None for all.
    """

    stride: int = 8
    head_dims: tuple[int, ...] = (48, 48, 48)
    depths: tuple[int, ...] = (2, 6, 4)
    num_heads: tuple[int, ...] = (3, 6, 12)
    out_indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.depths)
        for name in ("head_dims", "num_heads"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} must have one entry per stage ({stages}), not {getattr(self, name)}")
        if min(self.depths) < 1:
            raise ValueError(f"every stage needs a block, depths cannot be {self.depths}")
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            head_dim(dim, heads)
        for before, dim in pairwise(self.embed_dims):
            if dim % before:
                raise ValueError(f"a stage must be a multiple of the one before in width, not {dim} after {before}")
        if not set(self.levels) <= set(range(stages)):
            raise ValueError(f"out_indices must be stages 0..{stages - 1}, not {self.out_indices}")

    @property
    def patch_stride(self) -> int:
        return self.stride

    @property
    def embed_dims(self) -> tuple[int, ...]:
        """Width of each stage."""
        return tuple(dim * heads for dim, heads in zip(self.head_dims, self.num_heads, strict=True))

    @property
    def levels(self) -> tuple[int, ...]:
        """Stages that the pyramid returns."""
        return self.out_indices if self.out_indices is not None else tuple(range(len(self.depths)))


class PatchEmbed(nn.Module):
    """Patches as tokens, with their positions: (B, C, height, width) -> (B, H, W, C').

    Positions are stored for one grid of patches and resized bicubically for other grids. Pixels at the right and bottom
    that do not fill a patch are dropped.
    """

    def __init__(self, config: PfTransformerConfig, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, dim, config.patch_size, config.patch_stride)
        self.positions = nn.Parameter(torch.zeros(1, *config.grid, dim))
        self.drop = nn.Dropout(config.drop_rate)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch h w dim"]:
        x = self.proj(x).permute(0, 2, 3, 1)
        return self.drop(x + resize_positions(self.positions, (x.shape[1], x.shape[2])).to(x.dtype))


class PfTransformer(ImageNetwork):
    """Patch embedding, stages of blocks, norm, mean over all tokens, linear classifier.

    Between stages a strided convolution halves the resolution and widens each channel separately.

    Args:
        dims: width of each stage.
        num_heads: number of heads of each stage.
        rates: stochastic depth rate of each block, per stage.
    """

    def __init__(
        self,
        config: PfTransformerConfig,
        dims: tuple[int, ...],
        num_heads: tuple[int, ...],
        rates: list[list[float]],
    ) -> None:
        super().__init__(config)
        self.dims = dims
        self.stem = PatchEmbed(config, dims[0])
        self.stages = nn.ModuleList(
            nn.Sequential(*(config.block(dim, heads, i, rate) for i, rate in enumerate(own)))
            for dim, heads, own in zip(dims, num_heads, rates, strict=True)
        )
        self.downsamples = nn.ModuleList(
            nn.Conv2d(before, dim, 3, stride=2, padding=1, groups=before) for before, dim in pairwise(dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=LAYER_NORM_EPS)
        self.head = self.make_head(config.num_classes)
        self.min_size = config.patch_size

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.dims[stage], self.config.patch_stride * 2**stage) for stage in self.config.levels]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last stage's normalized map. Right and bottom pixels that do not fill a patch are dropped."""
        return self._run_stages(x)[-1]

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return one map per level of `feature_info`: residual streams, normalized in the last stage."""
        maps = self._run_stages(x)
        return [maps[stage] for stage in self.config.levels]

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        self.check_input(x)
        x = self.stem(x)
        maps = []
        for index, stage in enumerate(self.stages):
            if index:
                x = self.downsamples[index - 1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = self.run_blocks(stage.children(), x)
            maps.append(x)
        maps[-1] = self.norm(x)
        return [one.permute(0, 3, 1, 2) for one in maps]

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.dims[-1], num_classes)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, as in the published recipe."""
        return {"stem.positions"}

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with positions resized to this network's grid."""
        return with_positions_resized(state, "stem.positions", self.config.grid)


class PfViT(PfTransformer):
    """ViT with one resolution throughout and a transformer's usual initialization."""

    def __init__(self, config: PfViTConfig) -> None:
        rates = drop_path_rates(config.drop_path_rate, (config.depth,))
        super().__init__(config, (config.embed_dim,), (config.num_heads,), rates)
        self.apply(init_linear)

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.dims[-1], num_classes, init_linear)


class PfPiT(PfTransformer):
    """PiT with three resolutions and PyTorch's default initialization, except for positions."""

    def __init__(self, config: PfPiTConfig) -> None:
        blocks = sum(config.depths)
        # Linear up to a virtual extra block: block i of n has i / n of the rate.
        rates = drop_path_rates(config.drop_path_rate * (blocks - 1) / blocks, config.depths)
        super().__init__(config, config.embed_dims, config.num_heads, rates)


def _vit(embed_dim: int, num_heads: int, odd_mixer: str = "max") -> Variant:
    return Variant(PfViTConfig(embed_dim=embed_dim, num_heads=num_heads, odd_mixer=odd_mixer))


def _pit(head_dim: int, num_heads: tuple[int, ...], **fields: Any) -> Variant:
    return Variant(PfPiTConfig(head_dims=(head_dim,) * 3, num_heads=num_heads, **fields))


register(
    PfViT,
    paper="pflayer",
    layouts=vit_layouts,
    variants={
        "vit_ti_max": _vit(192, 3),
        "vit_s_max": _vit(384, 6),
        "vit_b_max": _vit(768, 12),
        # The paper's baseline: attention in every block.
        "vit_s_attention": _vit(384, 6, "attention"),
    },
)

register(
    PfPiT,
    paper="pflayer",
    layouts=pit_layouts,
    variants={
        "pit_ti_max": _pit(32, (2, 4, 8)),
        "pit_s_max": _pit(48, (3, 6, 12)),
        "pit_b_max": _pit(64, (4, 8, 16), depths=(3, 6, 4), patch_size=14, stride=7),
        "pit_s_attention": _pit(48, (3, 6, 12), odd_mixer="attention"),
    },
)
