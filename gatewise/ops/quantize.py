"""Uniform quantizers of 2 to 8 bits: real numbers as integer codes on a grid.

    code  = clamp(round(x / scale) + zero_point, low, high)        (round half to even)
    value = scale * (code - zero_point)

Affine grids cover [minimum, maximum], extended to contain 0, and have a zero point that is a code, so that real zero is
exact: padding and the lower bound of a ReLU cost nothing. Symmetric grids have zero point 0; those of weights leave out
the lowest code (-127..127). A grid belongs to a whole tensor, or to each slice along one axis (a channel).

`fake_quantize` is what training and simulation use: code and back in the forward pass, and in the backward pass the
gradient itself wherever the value lies in the representable range, zero elsewhere.

Weights of few levels, scales per token and straight-through without a mask are in `gatewise.ops.fake_quantize`.

Source: Krishnamoorthi 2018, arXiv:1806.08342, sections 2.1 to 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """The values that codes stand for.

    Attributes:
        scale: distance of two values; one, or one per slice along `axis`; positive.
        zero_point: the code of real 0, int32, in the shape of `scale`.
        low, high: smallest and largest code.
        axis: which axis of the tensor has a scale per index; None for one scale.
    """

    scale: Tensor
    zero_point: Tensor
    low: int
    high: int
    axis: int | None = None

    @property
    def minimum(self) -> Tensor:
        """Smallest value that has a code, in the shape of `scale`."""
        return (self.low - self.zero_point) * self.scale

    @property
    def maximum(self) -> Tensor:
        """Largest value that has a code, in the shape of `scale`."""
        return (self.high - self.zero_point) * self.scale

    def along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in shapes that broadcast against `x`.

        Raises:
            ValueError: if `x` has no such axis, or another number of slices along it.
        """
        if self.axis is None:
            return self.scale, self.zero_point
        if not -x.ndim <= self.axis < x.ndim or x.shape[self.axis] != self.scale.numel():
            raise ValueError(
                f"a grid of {self.scale.numel()} scales along axis {self.axis} does not fit a tensor of shape "
                f"{tuple(x.shape)}"
            )
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return self.scale.view(shape), self.zero_point.view(shape)


def code_range(bits: int, *, signed: bool = False, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest code: 0..255, -128..127 (signed) or -127..127 (signed and narrow) for 8 bits.

    Raises:
        ValueError: for bits outside of 2..8, or a narrow range of unsigned codes.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in {MIN_BITS}..{MAX_BITS}, not {bits}")
    if not signed:
        if narrow:
            raise ValueError("only signed codes have a narrow range, which leaves out the lowest of them")
        return 0, 2**bits - 1
    half = 2 ** (bits - 1)
    return (1 - half if narrow else -half), half - 1


def affine_grid(
    minimum: Float[Tensor, "*channels"],
    maximum: Float[Tensor, "*channels"],
    bits: int = 8,
    *,
    signed: bool = False,
    axis: int | None = None,
    name: str = "a tensor",
) -> Grid:
    """The affine grid over [minimum, maximum], extended to contain 0. A range of nothing but 0 has scale 1.

    Args:
        minimum: a scalar, or one per slice along `axis`.
        maximum: the same.
        name: of the tensor, for errors.
    Raises:
        ValueError: for bits outside of 2..8, a range that is not finite, or a minimum above its maximum.
    """
    low, high = code_range(bits, signed=signed)
    _require_range(minimum, maximum, name)
    minimum, maximum = minimum.clamp_max(0), maximum.clamp_min(0)
    # Each end on its own: the difference of two large ends would overflow.
    scale = _positive(maximum / (high - low) - minimum / (high - low))
    zero_point = (low - minimum / scale).round().clamp(low, high).to(torch.int32)
    return Grid(scale, zero_point, low, high, axis)


def symmetric_grid(
    magnitude: Float[Tensor, "*channels"],
    bits: int = 8,
    *,
    narrow: bool = True,
    axis: int | None = None,
    name: str = "a tensor",
) -> Grid:
    """The grid of signed codes with zero point 0 that reaches `magnitude`. A magnitude of 0 has scale 1.

    Args:
        narrow: leave out the lowest code, as for weights; activations use the full range.
        name: of the tensor, for errors.
    Raises:
        ValueError: for bits outside of 2..8, or a magnitude that is negative or not finite.
    """
    low, high = code_range(bits, signed=True, narrow=narrow)
    _require_range(torch.zeros_like(magnitude), magnitude, name)
    scale = _positive(magnitude / high)
    return Grid(scale, torch.zeros_like(scale, dtype=torch.int32), low, high, axis)


def weight_grid(
    weight: Float[Tensor, "*shape"],
    bits: int = 8,
    *,
    symmetric: bool = True,
    per_channel: bool = True,
    axis: int = 0,
    name: str = "a weight",
) -> Grid:
    """The grid of a weight, from its own smallest and largest values; symmetric grids are narrow.

    Args:
        per_channel: a scale for each slice along `axis`, the output channels; otherwise one scale.
    Raises:
        ValueError: for bits outside of 2..8, or values that are not finite (`name` says whose).
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows = wide.movedim(axis, 0).flatten(1) if per_channel and wide.ndim > 1 else wide.reshape(1, -1)
    minimum, maximum = rows.amin(dim=1), rows.amax(dim=1)
    if not per_channel:
        minimum, maximum = minimum[0], maximum[0]
    along = axis if per_channel else None
    if symmetric:
        return symmetric_grid(torch.maximum(-minimum, maximum), bits, axis=along, name=name)
    return affine_grid(minimum, maximum, bits, axis=along, name=name)


def quantize(x: Float[Tensor, "*shape"], grid: Grid) -> Int[Tensor, "*shape"]:
    """Codes, int32. Computed in float32 at least: half precision cannot hold a code and its zero point exactly."""
    scale, zero_point = grid.along(x)
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    return ((wide / scale).round() + zero_point).clamp(grid.low, grid.high).to(torch.int32)


def dequantize(codes: Int[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """The values of codes, in the dtype of the scale."""
    scale, zero_point = grid.along(codes)
    return (codes - zero_point) * scale


def fake_quantize(x: Float[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """`x` moved to the nearest values of the grid, in its own dtype.

    The gradient is that of `x` where `x` lies between the smallest and the largest value (inclusive), else 0; the grid
    gets none. Section 2.4 of the paper.
    """
    scale, zero_point = grid.along(x)
    return _FakeQuantize.apply(x, scale, zero_point, grid.low, grid.high)


def signal_to_noise(reference: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """Signal-to-quantization-noise ratio in dB: power of `reference` over that of the difference; inf where equal."""
    signal = reference.double().square().sum().item()
    noise = (approximation.double() - reference.double()).square().sum().item()
    if noise == 0:
        return float("inf")
    return 10 * torch.tensor(signal / noise, dtype=torch.float64).log10().item()


class _FakeQuantize(torch.autograd.Function):
    """A byte per value is kept for the backward pass: whether it lies in the representable range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, scale.dtype))
        ctx.save_for_backward((wide >= (low - zero_point) * scale) & (wide <= (high - zero_point) * scale))
        codes = ((wide / scale).round() + zero_point).clamp(low, high)
        return ((codes - zero_point) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None, None


def _positive(scale: Tensor) -> Tensor:
    """Scales without zeros, subnormal numbers included: 1 where the range holds nothing but 0, whose code is exact."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def _require_range(minimum: Tensor, maximum: Tensor, name: str) -> None:
    if torch.compiler.is_compiling():
        return
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        raise ValueError(f"the range of {name} must be finite, not [{minimum.min():g}, {maximum.max():g}]")
    if (minimum > maximum).any():
        raise ValueError(f"the range of {name} must not end below its start: {minimum.max():g} and {maximum.min():g}")
