"""Skeleton of vision transformers whose classifier reads a class token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.init_weights import init_linear
from gatewise.layers.linear_head import linear_head
from gatewise.layers.positions import with_positions_resized
from gatewise.layers.self_attention import head_dim
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork


@dataclass(frozen=True)
class ClassTokenConfig(ImageConfig):
    """Sizes of a vision transformer.

    Args:
        image_size: size that positions are stored for, (height, width) or one number for both.
        drop_rate: dropout rate after positions, mixers and both layers of the MLPs.
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
        """Height and width that positions are stored for."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of that size."""
        return self.image_sides[0] // self.patch_size, self.image_sides[1] // self.patch_size


class ClassTokenNetwork(ImageNetwork):
    """Patches from a strided convolution and a class token, with a final norm. Any grid of whole patches works.

    A network builds `positions` (or None) and defines `tokens`.
    """

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the normalized tokens (B, 1 + N, C), class token first, and the rows and columns of patches."""
        raise NotImplementedError

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dim, self.config.patch_size)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return all normalized tokens in one column, (B, C, 1 + N, 1): the class token, then patches row by row."""
        tokens, _ = self.tokens(x)
        return tokens.transpose(1, 2)[..., None]

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return a single level: the normalized patches as a map."""
        tokens, grid = self.tokens(x)
        return [tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)]

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch features"]:
        """Return the class token."""
        return features[:, :, 0, 0]

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dim, num_classes, init_linear)

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        self.check_patches(x, self.config.patch_size)

    def adapt(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors, already under our names, with positions resized to this network's grid."""
        return with_positions_resized(state, "positions", self.config.grid)
