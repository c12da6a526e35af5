"""Convolution-norm-activation unit."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import conv2d
from gatewise.layers.fold_norm import fold_into_previous

Padding = Literal["symmetric", "same"]
PADDINGS = ("symmetric", "same")


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, activation: (B, C, H, W) -> (B, C', H', W').

    Args:
        padding: "symmetric" pads dilation * (kernel_size - 1) / 2 on each side. "same" pads like TensorFlow, so that
            the output has ceil(size / stride) positions. With stride 2, that is less at the top and left than at the
            bottom and right.
        act: constructor of the activation; None for a linear unit.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        padding: Padding = "symmetric",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        act: Callable[[], nn.Module] | None = nn.ReLU6,
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, not {padding!r}")
        # At stride 1, both styles are the same for odd kernels.
        self.pads_itself = padding == "same" and stride > 1
        border = 0 if self.pads_itself else dilation * (kernel_size - 1) // 2
        self.conv = conv2d(in_dim, dim, kernel_size, stride, border, dilation, groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(dim, norm_eps, norm_momentum)
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.act(self.norm(self.conv(self.pad(x))))

    def pad(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch in_dim h w"]:
        """Return `x` with the padding that the convolution does not add itself."""
        return F.pad(x, (*self._margins(x.shape[3]), *self._margins(x.shape[2]))) if self.pads_itself else x

    def _margins(self, size: int) -> tuple[int, int]:
        stride, reach = self.conv.stride[0], self.conv.dilation[0] * (self.conv.kernel_size[0] - 1) + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        return total // 2, total - total // 2

    def merged(self) -> ConvNormAct:
        """Return an equivalent unit for eval mode, with the batch norm folded into the convolution."""
        new = deepcopy(self)
        if isinstance(self.norm, nn.BatchNorm2d):
            fold_into_previous(new.conv, self.norm)
            new.norm = nn.Identity()
        return new
