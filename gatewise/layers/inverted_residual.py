"""Inverted residual block: thin ends, wide middle, linear projection."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.conv import ConvNormAct, Padding


class InvertedResidual(nn.Module):
    """Expand with a 1x1, filter each channel with a 3x3, project with a linear 1x1: (B, C, H, W) -> (B, C', H', W').

    Source: Sandler et al. 2018, arXiv:1801.04381, section 3.3.

    Args:
        expand_ratio: hidden width relative to the input width; at 1 there is no expansion.
        dilation: dilation of the 3x3 convolution.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        stride: int,
        expand_ratio: float,
        *,
        dilation: int = 1,
        padding: Padding = "symmetric",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, not {stride}")
        norm: dict[str, Any] = {"norm_eps": norm_eps, "norm_momentum": norm_momentum}
        hidden = round(in_dim * expand_ratio)
        self.residual = stride == 1 and in_dim == dim
        self.expand = ConvNormAct(in_dim, hidden, **norm) if expand_ratio != 1 else None
        self.spatial = ConvNormAct(hidden, hidden, 3, stride, dilation=dilation, groups=hidden, padding=padding, **norm)
        self.project = ConvNormAct(hidden, dim, act=None, **norm)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.spatial(y))
        return x + y if self.residual else y


class SplitInvertedResidual(nn.Module):
    """An inverted residual for inference that never holds its whole hidden tensor: (B, C, H, W) -> (B, C', H', W').

    The hidden channels are processed in `parts` groups. Each is expanded, filtered and projected, and the projections
    are summed. The result is exact in real arithmetic.

    Source: Sandler et al. 2018, arXiv:1801.04381, section 5.1.
    """

    def __init__(self, block: InvertedResidual, parts: int) -> None:
        super().__init__()
        if block.expand is None:
            raise ValueError("a block without expansion has no hidden tensor to split")
        hidden = block.expand.conv.out_channels
        if not 1 <= parts <= hidden:
            raise ValueError(f"parts must be 1 to {hidden} (the hidden channels), not {parts}")
        self.residual = block.residual
        self.expand = deepcopy(block.expand).eval().merged()
        self.spatial = deepcopy(block.spatial).eval().merged()
        self.project = deepcopy(block.project).eval().merged()
        self.bounds = [hidden * part // parts for part in range(parts + 1)]

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch dim h w"]:
        total = self._part(x, 0)
        for part in range(1, len(self.bounds) - 1):
            total += self._part(x, part)
        total += _bias(self.project)[:, None, None]
        return total.add_(x) if self.residual else total

    def _part(self, x: Tensor, part: int) -> Tensor:
        rows = slice(self.bounds[part], self.bounds[part + 1])
        spatial = self.spatial.conv
        y = self.expand.act(F.conv2d(x, self.expand.conv.weight[rows], _bias(self.expand)[rows]))
        y = F.conv2d(
            self.spatial.pad(y),
            spatial.weight[rows],
            _bias(self.spatial)[rows],
            stride=spatial.stride,
            padding=spatial.padding,
            dilation=spatial.dilation,
            groups=rows.stop - rows.start,
        )
        return F.conv2d(self.spatial.act(y), self.project.conv.weight[:, rows])


def _bias(merged: ConvNormAct) -> Tensor:
    if merged.conv.bias is None:
        raise ValueError("a merged unit carries its norm's shift as a bias")
    return merged.conv.bias
