"""The contract shared by image and video networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class VisionConfig:
    """Configuration shared by all image and video networks.

    Args:
        num_classes: number of output classes; 0 removes the classifier, and `forward` then returns pooled features.
        in_chans: number of input channels.
        drop_rate: dropout rate, for networks whose paper uses dropout.
        drop_path_rate: stochastic depth rate of the last block; the rate grows linearly from 0 over the blocks.
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


class VisionNetwork(nn.Module):
    """Base of vision networks: gradient checkpointing, freezing of sub-modules, and a replaceable classifier.

    A network keeps its classifier in `head`, builds it in `make_head`, and runs its blocks through `run_block`.
    """

    config: Any
    head: nn.Module
    variant: str | None = None
    min_size: int = 1
    """Smallest supported height and width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self._frozen: list[nn.Module] = []

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier with a newly initialized one; 0 classes removes it."""
        self._with_classes(num_classes)
        self.head = self.make_head(num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        """Return a new classifier of pooled features, or an identity if `num_classes` is 0."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only each block's input, recompute the rest in the backward pass."""
        self.grad_checkpointing = enable

    def run_block(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return `block(x)`, recomputed in the backward pass if gradient checkpointing is on."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def run_blocks(self, blocks: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Run the blocks in order through `run_block`."""
        for block in blocks:
            x = self.run_block(block, x)
        return x

    def run_rows(self, rows: Iterable[nn.Module], x: Tensor) -> list[Tensor]:
        """Run the stages in order and return the output of each."""
        maps = []
        for row in rows:
            x = self.run_blocks(row.children(), x)
            maps.append(x)
        return maps

    def freeze(self, modules: Sequence[nn.Module]) -> None:
        """Freeze these sub-modules: no gradients, and always in eval mode (fixed statistics, no dropout)."""
        self._frozen = list(modules)
        for module in self._frozen:
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> VisionNetwork:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    @property
    def title(self) -> str:
        """Name of this network in error messages."""
        return self.variant or type(self).__name__

    def _check_pixels(self, x: Tensor, what: str, axes: str, min_size: int) -> None:
        """Raise a ValueError unless `x` is a float batch with the expected axes, number of channels and sizes.

        Args:
            what: plural noun for the samples, used in messages ("images").
            axes: comma-separated names of all axes; channels come second, height and width last.
            min_size: smallest accepted height and width.
        Raises:
            TypeError: if `x` is not a tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.title} expects a tensor of {what}, not {type(x).__name__}")
        if x.ndim != axes.count(",") + 1:
            raise ValueError(f"{self.title} expects {what} as ({axes}), not shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(
                f"{self.title} expects floating-point {what}, not {x.dtype}; convert and normalize them first"
            )
        if x.shape[0] < 1:
            raise ValueError(f"{self.title} expects at least one sample, not a batch of shape {tuple(x.shape)}")
        if x.shape[1] != self.config.in_chans:
            raise ValueError(f"{self.title} expects {self.config.in_chans} channels, not {x.shape[1]}")
        if x.shape[-2] < min_size or x.shape[-1] < min_size:
            raise ValueError(
                f"{self.title} expects height and width of at least {min_size}, not {x.shape[-2]} x {x.shape[-1]}"
            )

    def _with_classes(self, num_classes: int) -> None:
        """Update the number of classes in the configuration."""
        self.config = replace(self.config, num_classes=num_classes)
