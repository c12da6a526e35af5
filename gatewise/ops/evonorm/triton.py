"""Kernels of EvoNorm for contiguous and channels-last maps.

A program handles one image, a block of channels and a share of the positions, which it processes in tiles. The layer
needs two passes in each direction, as batch norm does: one reduces over positions, one writes. In between, library
calls process tensors of the size (batch, channels). The map's gradient is computed only from the map and the output's
gradient; nothing else of the map's size is kept. Shares are always merged in the same order.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatewise.ops.evonorm import statistics as small
from gatewise.ops.evonorm.statistics import BatchSums

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 16 if _INTERPRETED else 2048
_TILES_PER_SHARE = 2 if _INTERPRETED else 8


@triton.jit
def _lanes(channels, CHANNELS: tl.constexpr):
    """Return the channels of this program (its first axis counts images and blocks of channels) and the image."""
    blocks = tl.cdiv(channels, CHANNELS)
    sample = tl.program_id(0) // blocks
    lanes = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)
    return sample.to(tl.int64), lanes


@triton.jit
def _tile(first, sample, lanes, channels, positions, last, sample_stride, channel_stride, position_stride,
          POSITIONS: tl.constexpr):  # fmt: skip
    """Return offsets of a tile (positions, channels), and which of them are within the map and the share."""
    rows = first + tl.arange(0, POSITIONS)
    offsets = sample * sample_stride + rows[:, None].to(tl.int64) * position_stride + lanes[None, :] * channel_stride
    inside = (rows < tl.minimum(last, positions))[:, None] & (lanes < channels)[None, :]
    return offsets, inside


@triton.jit
def _table(table, sample, lanes, channels):
    """Load one value per channel from a table (batch, channels)."""
    return tl.load(table + sample * channels + lanes, mask=lanes < channels, other=0.0)[None, :]


@triton.jit
def _vector(vector, lanes, channels):
    """Load one value per channel."""
    return tl.load(vector + lanes, mask=lanes < channels, other=0.0)[None, :]


@triton.jit
def _moments_kernel(
    x, means, squares, channels, positions, sample_stride, channel_stride, position_stride, share,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    start = tl.program_id(1) * share
    mean = tl.zeros((CHANNELS,), tl.float32)
    square = tl.zeros((CHANNELS,), tl.float32)
    count = 0.0
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        added = tl.minimum(positions, start + share) - first
        added = tl.minimum(added, POSITIONS).to(tl.float32)
        tile_mean = tl.sum(values, axis=0) / added
        centered = tl.where(inside, values - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        square += tl.sum(centered * centered, axis=0) + delta * delta * (count * added / (count + added))
        mean += delta * (added / (count + added))
        count += added
    target = (tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(channels, CHANNELS)) + sample) * channels + lanes
    tl.store(means + target, mean, mask=lanes < channels)
    tl.store(squares + target, square, mask=lanes < channels)


@triton.jit
def _gate(x, v, lanes, channels, HAS_V: tl.constexpr):
    """Return sigmoid(v x) and v."""
    factor = tl.full((1, 1), 1.0, tl.float32)
    if HAS_V:
        factor = _vector(v, lanes, channels)
    return tl.sigmoid(x * factor), factor


@triton.jit
def _grouped_forward_kernel(
    x, y, scale, bias, v, channels, positions, sample_stride, channel_stride, position_stride, share,
    GATED: tl.constexpr, HAS_V: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    factor, shift = _table(scale, sample, lanes, channels), _vector(bias, lanes, channels)
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            values *= _gate(values, v, lanes, channels, HAS_V)[0]
        tl.store(y + offsets, (values * factor + shift).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_sums_kernel(
    x, dy, v, partial, stride, channels, positions, sample_stride, channel_stride, position_stride, share,
    GATED: tl.constexpr, HAS_V: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    start = tl.program_id(1) * share
    activated = tl.zeros((CHANNELS,), tl.float32)
    plain = tl.zeros((CHANNELS,), tl.float32)
    of_gate = tl.zeros((CHANNELS,), tl.float32)
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        gradients = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        f = values
        if GATED:
            f = values * _gate(values, v, lanes, channels, HAS_V)[0]
        activated += tl.sum(gradients * f, axis=0)
        plain += tl.sum(gradients, axis=0)
        of_gate += tl.sum(gradients * f * (values - f), axis=0)
    target = (tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(channels, CHANNELS)) + sample) * channels + lanes
    tl.store(partial + target, activated, mask=lanes < channels)
    tl.store(partial + stride + target, plain, mask=lanes < channels)
    tl.store(partial + 2 * stride + target, of_gate, mask=lanes < channels)


@triton.jit
def _grouped_gradient_kernel(
    x, dy, dx, scale, v, p, q, channels, positions, sample_stride, channel_stride, position_stride, share,
    GATED: tl.constexpr, HAS_V: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    factor = _table(scale, sample, lanes, channels)
    constant, linear = _table(p, sample, lanes, channels), _table(q, sample, lanes, channels)
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        gradients = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32) * factor
        if GATED:
            gate, times = _gate(values, v, lanes, channels, HAS_V)
            gradients *= gate * (1.0 + times * values * (1.0 - gate))
        tl.store(dx + offsets, (gradients + constant + linear * values).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _batch_forward_kernel(
    x, y, slope, offset, deviation, weight, bias,
    channels, positions, sample_stride, channel_stride, position_stride, share,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    a, c = _table(slope, sample, lanes, channels), _table(offset, sample, lanes, channels)
    # Lanes beyond the channels divide by 1.
    s = tl.load(deviation + lanes, mask=lanes < channels, other=1.0)[None, :]
    factor, shift = _vector(weight, lanes, channels), _vector(bias, lanes, channels)
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        y_values = values / tl.maximum(s, a * values + c) * factor + shift
        tl.store(y + offsets, y_values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _batch_sums_kernel(
    x, dy, slope, offset, deviation, partial, stride,
    channels, positions, sample_stride, channel_stride, position_stride, share,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    a, c = _table(slope, sample, lanes, channels), _table(offset, sample, lanes, channels)
    s = tl.load(deviation + lanes, mask=lanes < channels, other=1.0)[None, :]
    start = tl.program_id(1) * share
    normalized = tl.zeros((CHANNELS,), tl.float32)
    plain = tl.zeros((CHANNELS,), tl.float32)
    left = tl.zeros((CHANNELS,), tl.float32)
    right = tl.zeros((CHANNELS,), tl.float32)
    right_squared = tl.zeros((CHANNELS,), tl.float32)
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        gradients = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        line = a * values + c
        over_m = values / tl.maximum(s, line)
        normalized += tl.sum(gradients * over_m, axis=0)
        plain += tl.sum(gradients, axis=0)
        twice = gradients * over_m / tl.maximum(s, line)
        left += tl.sum(tl.where(line > s, 0.0, twice), axis=0)
        right += tl.sum(tl.where(line > s, twice, 0.0), axis=0)
        right_squared += tl.sum(tl.where(line > s, twice * values, 0.0), axis=0)
    target = (tl.program_id(1) * (tl.num_programs(0) // tl.cdiv(channels, CHANNELS)) + sample) * channels + lanes
    tl.store(partial + target, normalized, mask=lanes < channels)
    tl.store(partial + stride + target, plain, mask=lanes < channels)
    tl.store(partial + 2 * stride + target, left, mask=lanes < channels)
    tl.store(partial + 3 * stride + target, right, mask=lanes < channels)
    tl.store(partial + 4 * stride + target, right_squared, mask=lanes < channels)


@triton.jit
def _batch_gradient_kernel(
    x, dy, dx, slope, offset, deviation, weight, p, q,
    channels, positions, sample_stride, channel_stride, position_stride, share,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, lanes = _lanes(channels, CHANNELS)
    a, c = _table(slope, sample, lanes, channels), _table(offset, sample, lanes, channels)
    s = tl.load(deviation + lanes, mask=lanes < channels, other=1.0)[None, :]
    factor = _vector(weight, lanes, channels)
    constant, linear = _table(p, sample, lanes, channels), _table(q, sample, lanes, channels)
    start = tl.program_id(1) * share
    for first in range(start, tl.minimum(start + share, positions), POSITIONS):
        offsets, inside = _tile(
            first, sample, lanes, channels, positions, start + share, sample_stride, channel_stride, position_stride,
            POSITIONS,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        gradients = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        line = a * values + c
        m = tl.maximum(s, line)
        local = gradients * factor / m * tl.where(line > s, c / m, 1.0)
        tl.store(dx + offsets, (local + constant + linear * values).to(dx.dtype.element_ty), mask=inside)


class _Plan(NamedTuple):
    """The way in which all kernels walk over a map."""

    grid: tuple[int, int]
    sizes: tuple[int, ...]
    tiles: dict[str, int]
    shares: int


def _plan(x: Tensor) -> _Plan:
    """Plan tiles that follow the memory: long in positions for contiguous maps, wide in channels for channels-last."""
    batch, channels, height, width = x.shape
    positions = height * width
    if x.is_contiguous():
        strides = (channels * positions, positions, 1)
        rows = min(triton.next_power_of_2(positions), _TILE)
        lanes = min(triton.next_power_of_2(channels), max(1, _TILE // rows))
    else:
        strides = (channels * positions, 1, channels)
        lanes = min(triton.next_power_of_2(channels), 4 if _INTERPRETED else 64)
        rows = min(triton.next_power_of_2(positions), _TILE // lanes)
    share = rows * _TILES_PER_SHARE
    shares = triton.cdiv(positions, share)
    return _Plan(
        (batch * triton.cdiv(channels, lanes), shares),
        (channels, positions, *strides, share),
        {"POSITIONS": rows, "CHANNELS": lanes},
        shares,
    )


def grouped_forward(
    x: Tensor, weight: Tensor, bias: Tensor, v: Tensor | None, groups: int, eps: float, centered: bool, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and center and inverse standard deviation of every group (N, G), for the S series."""
    x = _dense(x)
    plan, y = _plan(x), torch.empty_like(x)
    center, rstd = small.group_statistics(*_moments(x, plan), groups, eps, centered)
    scale = small.per_channel(rstd, x.shape[1]) * weight
    _run(_grouped_forward_kernel, plan, x, y, scale, bias, bias if v is None else v, GATED=gated, HAS_V=v is not None)
    return y, center, rstd


def grouped_backward(
    dy: Tensor, x: Tensor, weight: Tensor, v: Tensor | None, center: Tensor, rstd: Tensor, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v for the S series."""
    x = _dense(x)
    dy, plan, dx = _like(dy, x), _plan(x), torch.empty_like(x)
    flags: dict[str, Any] = {"GATED": gated, "HAS_V": v is not None}
    factor = weight if v is None else v
    partial = _partial(x, plan, 3)
    _run(_grouped_sums_kernel, plan, x, dy, factor, partial, partial[0].numel(), **flags)
    sums = partial.sum(dim=1)
    found = small.group_gradients(sums[0], sums[1], sums[2], weight, center, rstd, x[0, 0].numel())
    scale = small.per_channel(rstd, x.shape[1]) * weight
    _run(_grouped_gradient_kernel, plan, x, dy, dx, scale, factor, found.p, found.q, **flags)
    return dx, found.weight, found.bias, found.v


def batch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    v: Tensor | None,
    running_var: Tensor | None,
    member: str,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, mean and variance of every image and channel, and those of the batch, for the B series.

    With `running_var`, those of the batch are zeros and `running_var`.
    """
    x = _dense(x)
    plan, y = _plan(x), torch.empty_like(x)
    mean, var = _moments(x, plan)
    if running_var is None:
        center, variance = small.batch_statistics(mean, var)
    else:
        center, variance = torch.zeros_like(weight), running_var.clone()
    line = small.instance_line(member, mean, var, v, eps, centered)
    deviation = (variance + eps).sqrt()
    _run(_batch_forward_kernel, plan, x, y, line.slope.contiguous(), line.offset, deviation, weight, bias)
    return y, mean, var, center, variance


def batch_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Tensor | None,
    moments: tuple[Tensor, Tensor],
    batch: tuple[Tensor, Tensor],
    member: str,
    eps: float,
    centered: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of x, weight, bias and v for the B series.

    Args:
        moments: mean and variance of every image and channel.
        batch: mean and variance of the batch.
        trained: whether the batch's moments depend on x.
    """
    x = _dense(x)
    dy, plan, dx, positions = _like(dy, x), _plan(x), torch.empty_like(x), x[0, 0].numel()
    (mean, var), (center, variance) = moments, batch
    line, deviation = small.instance_line(member, mean, var, v, eps, centered), (variance + eps).sqrt()
    slope = line.slope.contiguous()
    partial = _partial(x, plan, 5)
    _run(_batch_sums_kernel, plan, x, dy, slope, line.offset, deviation, partial, partial[0].numel())
    sums = BatchSums(*partial.sum(dim=1).unbind())
    found = small.instance_gradients(sums, member, weight, mean, line, centered, positions)
    p, q = found.p, found.q
    if trained:
        constant, linear = small.batch_line(sums.left, weight, center, deviation, positions)
        p, q = p + constant, q + linear
    _run(_batch_gradient_kernel, plan, x, dy, dx, slope, line.offset, deviation, weight, p, q)
    return dx, found.weight, found.bias, found.v


def _run(kernel: Any, plan: _Plan, x: Tensor, *arguments: Any, **flags: Any) -> None:
    with torch.cuda.device_of(x):
        kernel[plan.grid](x, *arguments, *plan.sizes, **flags, **plan.tiles)


def _partial(x: Tensor, plan: _Plan, sums: int) -> Tensor:
    """Allocate sums for every share, image and channel."""
    return x.new_empty(sums, plan.shares, *x.shape[:2], dtype=torch.float32)


def _moments(x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every image and channel, merged from those of the shares."""
    partial, positions = _partial(x, plan, 2), x[0, 0].numel()
    _run(_moments_kernel, plan, x, partial[0], partial[1])
    share = plan.sizes[-1]
    counts = torch.full((plan.shares, 1, 1), float(share), device=x.device)
    counts[-1] = positions - share * (plan.shares - 1)
    mean = (partial[0] * counts).sum(dim=0) / positions
    squares = partial[1] + (partial[0] - mean).square() * counts
    return mean, squares.sum(dim=0) / positions


def _dense(x: Tensor) -> Tensor:
    """Return `x` in one of the two formats."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if x.is_contiguous() or last else x.contiguous()


def _like(dy: Tensor, x: Tensor) -> Tensor:
    """Return `dy` in the format of `x`."""
    return dy.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)
