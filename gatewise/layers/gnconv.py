"""Recursive gated convolution: spatial interactions of order n, for about the cost of one convolution.

One depthwise operator over all channels computes the gates of every order. They are multiplied in one after the other,
along a chain of 1x1 convolutions of doubling width:

    [p_0, a] = project_in(x),   [d_0, ..., d_{n-1}] = scale * spatial(a)
    y_0 = p_0 * d_0,   y_{i+1} = widen_i(y_i) * d_{i+1},   output = project_out(y_{n-1})

with c_i = C / 2^(n-1-i) channels in d_i and y_i. There is no activation: without biases the output is a homogeneous
polynomial of degree n + 1 in x.

Source: Rao et al. 2022, arXiv:2207.14284 (HorNet), section 3.1. The paper divides by a constant once per step. As in
the published code, `scale` acts on every gate, so the total factor is scale^n.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.layers.depthwise_conv import DepthwiseConv2d
from gatewise.layers.fold_norm import fold_into_previous, scale_outputs
from gatewise.layers.norm import LayerNorm2d
from gatewise.ops.global_filter import global_filter

Grid = tuple[int, int]
"""Rows and columns of a stored half spectrum: (H, W // 2 + 1) for maps of H x W."""


def check_gnconv(dim: int, order: int, has_grid: bool = False) -> None:
    """Raise a ValueError unless `dim` channels can be halved order - 1 times.

    With a global filter, which takes half of the channels of all orders, they must be halved once more.
    """
    if order < 1:
        raise ValueError(f"the order of a gnConv must be 1 or more, not {order}")
    step = 2 ** (order if has_grid else order - 1)
    if dim < 1 or dim % step:
        nearest = max(step, round(dim / step) * step)
        why = f"2^{order} with a global filter" if has_grid else f"2^{order - 1}"
        raise ValueError(
            f"a gnConv of order {order} needs a width that is a multiple of {why} = {step}, not {dim}; the nearest is "
            f"{nearest}"
        )


class GlobalLocalFilter(nn.Module):
    """3x3 convolution for even output channels and a global filter for odd ones: (B, C, H, W) -> (B, C, H, W).

    The first half of the input's channels goes through a depthwise convolution, the second through a global filter, and
    their outputs are interleaved. At sizes other than the grid's, the global filter is interpolated and no longer
    equals the trained function.

    Args:
        grid: size of the stored spectrum; (H, W // 2 + 1) fits maps of H x W.
    """

    def __init__(self, dim: int, grid: Grid = (14, 8)) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"a global-local filter splits its channels in two: their number must be even, not {dim}")
        if min(grid) < 1:
            raise ValueError(f"the grid of a global filter must be positive in rows and columns, not {grid}")
        half = dim // 2
        self.pre_norm = LayerNorm2d(dim)
        self.local = DepthwiseConv2d(half, 3, bias=False)
        self.spectrum = nn.Parameter(nn.init.trunc_normal_(torch.empty(half, *grid, 2), std=0.02))
        self.post_norm = LayerNorm2d(dim)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        near, everywhere = self.pre_norm(x).chunk(2, dim=1)
        # Stacked with channels last, which is the memory format that the norm expects.
        filtered = (self.local(near), global_filter(everywhere, self.spectrum))
        both = torch.stack([half.permute(0, 2, 3, 1) for half in filtered], dim=-1)
        return self.post_norm(both.flatten(3).permute(0, 3, 1, 2))


class GnConv(nn.Module):
    """Recursive gated convolution: (B, C, H, W) -> (B, C', H, W).

    Args:
        dim: width of the highest order, and of input and output unless given.
        order: order n of the interactions.
        scale: factor on every gate; 1/3 in the published networks.
        kernel_size: kernel size of the depthwise convolution that computes the gates.
        grid: spectrum size of a `GlobalLocalFilter` that computes the gates instead; None for the convolution.
        in_dim: number of input channels.
        out_dim: number of output channels.
    Raises:
        ValueError: if the width cannot be halved often enough, or the kernel is impossible.
    """

    def __init__(
        self,
        dim: int,
        order: int = 5,
        *,
        scale: float = 1.0,
        kernel_size: int = 7,
        grid: Grid | None = None,
        in_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_gnconv(dim, order, grid is not None)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, not {kernel_size}")
        self.widths = [dim // 2 ** (order - 1 - i) for i in range(order)]
        gates = sum(self.widths)
        self.project_in = nn.Conv2d(in_dim or dim, 2 * dim, 1)
        self.spatial: DepthwiseConv2d | GlobalLocalFilter = (
            DepthwiseConv2d(gates, kernel_size, bias=True) if grid is None else GlobalLocalFilter(gates, grid)
        )
        self.scale = None if scale == 1 else scale
        self.widen = nn.ModuleList(nn.Conv2d(old, 2 * old, 1) for old in self.widths[:-1])
        self.project_out = nn.Conv2d(dim, out_dim or dim, 1)

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch out_dim height width"]:
        y, gates = self._project(x)
        y = y * gates[0]
        for widen, gate in zip(self.widen, gates[1:], strict=True):
            y = widen(y) * gate
        return self.project_out(y)

    def read_gates(self, x: Float[Tensor, "batch in_dim height width"]) -> dict[str, Tensor]:
        """Return the root mean square of the gates over channels, one (B, H, W) map per order."""
        _, gates = self._project(x)
        return {f"order {i + 1}": gate.square().mean(dim=1).sqrt() for i, gate in enumerate(gates)}

    def merged(self) -> GnConv:
        """Return an equivalent module with the scale folded into the layer that computes the gates."""
        new = deepcopy(self)
        if self.scale is not None:
            spatial = new.spatial
            factors = self.project_in.weight.new_full((sum(self.widths),), self.scale)
            scale_outputs(spatial.post_norm if isinstance(spatial, GlobalLocalFilter) else spatial, factors)
            new.scale = None
        return new

    def _project(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        projected = self.project_in(x)
        first, rest = projected.split([self.widths[0], sum(self.widths)], dim=1)
        # Convolutions do not recognize the memory format of a slice and would treat it as channels-first.
        gates = self.spatial(rest.contiguous(memory_format=_memory_format(projected)))
        if self.scale is not None:
            gates = gates * self.scale
        return first, gates.split(self.widths, dim=1)


def _memory_format(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


class GnConvNormAct(GnConv):
    """gnConv with norm and activation, in place of a convolution unit: (B, C, H, W) -> (B, C', H, W).

    HorFPN uses it in place of every 3x3 output convolution of a feature pyramid network (order 2, 7x7, without norm and
    activation), and of the convolution that fuses all levels in UPerNet (with both).

    Args:
        width_ratio: width of the highest order relative to `out_dim`.
        grid: grid of the global filter; the published default is (32, 17).
        project_out: whether there is a 1x1 convolution at the end; without it, `width_ratio` must be 1.
        norm: constructor of the norm from the number of channels; None for no norm.
        act: constructor of the activation; None for a linear unit.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        order: int = 2,
        kernel_size: int = 7,
        grid: Grid | None = None,
        width_ratio: int = 1,
        project_out: bool = True,
        norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
        act: Callable[[], nn.Module] | None = nn.ReLU,
    ) -> None:
        if width_ratio < 1 or (width_ratio != 1 and not project_out):
            raise ValueError(
                f"width_ratio must be positive, and 1 where no projection follows (project_out=False), "
                f"not {width_ratio}"
            )
        super().__init__(
            width_ratio * out_dim, order, kernel_size=kernel_size, grid=grid, in_dim=in_dim, out_dim=out_dim
        )
        if not project_out:
            self.register_module("project_out", nn.Identity())
        self.norm = nn.Identity() if norm is None else norm(out_dim)
        self.act = nn.Identity() if act is None else act()

    def forward(self, x: Float[Tensor, "batch in_dim height width"]) -> Float[Tensor, "batch out_dim height width"]:
        return self.act(self.norm(super().forward(x)))

    def merged(self) -> GnConvNormAct:
        """Return an equivalent module for eval mode, with a batch norm folded into the last projection."""
        new = deepcopy(self)
        if isinstance(new.norm, nn.BatchNorm2d) and isinstance(new.project_out, nn.Conv2d):
            fold_into_previous(new.project_out, new.norm)
            new.norm = nn.Identity()
        return new
