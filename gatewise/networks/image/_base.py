"""The contract of every image network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatewise.networks._base import VisionConfig, VisionNetwork


@dataclass(frozen=True)
class ImageConfig(VisionConfig):
    """What every image network's configuration has."""


class FeatureInfo(NamedTuple):
    """One level of a pyramid: its channels, and how many input pixels one step of it spans."""

    channels: int
    stride: int


class ImageNetwork(VisionNetwork):
    """Images (B, C, H, W) in; logits, features or a pyramid out.

    A network defines `forward_features`, `forward_pyramid`, `feature_info` and `make_head`, and `pool_features` where
    more than a mean stands before the classifier. It runs its blocks through `run_block`, which recomputes activations
    in the backward pass when asked to.
    """

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Channels and stride of each level of `forward_pyramid`."""
        raise NotImplementedError

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """The last feature map, before pooling and classifier."""
        raise NotImplementedError

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch pooled"]:
        """What the classifier reads, an embedding of the image: here the mean of the last feature map."""
        return features.mean(dim=(2, 3))

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        """Logits (or pooled features, if there is no classifier) of the last feature map."""
        return self.head(self.pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Feature maps from fine to coarse, as `feature_info` says."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits.

        Raises:
            ValueError: if `x` is no float image batch of the network's channels and of a legal size.
        """
        return self.forward_head(self.forward_features(x))

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        """Raise a ValueError that says what was expected, unless `x` is a legal batch of images."""
        smallest = self.min_size if min_size is None else min_size
        self._check_pixels(x, "images", "batch, channels, height, width", smallest)

    def check_patches(self, x: Tensor, patch_size: int, hint: str = "") -> None:
        """Raise a ValueError, which ends in `hint`, unless whole patches fill the images."""
        for name, size in zip(("height", "width"), x.shape[2:], strict=True):
            if size % patch_size:
                raise ValueError(f"{self.title}: {name} {size} is not a multiple of patch size {patch_size}{hint}")
