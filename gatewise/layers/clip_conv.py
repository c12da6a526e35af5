"""Convolutions of clips (B, C, T, H, W) over space only and over time only.

A 1x3x3 convolution is a 3x3 convolution of every frame. A 3x1x1 convolution is a 3x1 convolution of the (T, H W) map.
Libraries have fast kernels for two dimensions and slow ones for three (`gatewise reproduce p3d` times both forms).
Weights have the shape of 2-D convolutions, so that weights of image networks fit unchanged.

In channels-last memory (`channels_last`), both forms are views of one storage, so nothing is copied between them.
Weights have the same memory format. The strides of a single clip or frame do not reveal the format, and a convolution
then follows its weight.
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
    """Return the clips in channels-last memory, without a copy if they already are."""
    return clips.contiguous(memory_format=torch.channels_last_3d)


def as_frames(
    clips: Float[Tensor, "batch channels time height width"],
) -> Float[Tensor, "frames channels height width"]:
    """Return all frames of all clips as one batch of images, a view if in channels-last memory."""
    return clips.transpose(1, 2).flatten(0, 1)


def as_clips(
    frames: Float[Tensor, "frames channels height width"], time: int
) -> Float[Tensor, "batch channels time height width"]:
    """Return clips of `time` frames each from one batch of images, a view: the inverse of `as_frames`."""
    return frames.unflatten(0, (-1, time)).transpose(1, 2)


def halve_time(
    clips: Float[Tensor, "batch channels time height width"],
) -> Float[Tensor, "batch channels half height width"]:
    """Return the maximum of every two frames. A last frame without a partner is dropped.

    It equals `max_pool3d` with kernel (2, 1, 1), in a third of its time on a CPU. If both frames are equal, they share
    the gradient.
    """
    paired = clips[:, :, : clips.shape[2] // 2 * 2]
    return torch.maximum(paired[:, :, ::2], paired[:, :, 1::2])


class FrameConv(ConvNormAct):
    """`ConvNormAct` on every frame, a 1 x k x k convolution: (B, C, T, H, W) -> (B, C', T, H', W').

    The arguments are those of `ConvNormAct`. The norm's statistics are over batch, time and space, like those of a norm
    of clips.
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
        kernel_size: number of frames that one output sees, odd; frames before the first and after the last are zero.
        act: constructor of the activation; None for a linear unit.
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
        """Return an equivalent unit for eval mode, with the batch norm folded into the convolution."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_previous(new.conv, self.norm)
            new.norm = nn.Identity()
        return new
