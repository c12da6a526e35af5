"""ViG: images read as sequences from both ends, by a memory that each position's gates decay.

Bidirectional gated linear attention replaces self-attention: every position reads the whole image, at a cost that grows
linearly with the number of pixels. A depthwise convolution before it sees neighbors in the map, including those that
are rows apart in the sequence. A gate per channel and position blends its output with the memory's. The blocks are in
`blocks.py`. This file has the plain form, with one resolution throughout; `hierarchical.py` has four.

Paper: Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention", 2024,
arXiv:2405.18425. (Not the graph network of the same name.) Details follow the published code. In the plain form, that
code halves the attention once more in evaluation than in training. The following norm hides the difference except for
its epsilon (`strict_eval_scale`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, Weights, register
from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.positions import resize_positions, row_of_positions, with_positions_resized
from gatewise.networks.image._base import FeatureInfo, ImageNetwork
from gatewise.networks.image.vig.blocks import (
    MIXER_RULES,
    NORM_EPS,
    GatedLinearMixer,
    GatedMlp,
    VigBlock,
    VigOptions,
    hidden_dim,
    start_mixer,
)

STEM_NORM_EPS = 1e-5
MLP_RATIO = 4.0
MLP_MULTIPLE = 256


@dataclass(frozen=True)
class VigConfig(VigOptions):
    """Sizes and options of a plain ViG.

    Args:
        image_size: size that positions are stored for, (height, width) or one number for both. Positions are resized
            for images of other sizes.
        overlapping_stem: whether the stem has two strided convolutions with norms (stride of half the patch, then 2)
            instead of one convolution of whole patches.
        stem_act: whether a SiLU also follows the second norm of the overlapping stem.
        use_pos_embed: whether learned positions are added to the patches.
        strict_eval_scale: whether to halve the attention once more in eval mode, as the published code does.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 3
    overlapping_stem: bool = True
    stem_act: bool = False
    use_pos_embed: bool = True
    strict_eval_scale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_width(self.embed_dim, self.num_heads)
        if self.depth < 1:
            raise ValueError(f"depth must be positive, not {self.depth}")
        if self.patch_size < 1 or (self.overlapping_stem and (self.patch_size < 4 or self.patch_size % 2)):
            raise ValueError(
                f"patch_size must be positive, and even and at least 4 with an overlapping stem, not {self.patch_size}"
            )
        if self.overlapping_stem and self.embed_dim % 2:
            raise ValueError(f"embed_dim must be even with an overlapping stem, not {self.embed_dim}")
        if min(self.grid) < 1:
            raise ValueError(f"image_size {self.image_size} is smaller than a patch of {self.patch_size}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns that positions are stored for."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def stem(self) -> nn.Sequential:
        """Return the stem, from images to patches."""
        patch, dim = self.patch_size, self.embed_dim
        if not self.overlapping_stem:
            return nn.Sequential(nn.Conv2d(self.in_chans, dim, patch, patch))
        return nn.Sequential(
            nn.Conv2d(self.in_chans, dim // 2, patch // 2 + 1, patch // 2, padding=1),
            LayerNorm2d(dim // 2, eps=STEM_NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(dim // 2, dim, 3, 2, padding=1),
            LayerNorm2d(dim, eps=STEM_NORM_EPS),
            nn.SiLU() if self.stem_act else nn.Identity(),
        )

    @property
    def min_size(self) -> int:
        """Smallest height and width that fill a patch, which the first convolution needs beyond its padding."""
        return self.patch_size // 2 - 1 if self.overlapping_stem else self.patch_size


class Vig(ImageNetwork):
    """Patches with positions, blocks at one resolution, RMS norm, mean over all patches, linear classifier."""

    def __init__(self, config: VigConfig) -> None:
        super().__init__(config)
        dim = config.embed_dim
        self.min_size = config.min_size
        self.stem = config.stem()
        self.positions = nn.Parameter(torch.zeros(1, *config.grid, dim)) if config.use_pos_embed else None
        (rates,) = drop_path_rates(config.drop_path_rate, (config.depth,))
        self.blocks = nn.ModuleList(self._block(rate) for rate in rates)
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self._init_weights()
        self.head = self.make_head(config.num_classes)

    def _block(self, drop_path_rate: float) -> VigBlock:
        config, dim = self.config, self.config.embed_dim
        eval_factor = 0.5 if config.strict_eval_scale else 1.0
        return VigBlock(
            GatedLinearMixer(dim, config.num_heads, config, eval_factor=eval_factor),
            GatedMlp(dim, hidden_dim(dim, MLP_RATIO, MLP_MULTIPLE)),
            partial(nn.RMSNorm, eps=NORM_EPS),
            drop_path_rate=drop_path_rate,
            layer_scale_init=config.layer_scale_init,
        )

    def _init_weights(self) -> None:
        self.apply(init_linear)
        for block in self.blocks:
            block.get_submodule("mixer").apply(start_mixer)
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dim, self.config.patch_size)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the normalized map."""
        self.check_input(x)
        x = self.stem(x).permute(0, 2, 3, 1)
        if self.positions is not None:
            x = x + resize_positions(self.positions, (x.shape[1], x.shape[2])).to(x.dtype)
        x = self.run_blocks(self.blocks, x)
        return self.norm(x).permute(0, 3, 1, 2)

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return a single level: the normalized map."""
        return [self.forward_features(x)]

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dim, num_classes, init_linear)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with positions resized to this network's grid."""
        return with_positions_resized(state, "positions", self.config.grid)


def layouts(config: VigConfig) -> list[KeyLayout]:
    """Return the official layout, where positions are a sequence of tokens."""
    rules = (
        ("^pos_embed", "positions"),
        ("^patch_embed.proj", "stem" if config.overlapping_stem else "stem.0"),
        ("attn", "mixer"),
        *MIXER_RULES,
        ("attn_norm", "norm1"),
        ("mlp_norm", "norm2"),
        ("mlp.gate_proj", "mlp.fc1"),
        ("mlp.down_proj", "mlp.fc2"),
    )

    to_ours, to_theirs = row_of_positions("pos_embed", config.grid)
    return [KeyLayout("official", rules, tensor_to_ours=to_ours, tensor_to_theirs=to_theirs)]


def published(name: str, score: str) -> Weights:
    """Return the entry of a file to download manually. All are in the hub repository hustvl/ViG."""
    return Weights(f"{name}.pth", "MIT", f"{score} % top-1, ImageNet-1K at 224 (repository; weights: hub, hustvl/ViG)")


register(
    Vig,
    paper="vig",
    layouts=layouts,
    variants={
        "vig_tiny": Variant(VigConfig(conv_act=True, out_act=True), weights=published("vig_tiny", "77.2")),
        "vig_small": Variant(VigConfig(embed_dim=384, num_heads=6), weights=published("vig_small", "81.7")),
        "vig_base": Variant(VigConfig(embed_dim=768, num_heads=12), weights=published("vig_base", "82.6")),
    },
)
