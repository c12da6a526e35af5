"""Uniform quantizers of 2 to 8 bits: real numbers as integer codes on a grid.

    code  = clamp(round(x / scale) + zero_point, low, high)        (round half to even)
    value = scale * (code - zero_point)

Affine grids cover [minimum, maximum], extended to contain 0, and have a zero point that is a code. Real zero is
therefore exact, so padding and the lower bound of a ReLU cost nothing. Symmetric grids have zero point 0; those of
weights omit the lowest code (-127..127). A grid belongs to a whole tensor, or to each slice along one axis (a channel).

Training and simulation use `fake_quantize`, which quantizes and dequantizes in the forward pass. Its backward pass
passes the gradient where the value is in the representable range, and returns zero elsewhere.

Weights with few levels, scales per token and unmasked straight-through gradients are in `gatewise.ops.fake_quantize`.

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
    """The values that codes represent.

    Attributes:
        scale: positive distance between two values; one, or one per slice along `axis`.
        zero_point: code of real 0, int32, in the shape of `scale`.
        low, high: smallest and largest code.
        axis: axis of the tensor that has one scale per index; None for one scale.
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
        """Return scale and zero point in shapes that broadcast against `x`.

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
    """Return the smallest and largest code: 0..255, -128..127 (signed) or -127..127 (signed, narrow) for 8 bits.

    Raises:
        ValueError: if bits are outside of 2..8, or a narrow range is requested for unsigned codes.
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
    """Return the affine grid over [minimum, maximum], extended to contain 0. A range of only 0 has scale 1.

    Args:
        minimum: a scalar, or one per slice along `axis`.
        maximum: the same.
        name: name of the tensor, for errors.
    Raises:
        ValueError: if bits are outside of 2..8, the range is not finite, or a minimum is above its maximum.
    """
    low, high = code_range(bits, signed=signed)
    _require_range(minimum, maximum, name)
    minimum, maximum = minimum.clamp_max(0), maximum.clamp_min(0)
    # Divide each end separately, since the difference of two large ends would overflow.
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
    """Return the grid of signed codes with zero point 0 that reaches `magnitude`. A magnitude of 0 has scale 1.

    Args:
        narrow: omit the lowest code, as for weights; activations use the full range.
        name: name of the tensor, for errors.
    Raises:
        ValueError: if bits are outside of 2..8, or a magnitude is negative or not finite.
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
    """Return the grid of a weight, from its own smallest and largest values. Symmetric grids are narrow.

    Args:
        per_channel: use one scale for each slice along `axis`, the output channels, instead of one scale.
    Raises:
        ValueError: if bits are outside of 2..8, or values are not finite (the message contains `name`).
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
    """Return int32 codes. Computed at least in float32: half precision cannot hold code and zero point exactly."""
    scale, zero_point = grid.along(x)
    wide = x.to(torch.promote_types(x.dtype, scale.dtype))
    return ((wide / scale).round() + zero_point).clamp(grid.low, grid.high).to(torch.int32)


def dequantize(codes: Int[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """Return the values of codes, in the dtype of the scale."""
    scale, zero_point = grid.along(codes)
    return (codes - zero_point) * scale


def fake_quantize(x: Float[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """Round `x` to the nearest values of the grid, in its own dtype.

    The gradient passes where `x` is between the smallest and the largest value (inclusive), and is 0 elsewhere. The
    grid gets none. Section 2.4 of the paper.
    """
    scale, zero_point = grid.along(x)
    return _FakeQuantize.apply(x, scale, zero_point, grid.low, grid.high)


def signal_to_noise(reference: Float[Tensor, "*shape"], approximation: Float[Tensor, "*shape"]) -> float:
    """Return the signal-to-quantization-noise ratio in dB: signal power over error power; inf if equal."""
    signal = reference.double().square().sum().item()
    noise = (approximation.double() - reference.double()).square().sum().item()
    if noise == 0:
        return float("inf")
    return 10 * torch.tensor(signal / noise, dtype=torch.float64).log10().item()


class _FakeQuantize(torch.autograd.Function):
    """Keeps one byte per value for the backward pass: whether it is in the representable range."""

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
    """Replace zero and subnormal scales by 1: the range then holds only 0, whose code is exact."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def _require_range(minimum: Tensor, maximum: Tensor, name: str) -> None:
    if torch.compiler.is_compiling():
        return
    if not (minimum.isfinite().all() and maximum.isfinite().all()):
        raise ValueError(f"the range of {name} must be finite, not [{minimum.min():g}, {maximum.max():g}]")
    if (minimum > maximum).any():
        raise ValueError(f"the range of {name} must not end below its start: {minimum.max():g} and {maximum.min():g}")
