"""DeiT: the vision transformer that ViG is compared with, softmax attention among all patches and a class token.

Paper: Touvron et al., "Training Data-Efficient Image Transformers & Distillation through Attention", 2020,
arXiv:2012.12877, without the distillation token. Published networks take images of one size; here any grid of whole
patches will do, positions being resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.reference import Case
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.positions import resize_positions, row_to_grid
from gatewise.layers.self_attention import SelfAttention, TransformerBlock, head_dim
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork


@dataclass(frozen=True)
class DeitConfig(ImageConfig):
    """Sizes of a DeiT.

    Args:
        image_size: that positions are laid out for, (height, width) or one number for both.
        drop_rate: behind positions, mixers and both layers of the perceptrons.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        head_dim(self.embed_dim, self.num_heads)
        if self.depth < 1 or self.patch_size < 1:
            raise ValueError(f"depth and patch_size must be positive, not {self.depth} and {self.patch_size}")
        if any(side < self.patch_size or side % self.patch_size for side in self.image_sides):
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch size {self.patch_size}")

    @property
    def image_sides(self) -> tuple[int, int]:
        """Height and width that positions are laid out for."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of such an image."""
        return self.image_sides[0] // self.patch_size, self.image_sides[1] // self.patch_size


class Deit(ImageNetwork):
    """Class token and patches with positions, blocks of self-attention, norm, linear classifier of the class token."""

    def __init__(self, config: DeitConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.min_size = config.patch_size
        self.stem = nn.Conv2d(config.in_chans, dim, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.cls_position = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, *config.grid, dim))
        self.drop = nn.Dropout(config.drop_rate)
        (rates,) = drop_path_rates(config.drop_path_rate, (config.depth,))
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                SelfAttention(dim, config.num_heads, drop_rate=config.drop_rate),
                mlp_ratio=config.mlp_ratio,
                drop_rate=config.drop_rate,
                drop_path_rate=rate,
                norm_eps=config.norm_eps,
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.head: nn.Module = nn.Identity()
        self.apply(init_linear)
        for table in (self.cls_token, self.cls_position, self.positions):
            nn.init.trunc_normal_(table, std=0.02)
        self.reset_classifier(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dim, self.config.patch_size)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """All normalised tokens in one column, the class token first, then patches row by row: (B, C, 1 + N, 1)."""
        tokens, _ = self._tokens(x)
        return tokens.transpose(1, 2)[..., None]

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        return self.head(features[:, :, 0, 0])

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """A single level: the normalised patches as a map."""
        tokens, grid = self._tokens(x)
        return [tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)]

    def _tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        self.check_input(x)
        patches = self.stem(x).permute(0, 2, 3, 1)
        grid = (patches.shape[1], patches.shape[2])
        patches = patches + resize_positions(self.positions, grid).to(patches.dtype)
        first = (self.cls_token + self.cls_position).expand(x.shape[0], -1, -1).to(patches.dtype)
        x = self.drop(torch.cat([first, patches.flatten(1, 2)], dim=1))
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.norm(x), grid

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        patch = self.config.patch_size
        for name, size in zip(("height", "width"), x.shape[2:], strict=True):
            if size % patch:
                raise ValueError(f"{name} {size} is not a multiple of patch size {patch}")

    def reset_classifier(self, num_classes: int) -> None:
        self._with_classes(num_classes)
        self.head = nn.Linear(self.config.embed_dim, num_classes) if num_classes else nn.Identity()
        init_linear(self.head)

    def no_weight_decay(self) -> set[str]:
        """Positions and class token."""
        return {"positions", "cls_position", "cls_token"}

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors, under our names, with its positions resized for this network's grid."""
        key = "positions"
        return {**state, key: resize_positions(state[key], self.config.grid)} if key in state else dict(state)


def layouts(config: DeitConfig) -> list[KeyLayout]:
    """The official layout, which timm's is too: positions are one row of tokens, the class token's the first."""

    def unpack(state: dict[str, Tensor]) -> dict[str, Tensor]:
        if "positions" not in state:
            return state
        first, patches = state["positions"].split([1, state["positions"].shape[1] - 1], dim=1)
        return {**state, "cls_position": first, "positions": row_to_grid(patches, config.grid)}

    def pack(state: dict[str, Tensor]) -> dict[str, Tensor]:
        joined = torch.cat([state["cls_position"], state["positions"].flatten(1, 2)], dim=1)
        return {key: tensor for key, tensor in state.items() if key != "cls_position"} | {"positions": joined}

    rules = (("^pos_embed", "positions"), ("^patch_embed.proj", "stem"), ("attn", "mixer"))
    return [KeyLayout("official", rules, unpack=unpack, pack=pack)]


def reference_case(record: Mapping[str, Any]) -> Case | None:
    """There are no digests of this network: it is compared with timm's in the tests."""
    return None


def _variant(size: str, embed_dim: int, num_heads: int, score: str) -> Variant:
    weights = Weights(
        f"timm/deit_{size}_patch16_224.fb_in1k", "Apache-2.0", f"{score} % top-1, ImageNet-1K at 224 (recalled)"
    )
    return Variant(DeitConfig(embed_dim=embed_dim, num_heads=num_heads), weights=weights)


register(
    Deit,
    paper="vig",
    layouts=layouts,
    reference_case=reference_case,
    reference_system="deit",
    variants={
        "deit_tiny": _variant("tiny", 192, 3, "72.2"),
        "deit_small": _variant("small", 384, 6, "79.8"),
        "deit_base": _variant("base", 768, 12, "81.8"),
    },
)
