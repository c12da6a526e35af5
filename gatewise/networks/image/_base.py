"""The contract of every image network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ImageConfig:
    """What every image network's configuration has.

    Args:
        num_classes: width of the classifier; 0 leaves it out, and `forward` then returns pooled features.
        in_chans: channels of the images.
        drop_rate: dropout, where the paper has it.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over the blocks.
    """

    num_classes: int = 1000
    in_chans: int = 3
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (no classifier) or positive, not {self.num_classes}")
        if self.in_chans < 1:
            raise ValueError(f"in_chans must be positive, not {self.in_chans}")
        for name in ("drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")


class FeatureInfo(NamedTuple):
    """One level of a pyramid: its channels, and how many input pixels one step of it spans."""

    channels: int
    stride: int


class ImageNetwork(nn.Module):
    """Images (B, C, H, W) in; logits, features or a pyramid out.

    A network defines `forward_features`, `forward_head`, `forward_pyramid`, `feature_info` and `reset_classifier`, and
    runs its blocks through `run_block`, which recomputes activations in the backward pass when asked to.
    """

    config: Any
    variant: str | None = None
    min_size: int = 1
    """Smallest legal height and width."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self._frozen: list[nn.Module] = []

    @property
    def feature_info(self) -> list[FeatureInfo]:
        """Channels and stride of each level of `forward_pyramid`."""
        raise NotImplementedError

    def forward_features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features h w"]:
        """The last feature map, before pooling and classifier."""
        raise NotImplementedError

    def forward_head(self, features: Float[Tensor, "batch features h w"]) -> Float[Tensor, "batch classes"]:
        """Logits (or pooled features, if there is no classifier) of the last feature map."""
        raise NotImplementedError

    def forward_pyramid(self, x: Float[Tensor, "batch channels height width"]) -> list[Float[Tensor, "batch _ _ _"]]:
        """Feature maps from fine to coarse, as `feature_info` says."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; 0 removes it."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits.

        Raises:
            ValueError: if `x` is no float image batch of the network's channels and of a legal size.
        """
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep each block's input alone and recompute the rest in backward."""
        self.grad_checkpointing = enable

    def run_block(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`block(x)`, recomputed in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def freeze(self, modules: Sequence[nn.Module]) -> None:
        """Fix these sub-modules: no gradients, and eval mode (fixed statistics, no dropout) whatever `train` says."""
        self._frozen = list(modules)
        for module in self._frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ImageNetwork:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        """Raise a ValueError that says what was expected, unless `x` is a legal batch of images."""
        title = self.variant or type(self).__name__
        if x.ndim != 4:
            raise ValueError(f"{title} expects images as (batch, channels, height, width), not shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{title} expects floating-point images, not {x.dtype}; convert and normalise them first")
        if x.shape[1] != self.config.in_chans:
            raise ValueError(f"{title} expects {self.config.in_chans} channels, not {x.shape[1]}")
        smallest = self.min_size if min_size is None else min_size
        if x.shape[2] < smallest or x.shape[3] < smallest:
            raise ValueError(
                f"{title} expects height and width of at least {smallest}, not {x.shape[2]} x {x.shape[3]}"
            )

    def _with_classes(self, num_classes: int) -> None:
        """Record another number of classes in the configuration."""
        self.config = replace(self.config, num_classes=num_classes)
