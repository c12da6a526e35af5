"""DeiT: the baseline vision transformer of ViG, with softmax attention among all patches and a class token.

Paper: Touvron et al., "Training Data-Efficient Image Transformers & Distillation through Attention", 2020,
arXiv:2012.12877, without the distillation token. Published networks take images of one size; here any grid of whole
patches works, because positions are resized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.positions import resize_positions, row_to_grid
from gatewise.layers.self_attention import SelfAttention, TransformerBlock
from gatewise.networks.image.skeletons.class_token import ClassTokenConfig, ClassTokenNetwork


@dataclass(frozen=True)
class DeitConfig(ClassTokenConfig):
    """Sizes of a DeiT."""


class Deit(ClassTokenNetwork):
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
        self.apply(init_linear)
        for table in (self.cls_token, self.cls_position, self.positions):
            nn.init.trunc_normal_(table, std=0.02)
        self.head = self.make_head(config.num_classes)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        self.check_input(x)
        patches = self.stem(x).permute(0, 2, 3, 1)
        grid = (patches.shape[1], patches.shape[2])
        patches = patches + resize_positions(self.positions, grid).to(patches.dtype)
        first = (self.cls_token + self.cls_position).expand(x.shape[0], -1, -1).to(patches.dtype)
        x = self.drop(torch.cat([first, patches.flatten(1, 2)], dim=1))
        x = self.run_blocks(self.blocks, x)
        return self.norm(x), grid

    def no_weight_decay(self) -> set[str]:
        """Return the names of the positions and the class token."""
        return {"positions", "cls_position", "cls_token"}


def layouts(config: DeitConfig) -> list[KeyLayout]:
    """Return the official layout, which timm shares: positions are a sequence, starting with the class token's."""

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


def _variant(size: str, embed_dim: int, num_heads: int, score: str) -> Variant:
    weights = Weights(
        f"timm/deit_{size}_patch16_224.fb_in1k", "Apache-2.0", f"{score} % top-1, ImageNet-1K at 224 (recalled)"
    )
    return Variant(DeitConfig(embed_dim=embed_dim, num_heads=num_heads), weights=weights)


register(
    Deit,
    paper="vig",
    layouts=layouts,
    variants={
        "deit_tiny": _variant("tiny", 192, 3, "72.2"),
        "deit_small": _variant("small", 384, 6, "79.8"),
        "deit_base": _variant("base", 768, 12, "81.8"),
    },
)
