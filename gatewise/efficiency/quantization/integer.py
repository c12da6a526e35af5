"""Integer arithmetic as on a fixed-point processor: the reference for quantized kernels.

    accumulator = sum (x_q - Z_x) * w_q + b_q                 int32; b_q has the scale S_x * S_w and zero point 0
    y_q = clamp(round(accumulator * M) + Z_y, low, high)      M = S_x * S_w / S_y per channel, M = M0 * 2^-(31 + n)

M0 is a 31-bit integer, so a requantization is one integer product and one shift. The clamp implements the ReLU: where
the output's grid begins at 0, its lowest code is its zero point.

Sources: Krishnamoorthi 2018, arXiv:1806.08342, section 2; fixed-point multipliers: Jacob et al. 2017,
arXiv:1712.05877, section 2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gatewise.errors import Failure
from gatewise.ops.quantize import Grid

INT32_MAX = 2**31 - 1


def quantize_bias(bias: Tensor, input_grid: Grid, weight_grid: Grid) -> Tensor:
    """Return the codes of a bias at the accumulator's scale, int64: (C,) -> (C,)."""
    return (bias / (input_grid.scale * weight_grid.scale)).round().to(torch.int64)


def largest_accumulator(weight_codes: Tensor, bias_codes: Tensor, input_grid: Grid, axis: int = 0) -> int:
    """Return the largest magnitude of a layer's sums over all inputs, for weight codes of shape (C, ...).

    Above `INT32_MAX` the layer cannot be computed in 32 bits. With 8 bits each that takes about 66,000 terms per sum.
    """
    rows = weight_codes.movedim(axis, 0).flatten(1).to(torch.int64)
    zero_point = int(input_grid.zero_point)
    reach = max(input_grid.high - zero_point, zero_point - input_grid.low)
    return int((rows.abs().sum(dim=1) * reach + bias_codes.abs()).max())


def fixed_point(multiplier: float) -> tuple[int, int]:
    """Write a positive multiplier as (M0, n): multiplier = M0 * 2^-(31 + n), with 2^30 <= M0 < 2^31.

    Raises:
        ValueError: if it is not positive and finite.
    """
    if not (multiplier > 0 and math.isfinite(multiplier)):
        raise ValueError(f"a multiplier must be positive and finite, not {multiplier}")
    mantissa, exponent = math.frexp(multiplier)
    fixed = round(mantissa * 2**31)
    if fixed == 2**31:
        return 2**30, -exponent - 1
    return fixed, -exponent


def multiply_fixed(accumulator: Tensor, fixed: Tensor, shift: Tensor) -> Tensor:
    """Return round(accumulator * fixed * 2^-(31 + shift)) in integers, half to even; int64 holds the 62-bit products.

    Raises:
        ValueError: if a multiplier is 2^31 or more, or so small that every accumulator would become 0.
    """
    places = shift + 31
    if not ((places >= 1) & (places <= 62)).all():
        raise ValueError(f"shifts must be in -30..31, not {int(shift.min())}..{int(shift.max())}")
    product = accumulator.to(torch.int64) * fixed
    floor = product >> places
    rest = product - (floor << places)
    half = torch.ones_like(places) << (places - 1)
    up = (rest > half) | ((rest == half) & (floor % 2 == 1))
    return floor + up


def integer_conv2d(
    codes: Tensor,
    input_grid: Grid,
    weight_codes: Tensor,
    weight_grid: Grid,
    bias_codes: Tensor,
    output_grid: Grid,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Convolve codes, and return accumulators and output codes, both int32: (B, C, H, W) -> (B, C', H', W').

    Borders are padded with the input's zero point, which represents 0.

    Args:
        weight_grid: symmetric grid with one scale, or one per output channel.
    Raises:
        ValueError: if the weight's grid is not symmetric.
        Failure: if a sum exceeds 32 bits.
    """
    if weight_grid.zero_point.any():
        raise ValueError("integer kernels take symmetric weights, whose zero point is 0")
    # Sums of integers below 2^53 are exact in float64, which has fast convolutions.
    shifted = (codes - input_grid.zero_point).double()
    sums = F.conv2d(shifted, weight_codes.double(), bias_codes.double(), stride, padding, dilation, groups)
    if sums.abs().max() > INT32_MAX:
        raise Failure(f"a sum of this convolution is {sums.abs().max():.4g}, beyond 32 bits")
    accumulator = sums.to(torch.int32)
    multipliers = (input_grid.scale * weight_grid.scale / output_grid.scale).expand(weight_codes.shape[0])
    pairs = [fixed_point(value) for value in multipliers.tolist()]
    fixed = torch.tensor([pair[0] for pair in pairs]).view(-1, 1, 1)
    shift = torch.tensor([pair[1] for pair in pairs]).view(-1, 1, 1)
    scaled = multiply_fixed(accumulator, fixed, shift) + output_grid.zero_point
    return accumulator, scaled.clamp(output_grid.low, output_grid.high).to(torch.int32)
