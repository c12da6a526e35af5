"""Kernels of the translation-variant convolution.

A position has as many weights as taps, and every sample needs them. A program handles a block of positions and
channels, reads their weights once, keeps them in registers, and walks over a share of the batch. Each sample costs one
read of the map (its neighbors' reads stay in the first-level cache) and one write.

Positions and channels are counted in the memory order of the map, contiguous or channels-last. Weights are laid out tap
by tap in that order, so neighboring lanes read neighboring numbers. Sums are float32.

The gradient of the input gathers, for each of its positions, the outputs that have read it, whose weights are again in
registers. The gradient of the weights is summed over the batch in registers. If the maps are too small to fill the
device, shares of the batch are summed separately and then added, always in the same order.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WANTED_PROGRAMS = 8 if _INTERPRETED else 1024
_TYPICAL_LANES = 32 if _INTERPRETED else 128


def _tuned(key: list[str]) -> Any:
    """Return an autotuner over lanes and warps; the interpreter uses few lanes."""
    if _INTERPRETED:
        return triton.autotune([triton.Config({"LANES": 32})], key=key)
    sizes = [(64, 2), (64, 4), (128, 4), (256, 4), (256, 8)]
    return triton.autotune([triton.Config({"LANES": lanes}, num_warps=warps) for lanes, warps in sizes], key=key)


@triton.jit
def _place(lanes, channels, rows, columns, LAST: tl.constexpr):
    """Return channel, row and column of each lane."""
    if LAST:
        channel, position = lanes % channels, lanes // channels
    else:
        channel, position = lanes // (rows * columns), lanes % (rows * columns)
    return channel, position // columns, position % columns


@_tuned(["channels", "rows", "columns", "SIZE", "STRIDE", "LAST"])
@triton.jit
def _forward_kernel(
    x, weight, bias, y, batch, channels, height, width, rows, columns, x_batch, x_channel, x_row, x_column, share,
    SIZE: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr, HAS_BIAS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    outputs = channels * rows * columns
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    within = lanes < outputs
    channel, row, column = _place(lanes, channels, rows, columns, LAST)
    taps = tl.arange(0, TAPS)[:, None]
    is_tap = (taps < SIZE * SIZE) & within[None, :]
    seen_row = row[None, :] * STRIDE + taps // SIZE - SIZE // 2
    seen_column = column[None, :] * STRIDE + taps % SIZE - SIZE // 2
    inside = is_tap & (seen_row >= 0) & (seen_row < height) & (seen_column >= 0) & (seen_column < width)
    source = channel[None, :] * x_channel + seen_row * x_row + seen_column * x_column
    own = tl.load(weight + taps.to(tl.int64) * outputs + lanes[None, :], mask=is_tap, other=0.0).to(tl.float32)
    start = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        start += tl.load(bias + lanes, mask=within, other=0.0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * share
    for sample in range(first, tl.minimum(first + share, batch)):
        values = tl.load(x + sample * x_batch + source, mask=inside, other=0.0).to(tl.float32)
        sums = start + tl.sum(own * values, axis=0)
        tl.store(y + sample * outputs + lanes, sums.to(y.dtype.element_ty), mask=within)


@_tuned(["channels", "height", "width", "SIZE", "STRIDE", "LAST"])
@triton.jit
def _input_gradient_kernel(
    dy, weight, dx, batch, channels, height, width, rows, columns, dy_batch, dy_channel, dy_row, dy_column, share,
    SIZE: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    inputs = channels * height * width
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    within = lanes < inputs
    channel, row, column = _place(lanes, channels, height, width, LAST)
    taps = tl.arange(0, TAPS)[:, None]
    # Rows and columns, times the stride, of the outputs that have read this input with this tap.
    down = row[None, :] + SIZE // 2 - taps // SIZE
    right = column[None, :] + SIZE // 2 - taps % SIZE
    reader_row, reader_column = down // STRIDE, right // STRIDE
    inside = (taps < SIZE * SIZE) & within[None, :] & (down >= 0) & (right >= 0)
    inside = inside & (down % STRIDE == 0) & (right % STRIDE == 0) & (reader_row < rows) & (reader_column < columns)
    position = reader_row * columns + reader_column
    lane = position * channels + channel[None, :] if LAST else channel[None, :] * (rows * columns) + position
    tap_weights = taps.to(tl.int64) * (channels * rows * columns)
    own = tl.load(weight + tap_weights + lane, mask=inside, other=0.0).to(tl.float32)
    source = channel[None, :] * dy_channel + reader_row * dy_row + reader_column * dy_column
    first = tl.program_id(1).to(tl.int64) * share
    for sample in range(first, tl.minimum(first + share, batch)):
        values = tl.load(dy + sample * dy_batch + source, mask=inside, other=0.0).to(tl.float32)
        sums = tl.sum(own * values, axis=0)
        tl.store(dx + sample * inputs + lanes, sums.to(dx.dtype.element_ty), mask=within)


@_tuned(["channels", "rows", "columns", "SIZE", "STRIDE", "LAST"])
@triton.jit
def _weight_gradient_kernel(
    x, dy, partial, batch, channels, height, width, rows, columns, x_batch, x_channel, x_row, x_column,
    dy_batch, dy_channel, dy_row, dy_column, share,
    SIZE: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    outputs = channels * rows * columns
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    within = lanes < outputs
    channel, row, column = _place(lanes, channels, rows, columns, LAST)
    taps = tl.arange(0, TAPS)[:, None]
    is_tap = (taps < SIZE * SIZE) & within[None, :]
    seen_row = row[None, :] * STRIDE + taps // SIZE - SIZE // 2
    seen_column = column[None, :] * STRIDE + taps % SIZE - SIZE // 2
    inside = is_tap & (seen_row >= 0) & (seen_row < height) & (seen_column >= 0) & (seen_column < width)
    source = channel[None, :] * x_channel + seen_row * x_row + seen_column * x_column
    own = channel * dy_channel + row * dy_row + column * dy_column
    sums = tl.zeros((TAPS, LANES), tl.float32)
    first = tl.program_id(1).to(tl.int64) * share
    for sample in range(first, tl.minimum(first + share, batch)):
        values = tl.load(x + sample * x_batch + source, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(dy + sample * dy_batch + own, mask=within, other=0.0).to(tl.float32)
        sums += values * given[None, :]
    target = (tl.program_id(1) * (SIZE * SIZE) + taps).to(tl.int64) * outputs + lanes[None, :]
    tl.store(partial + target, sums, mask=is_tap)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolve, in the memory format of `x`."""
    batch, channels, height, width = x.shape
    size, rows, columns = weight.shape[1], *weight.shape[3:]
    last = is_channels_last(x)
    y = empty_maps(x, channels, rows, columns)
    taps = _tap_by_tap(weight, last)
    start = taps if bias is None else (bias.permute(1, 2, 0) if last else bias).contiguous()
    share, shares = _shares(batch, channels * rows * columns)
    with torch.cuda.device_of(x):
        _forward_kernel[_grid(channels * rows * columns, shares)](
            x, taps, start, y, batch, channels, height, width, rows, columns, *x.stride(), share,
            **_constants(size, stride, last), HAS_BIAS=bias is not None,
        )  # fmt: skip
    return y


def input_gradient(dy: Tensor, weight: Tensor, height: int, width: int, stride: int) -> Tensor:
    """Return the gradient of the input, in the memory format of `dy`."""
    batch, channels, rows, columns = dy.shape
    last = is_channels_last(dy)
    dx = empty_maps(dy, channels, height, width)
    share, shares = _shares(batch, channels * height * width)
    with torch.cuda.device_of(dy):
        _input_gradient_kernel[_grid(channels * height * width, shares)](
            dy, _tap_by_tap(weight, last), dx, batch, channels, height, width, rows, columns, *dy.stride(), share,
            **_constants(weight.shape[1], stride, last),
        )  # fmt: skip
    return dx


def weight_gradient(x: Tensor, dy: Tensor, size: int, stride: int) -> Tensor:
    """Return the gradient of the weight, (channels, K, K, h, w), laid out tap by tap in the order of `x`."""
    batch, channels, height, width = x.shape
    rows, columns = dy.shape[2:]
    last = is_channels_last(x)
    share, shares = _shares(batch, channels * rows * columns)
    partial = x.new_empty(shares, size * size, channels * rows * columns, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[_grid(channels * rows * columns, shares)](
            x, dy, partial, batch, channels, height, width, rows, columns, *x.stride(), *dy.stride(), share,
            **_constants(size, stride, last),
        )  # fmt: skip
    total = partial.sum(dim=0).to(x.dtype)
    if last:
        return total.view(size, size, rows, columns, channels).permute(4, 0, 1, 2, 3)
    return total.view(size, size, channels, rows, columns).permute(2, 0, 1, 3, 4)


def is_channels_last(x: Tensor) -> bool:
    """Return whether lanes are counted with channels innermost."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def empty_maps(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Allocate maps whose memory order is the order in which lanes are counted for `like`."""
    if is_channels_last(like):
        return like.new_empty(like.shape[0], height, width, channels).permute(0, 3, 1, 2)
    return like.new_empty(like.shape[0], channels, height, width)


def _tap_by_tap(weight: Tensor, last: bool) -> Tensor:
    return (weight.permute(1, 2, 3, 4, 0) if last else weight.permute(1, 2, 0, 3, 4)).contiguous()


def _shares(batch: int, lanes: int) -> tuple[int, int]:
    """Return samples per share and the number of shares, no more than it takes to fill the device."""
    wanted = triton.cdiv(_WANTED_PROGRAMS, triton.cdiv(lanes, _TYPICAL_LANES))
    share = triton.cdiv(batch, max(1, min(wanted, batch)))
    return share, triton.cdiv(batch, share)


def _grid(lanes: int, shares: int) -> Any:
    return lambda meta: (triton.cdiv(lanes, meta["LANES"]), shares)


def _constants(size: int, stride: int, last: bool) -> dict[str, Any]:
    return {"SIZE": size, "TAPS": triton.next_power_of_2(size * size), "STRIDE": stride, "LAST": last}
