"""The blocks of MOAT: inverted residual, attention with a relative position bias, and both in one."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import DropPath
from gatewise.layers.fold_norm import fold_into_next
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.ops.window_attention import Window, fit_window, resize_table, window_attention

NORM: dict[str, Any] = {"norm_eps": 1e-3}
"""Epsilon of all batch norms."""

LAYER_NORM_EPS = 1e-5


class Stem(nn.Module):
    """Two 3x3 convolutions, the first of stride 2 with norm and GELU: (B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, in_dim: int, dims: tuple[int, int]) -> None:
        super().__init__()
        self.first = ConvNormAct(in_dim, dims[0], 3, 2, padding="same", act=nn.GELU, **NORM)
        # As published, although the following norm cancels the bias.
        self.first.conv.bias = nn.Parameter(torch.zeros(dims[0]))
        self.second = nn.Conv2d(dims[0], dims[1], 3, padding=1)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.second(self.first(x))


class Shortcut(nn.Module):
    """Average pooling if there is a stride, then a 1x1 convolution if the width changes."""

    def __init__(self, in_dim: int, dim: int, stride: int, pool_size: int) -> None:
        super().__init__()
        self.stride, self.pool_size = stride, pool_size
        self.conv = nn.Conv2d(in_dim, dim, 1) if in_dim != dim else nn.Identity()

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        return self.conv(_average_pool(x, self.pool_size, self.stride) if self.stride > 1 else x)


def _average_pool(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Average over the positions within the map, with "same" padding and output size ceil(size / stride).

    "Same" padding adds more at the bottom and right than at the top and left. Rounding up adds exactly that extra part.
    """
    above, left = (max((-(-n // stride) - 1) * stride + kernel_size - n, 0) // 2 for n in x.shape[2:])
    return F.avg_pool2d(x, kernel_size, stride, (above, left), ceil_mode=True, count_include_pad=False)


class MBConv(nn.Module):
    """Pre-norm inverted residual: (B, C, H, W) -> (B, C', H', W').

    y = shrink(SE(gelu(BN(depthwise(gelu(BN(expand(BN(x)))))))),   shortcut(x) + y
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int = 1,
        *,
        expand_ratio: int = 4,
        se_ratio: float | None = None,
        pool_size: int = 2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = expand_ratio * dim
        self.shortcut = Shortcut(in_dim, dim, stride, pool_size)
        self.pre_norm: nn.Module = nn.BatchNorm2d(in_dim, eps=NORM["norm_eps"])
        self.expand = ConvNormAct(in_dim, hidden, act=nn.GELU, **NORM)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride, groups=hidden, padding="same", act=nn.GELU, **NORM)
        # Relative to the output width, not to the hidden width that it acts on.
        squeezed = max(1, int(se_ratio * dim)) if se_ratio is not None else None
        self.se = SqueezeExcite(hidden, squeezed, nn.SiLU) if squeezed is not None else nn.Identity()
        self.shrink = nn.Conv2d(hidden, dim, 1)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = self.se(self.depthwise(self.expand(self.pre_norm(x))))
        return self.shortcut(x) + self.drop_path(self.shrink(y))

    def merged(self) -> MBConv:
        """Return an equivalent block for eval mode, with the first norm folded into the expansion."""
        new = deepcopy(self)
        if isinstance(self.pre_norm, nn.BatchNorm2d):
            fold_into_next(self.pre_norm, new.expand.conv)
            new.pre_norm = nn.Identity()
        return new


class RelativeAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias: (B, H, W, C) -> (B, H, W, C).

    Args:
        window: rows and columns of the window; None for global attention.
        table_window: window that the table of relative positions is sized for; None for no bias.
        pad: whether to accept maps that are not a multiple of the window.
    """

    def __init__(
        self, dim: int, head_dim: int, window: Window | None, table_window: Window | None, pad: bool = False
    ) -> None:
        super().__init__()
        self.heads = (dim // head_dim, head_dim)
        self.window, self.pad = window, pad
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.table = None
        if table_window is not None:
            self.table = nn.Parameter(torch.zeros(self.heads[0], *(2 * size - 1 for size in table_window)))

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        q, k, v = (part.unflatten(-1, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        window = fit_window(self.window, x.shape[1], x.shape[2])
        table = None if self.table is None else resize_table(self.table, window)
        return self.project(window_attention(q, k, v, table=table, window=window, pad=self.pad).flatten(-2))


class MoatBlock(nn.Module):
    """Inverted residual, then attention in a residual branch: (B, C, H, W) -> (B, C', H', W').

        x = MBConv(x),   x + attention(LN(x))

    Args:
        checkpoint_attention: whether training keeps only the input of the attention branch and recomputes the rest.
    """

    def __init__(
        self,
        mbconv: MBConv,
        attention: RelativeAttention,
        drop_path_rate: float = 0.0,
        checkpoint_attention: bool = False,
    ) -> None:
        super().__init__()
        self.mbconv = mbconv
        self.attention_norm = nn.LayerNorm(mbconv.shrink.out_channels, eps=LAYER_NORM_EPS)
        self.attention = attention
        self.drop_path = DropPath(drop_path_rate)
        self.checkpoint_attention = checkpoint_attention

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        x = self.mbconv(x)
        if self.checkpoint_attention and self.training and torch.is_grad_enabled():
            return x + self.drop_path(checkpoint(self._branch, x, use_reentrant=False))
        return x + self.drop_path(self._branch(x))

    def _branch(self, x: Tensor) -> Tensor:
        return self.attention(self.attention_norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
