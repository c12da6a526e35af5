"""Kernels of the large depthwise convolution for channels-last maps.

A map is read as a list of pixels with all channels of a pixel side by side. A program handles a block of pixels,
counted through the whole batch so that small maps fill blocks too, and a block of channels. It walks over the taps,
whose overlapping reads stay in the first-level cache. Sums are float32.

The gradient of the input is the same convolution with the flipped kernel. That of the weight sums over pixels: a
program handles a row of taps and a share of the pixels, and the shares are then added, always in the same order.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PIXELS_PER_SHARE = 64 if _INTERPRETED else 4096


def _tuned(blocks: list[tuple[int, int, int]], smallest: tuple[int, int], key: list[str]) -> Any:
    """Return an autotuner over blocks of pixels, channels and warps; the interpreter uses the smallest block."""
    if _INTERPRETED:
        return triton.autotune([triton.Config({"PIXELS": smallest[0], "CHANNELS": smallest[1]})], key=key)
    configs = [
        triton.Config({"PIXELS": pixels, "CHANNELS": channels}, num_warps=warps) for pixels, channels, warps in blocks
    ]
    return triton.autotune(configs, key=key)


@_tuned([(32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 8), (128, 32, 8)], (32, 16), ["channels", "width", "SIZE"])
@triton.jit
def _forward_kernel(
    x, weight, bias, y, positions, channels, height, width,
    SIZE: tl.constexpr, DILATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    pixels = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    lanes = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    within = lanes < channels
    rows, columns = (pixels // width) % height, pixels % width
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + lanes, mask=within, other=0.0).to(tl.float32)[None, :]
    for p in range(SIZE):
        down = (p - SIZE // 2) * DILATION
        row = rows + down
        in_map = (pixels < positions) & (row >= 0) & (row < height)
        for q in tl.static_range(SIZE):
            right = (q - SIZE // 2) * DILATION
            column = columns + right
            inside = in_map & (column >= 0) & (column < width)
            source = (pixels + down * width + right) * channels
            values = tl.load(x + source[:, None] + lanes[None, :], mask=inside[:, None] & within[None, :], other=0.0)
            tap = tl.load(weight + (p * SIZE + q) * channels + lanes, mask=within, other=0.0)
            sums += values.to(tl.float32) * tap.to(tl.float32)[None, :]
    target = pixels[:, None] * channels + lanes[None, :]
    tl.store(y + target, sums.to(y.dtype.element_ty), mask=(pixels < positions)[:, None] & within[None, :])


@_tuned([(4, 32, 4), (8, 32, 4), (8, 64, 8), (16, 32, 8)], (8, 16), ["channels", "width", "SIZE"])
@triton.jit
def _weight_gradient_kernel(
    x, dy, partial, positions, channels, height, width, share,
    SIZE: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    lanes = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    within = lanes < channels
    p = tl.program_id(1)
    down = (p - SIZE // 2) * DILATION
    taps = tl.arange(0, TAPS)
    right = (taps - SIZE // 2) * DILATION
    first = tl.program_id(2).to(tl.int64) * share
    last = tl.minimum(first + share, positions)
    sums = tl.zeros((TAPS, CHANNELS), tl.float32)
    for start in range(0, share, PIXELS):
        pixels = first + start + tl.arange(0, PIXELS)
        row, column = (pixels // width) % height + down, (pixels % width)[:, None] + right[None, :]
        in_map = (pixels < last) & (row >= 0) & (row < height)
        inside = in_map[:, None] & (column >= 0) & (column < width) & (taps < SIZE)[None, :]
        source = (pixels[:, None] + down * width + right[None, :]) * channels
        values = tl.load(
            x + source[:, :, None] + lanes[None, None, :], mask=inside[:, :, None] & within[None, None, :], other=0.0
        )
        gradients = tl.load(
            dy + pixels[:, None] * channels + lanes[None, :], mask=(pixels < last)[:, None] & within[None, :], other=0.0
        )
        sums += tl.sum(values.to(tl.float32) * gradients.to(tl.float32)[:, None, :], axis=0)
    target = ((tl.program_id(2) * SIZE + p) * SIZE + taps).to(tl.int64) * channels
    tl.store(partial + target[:, None] + lanes[None, :], sums, mask=(taps < SIZE)[:, None] & within[None, :])


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """Convolve a channels-last map, channels-last."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    positions = batch * height * width
    taps = weight.permute(1, 2, 3, 0).contiguous()
    with torch.cuda.device_of(x):
        _forward_kernel[
            lambda meta: (triton.cdiv(positions, meta["PIXELS"]), triton.cdiv(channels, meta["CHANNELS"]))
        ](
            x, taps, taps if bias is None else bias, y, positions, channels, height, width,
            SIZE=weight.shape[-1], DILATION=dilation, HAS_BIAS=bias is not None,
        )  # fmt: skip
    return y


def weight_gradient(x: Tensor, dy: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Return the gradient of the weight, (channels, 1, K, K), in the dtype of `x`."""
    batch, channels, height, width = x.shape
    x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
    positions = batch * height * width
    share = min(_PIXELS_PER_SHARE, triton.next_power_of_2(positions))
    shares = triton.cdiv(positions, share)
    partial = x.new_empty(shares, kernel_size, kernel_size, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[lambda meta: (triton.cdiv(channels, meta["CHANNELS"]), kernel_size, shares)](
            x, dy, partial, positions, channels, height, width, share,
            SIZE=kernel_size, TAPS=triton.next_power_of_2(kernel_size), DILATION=dilation,
        )  # fmt: skip
    return partial.sum(dim=0).permute(2, 0, 1)[:, None].to(x.dtype).contiguous()
