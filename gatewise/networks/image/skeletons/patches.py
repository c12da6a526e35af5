"""Skeleton of networks that split an image into patches and keep them as tokens at one resolution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.drop_path import drop_path_rates
from gatewise.layers.linear_head import linear_head
from gatewise.networks.image._base import FeatureInfo, ImageConfig, ImageNetwork


@dataclass(frozen=True)
class PatchConfig(ImageConfig):
    """Sizes of a network of blocks over patches.

    Args:
        patch_size: height, width and stride of the patches, in pixels.
        hidden_dim: width within the blocks.
        drop_rate: dropout rate within the blocks.
        truncate: whether to drop right and bottom pixels that do not fill a patch; otherwise such images raise an
            error.
    """

    drop_rate: float = 0.5
    patch_size: int = 4
    embed_dim: int = 256
    hidden_dim: int = 512
    depth: int = 4
    truncate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "embed_dim", "hidden_dim", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


class PatchNetwork(ImageNetwork):
    """Patches from a strided convolution, blocks on (B, N, C) tokens, mean over tokens, linear classifier.

    There are no positions, no class token and no final norm. Weights have PyTorch's default initialization.

    Args:
        make_block: function that builds a block from its stochastic depth rate.
    """

    def __init__(self, config: PatchConfig, make_block: Callable[[float], nn.Module]) -> None:
        super().__init__(config)
        self.min_size = config.patch_size
        self.stem = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)
        (rates,) = drop_path_rates(config.drop_path_rate, (config.depth,))
        self.blocks = nn.ModuleList(make_block(rate) for rate in rates)
        self.head = self.make_head(config.num_classes)

    @property
    def feature_info(self) -> list[FeatureInfo]:
        return [FeatureInfo(self.config.embed_dim, self.config.patch_size)]

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last block's tokens as a map of (height / patch_size) x (width / patch_size)."""
        self.check_input(x)
        x = self.stem(x)
        size = x.shape[2:]
        # A single copy here makes channels contiguous for all later steps.
        x = x.flatten(2).transpose(1, 2).contiguous()
        x = self.run_blocks(self.blocks, x)
        return x.unflatten(1, size).permute(0, 3, 1, 2)

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return a single level: the last block's tokens as a map."""
        return [self.forward_features(x)]

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        if not self.config.truncate:
            self.check_patches(x, self.config.patch_size, "; pass truncate=True to drop the rest")

    def make_head(self, num_classes: int) -> nn.Module:
        return linear_head(self.config.embed_dim, num_classes)
