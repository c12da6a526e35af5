"""The conv-first block in one kernel for channels-last maps.

A program handles a block of output pixels, counted through the whole batch so that small maps fill blocks too. It
filters them, all channels at once, and keeps the result. Then it walks over the hidden channels in chunks: expand,
activate, project, add. Neither the filtered nor the hidden map is ever in memory. Sums are float32; operands of matrix
products are rounded to the dtype of x, as between the layers of the plain block.

Groups use matrix units: the taps of a group are read as a block of a matrix of channels by channels that is zero
elsewhere. That multiplies many zeros, but the smallest tile of tensor cores has 16 channels, and the filtered channels
would otherwise have to be assembled from parts, which registers cannot do. Depthwise kernels need no product at all.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from gatewise.ops.block_fusion.cpu import Unit

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies bfloat16 as if its bits were integers.
_WIDEN = tl.constexpr(_INTERPRETED)

# Activations by index; a kernel is compiled for one of them.
_ACTIVATIONS = ("identity", "relu", "relu6", "silu", "gelu", "hardswish")

# Pixels, hidden channels at a time, and warps.
_BLOCKS = [(32, 32, 4), (64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 8)]


def _tuned() -> Any:
    """Return an autotuner over the blocks; the interpreter uses the smallest one."""
    blocks = [(16, 16, 4)] if _INTERPRETED else _BLOCKS
    configs = [
        triton.Config({"PIXELS": pixels, "CHUNK": chunk}, num_warps=warps, num_stages=2)
        for pixels, chunk, warps in blocks
    ]
    return triton.autotune(configs, key=["width", "CHANNELS", "HIDDEN", "OUT", "SIZE", "STRIDE", "GROUP"])


@triton.jit
def _activate(z, NUMBER: tl.constexpr):
    """Apply the activation with this index in `_ACTIVATIONS`, in float32."""
    if NUMBER == 1:
        z = tl.maximum(z, 0.0)
    elif NUMBER == 2:
        z = tl.minimum(tl.maximum(z, 0.0), 6.0)
    elif NUMBER == 3:
        z = z * tl.sigmoid(z)
    elif NUMBER == 4:
        # 1 / sqrt(2)
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NUMBER == 5:
        z = z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0
    return z


@triton.jit
def _product(a, b):
    """Compute the matrix product in float32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _filtered(
    x, spatial, bias, sample, row, column, present, height, width,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Convolve a block of pixels spatially, (PIXELS, LANES); `row` and `column` are those of its centers."""
    lanes = tl.arange(0, LANES)
    within = lanes < CHANNELS
    sums = tl.zeros((PIXELS, LANES), tl.float32)
    if HAS_BIAS:
        sums += tl.load(bias + lanes, mask=within, other=0.0).to(tl.float32)[None, :]
    for tap in range(SIZE * SIZE):
        i, j = row + tap // SIZE - SIZE // 2, column + tap % SIZE - SIZE // 2
        inside = present & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        source = ((sample * height + i) * width + j) * CHANNELS
        values = tl.load(x + source[:, None] + lanes[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        if GROUP == 1:
            taps = tl.load(spatial + tap * CHANNELS + lanes, mask=within, other=0.0)
            sums += values.to(tl.float32) * taps.to(tl.float32)[None, :]
        else:
            together = (lanes[:, None] // GROUP == lanes[None, :] // GROUP) & within[:, None] & within[None, :]
            place = (tap * GROUP + lanes[:, None] % GROUP) * CHANNELS + lanes[None, :]
            taps = tl.load(spatial + place, mask=together, other=0.0)
            sums += _product(values, taps)
    return sums


@_tuned()
@triton.jit
def _conv_first_kernel(
    x, spatial, spatial_bias, expand, expand_bias, project, project_bias, y,
    positions, height, width, out_height, out_width,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, HIDDEN: tl.constexpr, OUT: tl.constexpr, OUT_LANES: tl.constexpr,
    GROUP: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr,
    SPATIAL_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SPATIAL_BIAS: tl.constexpr, HAS_EXPAND_BIAS: tl.constexpr, HAS_PROJECT_BIAS: tl.constexpr,
    PIXELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pixels = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    present = pixels < positions
    sample = pixels // (out_height * out_width)
    row, column = (pixels // out_width) % out_height * STRIDE, pixels % out_width * STRIDE
    lanes, out_lanes = tl.arange(0, LANES), tl.arange(0, OUT_LANES)
    within, out_within = lanes < CHANNELS, out_lanes < OUT
    filtered = _filtered(
        x, spatial, spatial_bias, sample, row, column, present, height, width,
        CHANNELS, LANES, GROUP, SIZE, HAS_SPATIAL_BIAS, PIXELS,
    )  # fmt: skip
    filtered = _activate(filtered, SPATIAL_ACTIVATION).to(x.dtype.element_ty)
    sums = tl.zeros((PIXELS, OUT_LANES), tl.float32)
    for first in range(0, HIDDEN, CHUNK):
        channels = first + tl.arange(0, CHUNK)
        valid = channels < HIDDEN
        weight = tl.load(
            expand + channels[None, :] * CHANNELS + lanes[:, None], mask=within[:, None] & valid[None, :], other=0.0
        )
        hidden = _product(filtered, weight)
        if HAS_EXPAND_BIAS:
            hidden += tl.load(expand_bias + channels, mask=valid, other=0.0).to(tl.float32)[None, :]
        hidden = _activate(hidden, ACTIVATION).to(x.dtype.element_ty)
        weight = tl.load(
            project + out_lanes[None, :] * HIDDEN + channels[:, None],
            mask=valid[:, None] & out_within[None, :], other=0.0,
        )  # fmt: skip
        sums += _product(hidden, weight)
    if HAS_PROJECT_BIAS:
        sums += tl.load(project_bias + out_lanes, mask=out_within, other=0.0).to(tl.float32)[None, :]
    place = pixels[:, None] * OUT + out_lanes[None, :]
    stored = present[:, None] & out_within[None, :]
    if RESIDUAL:
        # With stride 1 and equal channels, an output pixel has the address of its input pixel.
        sums += tl.load(x + place, mask=stored, other=0.0).to(tl.float32)
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=stored)


def conv_first(x: Tensor, spatial: Unit, expand: Unit, project: Unit, residual: bool) -> Tensor:
    """Run the block, channels-last. Requirements are listed in `gatewise.ops.block_fusion.conv_first_path`."""
    batch, channels, height, width = x.shape
    group, size, stride = spatial.weight.shape[1], spatial.weight.shape[-1], spatial.stride
    hidden, out = expand.weight.shape[0], project.weight.shape[0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    x = x.contiguous(memory_format=torch.channels_last)
    y = x.new_empty(batch, out_height, out_width, out)
    # The weights of a tap are contiguous: (K K, input of a group, output).
    taps = spatial.weight.permute(2, 3, 1, 0).contiguous()
    weights = [expand.weight.flatten(1).contiguous(), project.weight.flatten(1).contiguous()]
    biases = [unit.bias for unit in (spatial, expand, project)]
    # A kernel needs a pointer even without a bias, and does not read it.
    pointers = [taps if bias is None else bias.contiguous() for bias in biases]
    positions = batch * out_height * out_width
    with torch.cuda.device_of(x):
        _conv_first_kernel[lambda meta: (triton.cdiv(positions, meta["PIXELS"]),)](
            x.permute(0, 2, 3, 1), taps, pointers[0], weights[0], pointers[1], weights[1], pointers[2], y,
            positions, height, width, out_height, out_width,
            CHANNELS=channels, LANES=_lanes(channels), HIDDEN=hidden, OUT=out, OUT_LANES=_lanes(out), GROUP=group,
            SIZE=size, STRIDE=stride, RESIDUAL=residual, SPATIAL_ACTIVATION=_ACTIVATIONS.index(spatial.activation),
            ACTIVATION=_ACTIVATIONS.index(expand.activation), HAS_SPATIAL_BIAS=biases[0] is not None,
            HAS_EXPAND_BIAS=biases[1] is not None, HAS_PROJECT_BIAS=biases[2] is not None,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def _lanes(channels: int) -> int:
    """Return the smallest block size that matrix units support: a power of 2, at least 16."""
    return max(16, triton.next_power_of_2(channels))
