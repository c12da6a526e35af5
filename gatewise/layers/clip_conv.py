"""Convolutions of clips (B, C, T, H, W) over space alone and over time alone.

A 1x3x3 convolution is the 3x3 convolution of every frame; a 3x1x1 convolution is a 3x1 convolution of the (T, H W)
map. Libraries have fast kernels for two dimensions and slow ones for three (`gatewise reproduce p3d` times both forms).
Weights are those of the 2-D convolution, so that weights of image networks fit as they are.

In channels-last memory (`channels_last`) both forms are views of one storage: between the two nothing is copied.
Weights are laid out like that too: of a single clip or frame the layout cannot be told from the strides, and a
convolution then follows its weight's.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.conv import ConvNormAct
from gatewise.layers.fold_norm import fold_into_previous


def channels_last(clips: Float[Tensor, "batch channels time height width"]) -> Float[Tensor, "batch channels time _ _"]:
    """The same clips with the channels of a pixel side by side in memory; no copy if they are already."""
    return clips.contiguous(memory_format=torch.channels_last_3d)


def as_frames(
    clips: Float[Tensor, "batch channels time height width"],
) -> Float[Tensor, "frames channels height width"]:
    """All frames of all clips as one batch of images; a view in channels-last memory."""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(
    frames: Float[Tensor, "frames channels height width"], time: int
) -> Float[Tensor, "batch channels time height width"]:
    """Clips of `time` frames each from one batch of images: the inverse of `as_frames`, a view."""
    return frames.unflatten(0, (-1, time)).transpose(1, 2)


def halve_time(
    clips: Float[Tensor, "batch channels time height width"],
) -> Float[Tensor, "batch channels half height width"]:
    """The larger of every two frames; a last frame without a partner is dropped.

    It equals `max_pool3d` with kernel (2, 1, 1) at a third of its time on a CPU, and shares the gradient where both
    frames are equal.
    """
    paired = clips[:, :, : clips.shape[2] // 2 * 2]
    return torch.maximum(paired[:, :, ::2], paired[:, :, 1::2])


class FrameConv(ConvNormAct):
    """`ConvNormAct` of every frame: (B, C, T, H, W) -> (B, C', T, H', W'), the 1 x k x k convolution.

    The arguments are those of `ConvNormAct`. The statistics of the norm are taken over batch, time and space, as those
    of a norm of clips.
    """

    def __init__(self, in_dim: int, dim: int, kernel_size: int = 1, stride: int = 1, **options: Any) -> None:
        super().__init__(in_dim, dim, kernel_size, stride, **options)
        self.conv.to(memory_format=torch.channels_last)

    def forward(
        self, x: Float[Tensor, "batch in_dim time height width"]
    ) -> Float[Tensor, "batch dim time out_height out_width"]:
        return as_clips(super().forward(as_frames(x)), x.shape[2])


class TemporalConv(nn.Module):
    """Convolution over time at every position, batch norm, activation: (B, C, T, H, W) -> (B, C', T, H, W).

    Args:
        kernel_size: frames that one output sees; odd. Frames before the first and after the last are zero.
        act: builds the activation; None for a linear unit.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 3,
        *,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        act: Callable[[], nn.Module] | None = nn.ReLU,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"a convolution over time needs an odd, positive kernel size, not {kernel_size}")
        self.conv = nn.Conv2d(in_dim, dim, (kernel_size, 1), padding=(kernel_size // 2, 0), bias=False)
        self.conv.to(memory_format=torch.channels_last)
        self.norm: nn.Module = nn.BatchNorm2d(dim, norm_eps, norm_momentum)
        self.act = act() if act is not None else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch in_dim time height width"]
    ) -> Float[Tensor, "batch dim time height width"]:
        y = self.act(self.norm(self.conv(x.flatten(3))))
        return y.unflatten(3, x.shape[3:])

    def merged(self) -> TemporalConv:
        """The same unit in eval mode with the batch norm inside the convolution."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_previous(new.conv, self.norm)
            new.norm = nn.Identity()
        return new
