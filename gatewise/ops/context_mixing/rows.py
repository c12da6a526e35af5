"""Context mixing for a few rows of positions at a time, for devices without kernels, such as CPUs.

Within a row, the kernels of all positions and the values of a strip of the map form two matrices. In the first, entry
((a, b)) of position j is in column (a, j0 + b), and zeros elsewhere make it a band. The sum over a window is then one
matrix product, and so are both of its gradients. A band is written through a strided view, in which neighboring
positions are one column further apart than rows are long. At the borders, where windows do not move, they are not.
Strips of columns keep the share of zeros small on wide maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a band matrix, or of kernels, that are processed at a time (1 MiB in float32), and columns of positions per
# strip. These are fastest on x86, within some ten percent either way.
_BAND = 2**18
_STRIP = 16


class Window(NamedTuple):
    """One of both windows: q, v (B, g, H, W, c); makers (B, g, c, K^2); bias (K^2,); table (g, 2K - 1, 2K - 1)."""

    q: Tensor
    makers: Tensor
    bias: Tensor
    table: Tensor
    v: Tensor

    @property
    def size(self) -> int:
        """Window size K."""
        return (self.table.shape[1] + 1) // 2


class Gradients(NamedTuple):
    """Gradients of a window's members, in their shapes."""

    q: Tensor
    makers: Tensor
    bias: Tensor
    table: Tensor
    v: Tensor


class Strip(NamedTuple):
    """Columns of positions [start, end), and columns of the map [first, last) that their windows reach."""

    start: int
    end: int
    first: int
    last: int


def kernel_makers(centers: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Return the maps from queries to kernels: centers (B, g c, L) and weight (L, taps) to (B, g, c, taps)."""
    return centers.unflatten(1, (heads, -1)) @ weight


def window_starts(length: int, size: int, device: torch.device) -> Tensor:
    """Return where the window of each position starts."""
    return (torch.arange(length, device=device) - size // 2).clamp(0, length - size)


def offsets(length: int, size: int, device: torch.device) -> Tensor:
    """Return the (length, K) row or column of the table for each position and entry of its window."""
    start = window_starts(length, size, device) - torch.arange(length, device=device) + size - 1
    return start[:, None] + torch.arange(size, device=device)


def by_column(table: Tensor, width: int, size: int) -> Tensor:
    """Expand the table's rows for every column of positions: (g, 2K - 1, W, K)."""
    columns = offsets(width, size, table.device)
    return table.index_select(2, columns.flatten()).unflatten(2, columns.shape)


def row_bias(columns: Tensor, rows: Tensor) -> Tensor:
    """Return (g, R, W, K^2): the bias of rows of positions whose windows are at these rows (R, K) of the table."""
    picked = columns.index_select(1, rows.flatten()).unflatten(1, rows.shape)
    return picked.transpose(2, 3).flatten(3)


def forward(window: Window) -> Tensor:
    """Return y: (B, g, H, W, c)."""
    y = torch.empty_like(window.v)
    for block in _Blocks(window):
        kernels = block.kernels()
        for strip in block.strips:
            band, values = block.band(kernels, strip), block.values(strip)
            y[:, :, block.start : block.end, strip.start : strip.end] = block.unflatten(band @ values)
    return y


def backward(window: Window, dy: Tensor) -> Gradients:
    """Return gradients of sum(y dy). Kernels are recomputed block by block."""
    dq, dv = torch.empty_like(window.q), torch.zeros_like(window.v)
    dmakers, dbias = torch.zeros_like(window.makers), torch.zeros_like(window.bias)
    blocks = _Blocks(window)
    dcolumns = torch.zeros_like(blocks.columns)
    for block in blocks:
        kernels = block.kernels()
        dkernels = torch.empty_like(kernels)
        for strip in block.strips:
            own = dy[:, :, block.start : block.end, strip.start : strip.end].flatten(0, 2)
            within = dkernels[:, :, :, strip.start : strip.end]
            block.read_band(own @ block.values(strip).transpose(1, 2), strip, within)
            block.add_values(block.band(kernels, strip).transpose(1, 2) @ own, strip, dv)
        dlogits = torch.ops.aten._softmax_backward_data(dkernels, kernels, -1, kernels.dtype)
        flat = dlogits.flatten(2, 3)
        queries = window.q[:, :, block.start : block.end].flatten(2, 3)
        dq[:, :, block.start : block.end] = (flat @ window.makers.transpose(2, 3)).view(*dlogits.shape[:4], -1)
        dmakers += queries.transpose(2, 3) @ flat
        shared = dlogits.sum(dim=0)
        dbias += shared.sum(dim=(0, 1, 2))
        add_by_row(dcolumns, block.rows, shared)
    return Gradients(dq, dmakers, dbias, table_gradient(dcolumns, window), dv)


def add_by_row(dcolumns: Tensor, rows: Tensor, dbias: Tensor) -> None:
    """Add gradients of a `row_bias` (g, R, W, K^2) where it was read: the inverse of that lookup."""
    size = rows.shape[1]
    by_entry = dbias.unflatten(3, (size, size)).transpose(2, 3).flatten(1, 2)
    dcolumns.index_add_(1, rows.flatten(), by_entry)


def table_gradient(dcolumns: Tensor, window: Window) -> Tensor:
    """Return the gradient of the table: the inverse of `by_column`."""
    columns = offsets(window.v.shape[3], window.size, dcolumns.device)
    return torch.zeros_like(window.table).index_add_(2, columns.flatten(), dcolumns.flatten(2))


def dense_forward(window: Window) -> Tensor:
    """Compute `forward` as one block with operators of exchange formats: bands by lookup and mask."""
    size, (height, width) = window.size, window.v.shape[2:4]
    device = window.v.device
    columns = by_column(window.table, width, size)
    bias = row_bias(columns, offsets(height, size, device)) + window.bias
    logits = (window.q.flatten(2, 3) @ window.makers).unflatten(2, (height, width)) + bias
    kernels = logits.softmax(-1).unflatten(4, (size, size)).transpose(3, 4).flatten(4)
    # Entry b of position j is in column j' = j0 + b: for every pair (j, j') the entry, or none.
    entry = torch.arange(width, device=device) - window_starts(width, size, device)[:, None]
    inside = ((entry >= 0) & (entry < size)).to(kernels.dtype)
    places = entry.clamp(0, size - 1) + size * torch.arange(width, device=device)[:, None]
    band = kernels.index_select(4, places.flatten()).unflatten(4, places.shape) * inside
    band = band.transpose(3, 4).flatten(4)
    picked = window_starts(height, size, device)[:, None] + torch.arange(size, device=device)
    values = window.v.index_select(2, picked.flatten()).unflatten(2, picked.shape).flatten(3, 4)
    return band @ values


class _Blocks:
    """The rows of a map, a few at a time."""

    def __init__(self, window: Window) -> None:
        self.window = window
        height, width = window.v.shape[2:4]
        self.columns = by_column(window.table, width, window.size)
        self.offsets = offsets(height, window.size, window.v.device)
        self.starts = window_starts(height, window.size, window.v.device)
        self.strips = list(_strips(width, window.size))

    def __iter__(self) -> Iterator[_Block]:
        batch, heads, height, width = self.window.v.shape[:4]
        kernels = width * self.window.size
        bands = max((strip.end - strip.start) * (strip.last - strip.first) for strip in self.strips)
        step = max(1, _BAND // (batch * heads * self.window.size * max(kernels, bands)))
        for start in range(0, height, step):
            yield _Block(self, start, min(start + step, height))


class _Block:
    """Rows [start, end) of positions: R of them."""

    def __init__(self, blocks: _Blocks, start: int, end: int) -> None:
        self.window, self.start, self.end, self.strips = blocks.window, start, end, blocks.strips
        self.columns, self.rows = blocks.columns, blocks.offsets[start:end]
        reach = blocks.starts[start:end, None] + torch.arange(self.window.size, device=self.rows.device)
        self.reach = reach.flatten()

    def kernels(self) -> Tensor:
        """Return the kernels (B, g, R, W, K^2)."""
        q = self.window.q[:, :, self.start : self.end]
        logits = (q.flatten(2, 3) @ self.window.makers).view(*q.shape[:4], -1)
        return logits.add_(row_bias(self.columns, self.rows).add_(self.window.bias)).softmax(-1)

    def band(self, kernels: Tensor, strip: Strip) -> Tensor:
        """Return a strip's kernels among zeros: (B g R, columns of positions, K columns of the map)."""
        size, count, reach = self.window.size, strip.end - strip.start, strip.last - strip.first
        lead = kernels.shape[:3]
        band = kernels.new_zeros(*lead, count, size, reach)
        for start, end, view in self._runs(band, strip):
            view.copy_(kernels[:, :, :, start:end].unflatten(4, (size, size)))
        return band.view(-1, count, size * reach)

    def read_band(self, band: Tensor, strip: Strip, kernels: Tensor) -> None:
        """Copy the band of a dense matrix into the strip's kernels (B, g, R, columns of positions, K^2)."""
        size, count, reach = self.window.size, strip.end - strip.start, strip.last - strip.first
        dense = band.view(*kernels.shape[:3], count, size, reach)
        for start, end, view in self._runs(dense, strip):
            kernels[:, :, :, start - strip.start : end - strip.start] = view.flatten(4)

    def values(self, strip: Strip) -> Tensor:
        """Return the values that each row's windows reach: (B g R, K columns of the map, c)."""
        v = self.window.v[:, :, :, strip.first : strip.last]
        return v.index_select(2, self.reach).reshape(v.shape[0] * v.shape[1] * len(self.rows), -1, v.shape[4])

    def add_values(self, gradient: Tensor, strip: Strip, total: Tensor) -> None:
        """Add gradients of `values` where they were read."""
        v = total[:, :, :, strip.first : strip.last]
        v.index_add_(2, self.reach, gradient.view(*v.shape[:2], -1, *v.shape[3:]))

    def unflatten(self, y: Tensor) -> Tensor:
        """Reshape (B g R, W, c) to (B, g, R, W, c)."""
        return y.view(*self.window.v.shape[:2], len(self.rows), *y.shape[1:])

    def _runs(self, band: Tensor, strip: Strip) -> Iterator[tuple[int, int, Tensor]]:
        """Yield columns of positions whose windows stay or move along, with their kernels' view in the band.

        A view is (B, g, R, columns of positions, K, K).
        """
        size, width = self.window.size, self.window.v.shape[3]
        half, reach = size // 2, strip.last - strip.first
        lead = band.stride()[:3]
        for begin, stop, moves in ((0, half, 0), (half, width - half, 1), (width - half, width, 0)):
            start, end = max(begin, strip.start), min(stop, strip.end)
            if start >= end:
                continue
            left = min(max(start - half, 0), width - size) - strip.first
            offset = (start - strip.start) * size * reach + left
            shape = (*band.shape[:3], end - start, size, size)
            strides = (*lead, size * reach + moves, reach, 1)
            yield start, end, band.as_strided(shape, strides, band.storage_offset() + offset)


def _strips(width: int, size: int) -> Iterator[Strip]:
    """Yield strips of about equal width."""
    count = -(-width // _STRIP)
    bounds = [width * n // count for n in range(count + 1)]
    for start, end in pairwise(bounds):
        first = min(max(start - size // 2, 0), width - size)
        last = min(max(end - 1 - size // 2, 0), width - size) + size
        yield Strip(start, end, first, last)
