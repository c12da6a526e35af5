"""Kernels of context mixing: one window at a time, with positions before channels.

Forward, a program handles a few positions of one head. It walks over the entries of their kernels block by block: the
logits of a block are a small matrix product, the softmax is updated as it goes, and the block's values are gathered by
address, so no kernel is ever stored. At borders, windows are shifted by their start; only excess entries of blocks are
masked.

Backward, the kernels and their gradients are written once, for one window of one operator at a time, because the
library then computes products with both: gradients of queries, of the kernel makers, and of both biases. The gradient
of the values is a gather too. A program handles positions of one row of the map. The rows whose windows reach it are a
range, and with the columns of one of them at a time, the kernels form a band for a matrix product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gatewise.ops.context_mixing.rows import Gradients, Window, add_by_row, by_column, offsets, table_gradient

# Positions, and entries of their kernels, that are processed at a time.
_BLOCK = 16


@triton.jit
def _starts(places, length, SIZE: tl.constexpr):
    """Return where the windows of these rows or columns start."""
    return tl.minimum(tl.maximum(places - SIZE // 2, 0), length - SIZE)


@triton.jit
def _logits(
    queries, makers, bias, table, head, rows, columns, top, left, first,
    SIZE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Return logits of a block of entries for a block of positions: (positions, entries)."""
    entries = first + tl.arange(0, ENTRIES)
    lanes = tl.arange(0, LANES)
    within = entries < SIZE * SIZE
    maker = tl.load(
        makers + entries[:, None] * DIM + lanes[None, :], mask=within[:, None] & (lanes < DIM)[None, :], other=0.0
    )
    z = tl.dot(queries, tl.trans(maker.to(tl.float32)), input_precision="ieee")
    z += tl.load(bias + entries, mask=within, other=0.0)[None, :]
    across: tl.constexpr = 2 * SIZE - 1
    down = (top - rows + SIZE - 1)[:, None] + (entries // SIZE)[None, :]
    right = (left - columns + SIZE - 1)[:, None] + (entries % SIZE)[None, :]
    z += tl.load(table + head * across * across + down * across + right, mask=within[None, :], other=0.0)
    return tl.where(within[None, :], z, float("-inf"))


@triton.jit
def _sources(top, left, width, first, SIZE: tl.constexpr, ENTRIES: tl.constexpr):
    """Return the positions that a block of entries reads: (positions, entries)."""
    entries = first + tl.arange(0, ENTRIES)
    return (top[:, None] + (entries // SIZE)[None, :]) * width + left[:, None] + (entries % SIZE)[None, :]


@triton.jit
def _forward_kernel(
    q, makers, bias, table, v, y, heads, height, width,
    SIZE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    map_index = tl.program_id(1).to(tl.int64)
    count = height * width
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    present = positions < count
    rows, columns = positions // width, positions % width
    # Positions beyond the map read the same as those of row 0, and are not stored.
    rows = tl.where(present, rows, 0)
    top, left = _starts(rows, height, SIZE), _starts(columns, width, SIZE)
    lanes, value_lanes = tl.arange(0, LANES), tl.arange(0, VALUE_LANES)
    queries = tl.load(
        q + (map_index * count + positions[:, None]) * DIM + lanes[None, :],
        mask=present[:, None] & (lanes < DIM)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    makers += map_index * SIZE * SIZE * DIM
    highest = tl.full((POSITIONS,), float("-inf"), tl.float32)
    total = tl.zeros((POSITIONS,), tl.float32)
    sums = tl.zeros((POSITIONS, VALUE_LANES), tl.float32)
    for first in range(0, SIZE * SIZE, ENTRIES):
        z = _logits(
            queries, makers, bias, table, map_index % heads, rows, columns, top, left, first, SIZE, DIM, LANES, ENTRIES
        )
        new = tl.maximum(highest, tl.max(z, axis=1))
        kernel = tl.exp(z - new[:, None])
        shrink = tl.exp(highest - new)
        source = map_index * count + _sources(top, left, width, first, SIZE, ENTRIES)
        within = (first + tl.arange(0, ENTRIES)) < SIZE * SIZE
        values = tl.load(
            v + source[:, :, None] * VALUE_DIM + value_lanes[None, None, :],
            mask=within[None, :, None] & (value_lanes < VALUE_DIM)[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total = total * shrink + tl.sum(kernel, axis=1)
        sums = sums * shrink[:, None] + tl.sum(kernel[:, :, None] * values, axis=1)
        highest = new
    target = (map_index * count + positions[:, None]) * VALUE_DIM + value_lanes[None, :]
    stored = present[:, None] & (value_lanes < VALUE_DIM)[None, :]
    tl.store(y + target, (sums / total[:, None]).to(y.dtype.element_ty), mask=stored)


@triton.jit
def _kernels_kernel(
    q, makers, bias, table, v, dy, kernels, dkernels, heads, height, width,
    SIZE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Write the kernels of a block of positions, and the gradients of sum(y dy) for them."""
    map_index = tl.program_id(1).to(tl.int64)
    count = height * width
    positions = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    present = positions < count
    rows, columns = positions // width, positions % width
    rows = tl.where(present, rows, 0)
    top, left = _starts(rows, height, SIZE), _starts(columns, width, SIZE)
    lanes, value_lanes = tl.arange(0, LANES), tl.arange(0, VALUE_LANES)
    queries = tl.load(
        q + (map_index * count + positions[:, None]) * DIM + lanes[None, :],
        mask=present[:, None] & (lanes < DIM)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    gradient = tl.load(
        dy + (map_index * count + positions[:, None]) * VALUE_DIM + value_lanes[None, :],
        mask=present[:, None] & (value_lanes < VALUE_DIM)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    makers += map_index * SIZE * SIZE * DIM
    head = map_index % heads
    highest = tl.full((POSITIONS,), float("-inf"), tl.float32)
    total = tl.zeros((POSITIONS,), tl.float32)
    for first in range(0, SIZE * SIZE, ENTRIES):
        z = _logits(queries, makers, bias, table, head, rows, columns, top, left, first, SIZE, DIM, LANES, ENTRIES)
        new = tl.maximum(highest, tl.max(z, axis=1))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(z - new[:, None]), axis=1)
        highest = new
    for first in range(0, SIZE * SIZE, ENTRIES):
        z = _logits(queries, makers, bias, table, head, rows, columns, top, left, first, SIZE, DIM, LANES, ENTRIES)
        entries = first + tl.arange(0, ENTRIES)
        within = entries < SIZE * SIZE
        source = map_index * count + _sources(top, left, width, first, SIZE, ENTRIES)
        values = tl.load(
            v + source[:, :, None] * VALUE_DIM + value_lanes[None, None, :],
            mask=within[None, :, None] & (value_lanes < VALUE_DIM)[None, None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        target = (map_index * count + positions[:, None]) * (SIZE * SIZE) + entries[None, :]
        stored = present[:, None] & within[None, :]
        tl.store(kernels + target, tl.exp(z - highest[:, None]) / total[:, None], mask=stored)
        tl.store(dkernels + target, tl.sum(gradient[:, None, :] * values, axis=2), mask=stored)


@triton.jit
def _value_gradient_kernel(
    kernels, dy, dv, height, width,
    SIZE: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_LANES: tl.constexpr,
    POSITIONS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    map_index = tl.program_id(2).to(tl.int64)
    row, begin = tl.program_id(1), tl.program_id(0) * POSITIONS
    columns = begin + tl.arange(0, POSITIONS)
    value_lanes = tl.arange(0, VALUE_LANES)
    last = tl.minimum(begin + POSITIONS, width) - 1
    # Rows and columns of positions whose windows reach this row, and any of these columns.
    top = tl.where(row < SIZE, 0, row - SIZE // 2)
    bottom = tl.where(row >= height - SIZE, height - 1, row + SIZE // 2)
    left = tl.where(begin < SIZE, 0, begin - SIZE // 2)
    right = tl.where(last >= width - SIZE, width - 1, last + SIZE // 2)
    sums = tl.zeros((POSITIONS, VALUE_LANES), tl.float32)
    for i in range(top, bottom + 1):
        down = row - _starts(i, height, SIZE)
        for first in range(left, right + 1, ENTRIES):
            j = first + tl.arange(0, ENTRIES)
            entry = columns[:, None] - _starts(j, width, SIZE)[None, :]
            meets = (entry >= 0) & (entry < SIZE) & (j <= right)[None, :] & (columns < width)[:, None]
            position = map_index * height * width + i * width + j
            kernel = tl.load(kernels + position[None, :] * (SIZE * SIZE) + down * SIZE + entry, mask=meets, other=0.0)
            gradient = tl.load(
                dy + position[:, None] * VALUE_DIM + value_lanes[None, :],
                mask=(j <= right)[:, None] & (value_lanes < VALUE_DIM)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            sums += tl.dot(kernel, gradient, input_precision="ieee")
    target = ((map_index * height + row) * width + columns[:, None]) * VALUE_DIM + value_lanes[None, :]
    stored = (columns < width)[:, None] & (value_lanes < VALUE_DIM)[None, :]
    tl.store(dv + target, sums.to(dv.dtype.element_ty), mask=stored)


def _lanes(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _arguments(window: Window) -> tuple[Tensor, ...]:
    """Return q, makers (B, g, taps, c), bias, table and v, all contiguous."""
    makers = window.makers.transpose(2, 3)
    return tuple(x.contiguous() for x in (window.q, makers, window.bias, window.table, window.v))


def forward(window: Window) -> Tensor:
    """Return y: (B, g, H, W, c)."""
    arguments = _arguments(window)
    y = torch.empty_like(arguments[-1])
    batch, heads, height, width, value_dim = y.shape
    dim = window.q.shape[4]
    with torch.cuda.device_of(y):
        _forward_kernel[(triton.cdiv(height * width, _BLOCK), batch * heads)](
            *arguments, y, heads, height, width, SIZE=window.size, DIM=dim, LANES=_lanes(dim), VALUE_DIM=value_dim,
            VALUE_LANES=_lanes(value_dim), POSITIONS=_BLOCK, ENTRIES=_BLOCK,
        )  # fmt: skip
    return y


def backward(window: Window, dy: Tensor) -> Gradients:
    """Return gradients of sum(y dy)."""
    height, width = window.v.shape[2:4]
    kernels, dkernels, dv = _kernels_and_values(window, dy)
    dlogits = torch.ops.aten._softmax_backward_data(dkernels, kernels, -1, kernels.dtype)
    del kernels, dkernels
    flat = dlogits.flatten(2, 3)
    dq = (flat @ window.makers.transpose(2, 3)).view(window.q.shape)
    dmakers = window.q.flatten(2, 3).transpose(2, 3) @ flat
    shared = dlogits.sum(dim=0)
    dcolumns = torch.zeros_like(by_column(window.table, width, window.size))
    add_by_row(dcolumns, offsets(height, window.size, dy.device), shared)
    return Gradients(dq, dmakers, shared.sum(dim=(0, 1, 2)), table_gradient(dcolumns, window), dv)


def _kernels_and_values(window: Window, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernels and their gradients, (B, g, H, W, taps), and the gradient of the values."""
    arguments, dy = _arguments(window), dy.contiguous()
    batch, heads, height, width, value_dim = dy.shape
    dim, size = window.q.shape[4], window.size
    kernels = dy.new_empty(batch, heads, height, width, size**2, dtype=torch.float32)
    dkernels, dv = torch.empty_like(kernels), torch.empty_like(arguments[-1])
    with torch.cuda.device_of(dy):
        _kernels_kernel[(triton.cdiv(height * width, _BLOCK), batch * heads)](
            *arguments, dy, kernels, dkernels, heads, height, width, SIZE=size, DIM=dim, LANES=_lanes(dim),
            VALUE_DIM=value_dim, VALUE_LANES=_lanes(value_dim), POSITIONS=_BLOCK, ENTRIES=_BLOCK,
        )  # fmt: skip
        _value_gradient_kernel[(triton.cdiv(width, _BLOCK), height, batch * heads)](
            kernels, dy, dv, height, width, SIZE=size, VALUE_DIM=value_dim, VALUE_LANES=_lanes(value_dim),
            POSITIONS=_BLOCK, ENTRIES=_BLOCK,
        )  # fmt: skip
    return kernels, dkernels, dv
