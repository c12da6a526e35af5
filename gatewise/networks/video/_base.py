"""The contract of every video network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from gatewise.networks._base import VisionConfig, VisionNetwork


@dataclass(frozen=True)
class VideoConfig(VisionConfig):
    """What every video network's configuration has."""


class ClipFeatureInfo(NamedTuple):
    """One level of a pyramid: its channels, and how many frames and input pixels one step of it spans."""

    channels: int
    time_stride: int
    stride: int


class VideoNetwork(VisionNetwork):
    """Clips (B, C, T, H, W) in; logits, features or a pyramid out: the contract of images with a time axis.

    A network defines `forward_features`, `forward_head`, `forward_pyramid`, `feature_info` and `make_head`, and
    runs its blocks through `run_block`, which recomputes activations in the backward pass when asked to.
    """

    min_frames: int = 1
    """Smallest legal number of frames."""

    @property
    def feature_info(self) -> list[ClipFeatureInfo]:
        """Channels and strides of each level of `forward_pyramid`."""
        raise NotImplementedError

    def forward_features(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> Float[Tensor, "batch features t h w"]:
        """The last feature map, before pooling and classifier."""
        raise NotImplementedError

    def forward_head(self, features: Float[Tensor, "batch features t h w"]) -> Float[Tensor, "batch classes"]:
        """Logits (or pooled features, if there is no classifier) of the last feature map."""
        raise NotImplementedError

    def forward_pyramid(
        self, x: Float[Tensor, "batch channels time height width"]
    ) -> list[Float[Tensor, "batch _ _ _ _"]]:
        """Feature maps from fine to coarse, as `feature_info` says."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch channels time height width"]) -> Float[Tensor, "batch classes"]:
        """Logits.

        Raises:
            ValueError: if `x` is no float batch of clips of the network's channels and of a legal size and length.
        """
        return self.forward_head(self.forward_features(x))

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError that says what was expected, unless `x` is a legal batch of clips."""
        self._check_pixels(x, "clips", "batch, channels, time, height, width", self.min_size)
        if x.shape[2] < self.min_frames:
            raise ValueError(f"{self.title} expects at least {self.min_frames} frames, not {x.shape[2]}")
