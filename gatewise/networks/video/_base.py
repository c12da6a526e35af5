"""The contract of every video network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatewise.networks._base import VisionConfig, VisionNetwork


@dataclass(frozen=True)
class VideoConfig(VisionConfig):
    """Configuration shared by all video networks."""


class ClipFeatureInfo(NamedTuple):
    """One pyramid level: its channels, and its strides in frames and input pixels."""

    channels: int
    time_stride: int
    stride: int


class VideoNetwork(VisionNetwork):
    """Base of video networks: clips (B, C, T, H, W) in; logits, features or a feature pyramid out.

    A network defines `forward_features`, `forward_head`, `forward_pyramid`, `feature_info` and `make_head`. It runs its
    blocks through `run_block`, which can recompute activations in the backward pass.
    """

    min_frames: int = 1
    """Smallest supported number of frames."""

    @property
    def feature_info(self) -> list[ClipFeatureInfo]:
        """Channels and strides of each level of `forward_pyramid`."""
        raise NotImplementedError

    def forward_features(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> Float[Tensor, "batch features t h w"]:
        """Return the last feature map, before pooling and classifier."""
        raise NotImplementedError

    def forward_head(self, features: Float[Tensor, "batch features t h w"]) -> Float[Tensor, "batch classes"]:
        """Return logits for the last feature map, or pooled features if there is no classifier."""
        raise NotImplementedError

    def forward_pyramid(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> list[Float[Tensor, "batch _ _ _ _"]]:
        """Return feature maps from fine to coarse, as described by `feature_info`."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch channels time height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits, or pooled features if there is no classifier.

        Raises:
            ValueError: if `x` is not a float batch of clips with the expected channels and a supported size and length.
        """
        return self.forward_head(self.forward_features(x))

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError that states what was expected unless `x` is a valid batch of clips."""
        self._check_pixels(x, "clips", "batch, channels, time, height, width", self.min_size)
        if x.shape[2] < self.min_frames:
            raise ValueError(f"{self.title} expects at least {self.min_frames} frames, not {x.shape[2]}")
