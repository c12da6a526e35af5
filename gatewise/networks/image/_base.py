"""The contract of every image network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatewise.networks._base import VisionConfig, VisionNetwork


@dataclass(frozen=True)
class ImageConfig(VisionConfig):
    """Configuration shared by all image networks."""


class FeatureInfo(NamedTuple):
    """One pyramid level: its channels, and its stride in input pixels."""

    channels: int
    stride: int


class ImageNetwork(VisionNetwork):
    """Base of image networks: images (B, C, H, W) in; logits, features or a feature pyramid out.

    A network defines `forward_features`, `forward_pyramid`, `feature_info` and `make_head`. It overrides
    `pool_features` if the classifier reads more than the mean. It runs its blocks through `run_block`, which can
    recompute activations in the backward pass.
    """

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Channels and stride of each level of `forward_pyramid`."""
        raise NotImplementedError

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """Return the last feature map, before pooling and classifier."""
        raise NotImplementedError

    def pool_features(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch pooled"]:
        """Return the image embedding that the classifier reads, by default the mean of the last feature map."""
        return features.mean(dim=(2, 3))

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        """Return logits for the last feature map, or pooled features if there is no classifier."""
        return self.head(self.pool_features(features))

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Return feature maps from fine to coarse, as described by `feature_info`."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits, or pooled features if there is no classifier.

        Raises:
            ValueError: if `x` is not a float batch of images with the expected channels and a supported size.
        """
        return self.forward_head(self.forward_features(x))

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        """Raise a ValueError that states what was expected unless `x` is a valid batch of images."""
        smallest = self.min_size if min_size is None else min_size
        self._check_pixels(x, "images", "batch, channels, height, width", smallest)

    def check_patches(self, x: Tensor, patch_size: int, hint: str = "") -> None:
        """Raise a ValueError, ending in `hint`, unless height and width are multiples of the patch size."""
        for name, size in zip(("height", "width"), x.shape[2:], strict=True):
            if size % patch_size:
                raise ValueError(f"{self.title}: {name} {size} is not a multiple of patch size {patch_size}{hint}")
