"""Fused blocks on a CPU: a band of rows passes through the whole block while it is in the cache.

Maps are (N, H, W, C) in memory, so a band is a matrix of pixels by channels. Pointwise convolutions are one matrix
product per band and chunk of hidden channels, from and into buffers that all bands share, and activations work in
place. The spatial convolution is the library's: it is as fast on a band as on a map, and sums over taps would only
reach a quarter to two thirds of its speed.

A block whose hidden maps fit completely is computed layer by layer, with activations in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatewise.ops.block_fusion.plan import Tile

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": torch.ops.aten.gelu_.default,
    "hardswish": lambda x: F.hardswish(x, inplace=True),
}


class Unit(NamedTuple):
    """A convolution, which pads by half of its odd kernel on each side, and the activation after it."""

    weight: Tensor
    bias: Tensor | None
    activation: str = "identity"
    stride: int = 1


class _Band(NamedTuple):
    """Images, output rows, the input rows that they read, and rows of zeros above and below those.

    A band of whole maps has no rows of zeros: the convolution pads it itself.
    """

    images: slice
    rows: slice
    source: slice
    above: int
    below: int
    whole: bool


def conv_first(x: Tensor, spatial: Unit, expand: Unit, project: Unit, residual: bool, tile: Tile) -> Tensor:
    """Run spatial convolution, expansion and projection: (N, C, H, W) -> (N, K, P, Q), channels-last."""
    source = _pixels(x)
    if _fits_whole(source, spatial, expand.weight.shape[0], tile):
        return _layers(source, [spatial, expand, project], residual)
    memory = _Memory(source)
    hidden = _Hidden(expand, tile.channels, memory)

    def chunks(band: _Band) -> Iterator[tuple[slice, Tensor]]:
        return hidden.chunks(_filter_band(source, band, spatial, memory))

    return _in_bands(source, chunks, spatial, project, residual, tile)


def mbconv(x: Tensor, expand: Unit | None, spatial: Unit, project: Unit, residual: bool, tile: Tile) -> Tensor:
    """Run expansion, spatial convolution and projection: (N, C, H, W) -> (N, K, P, Q), channels-last."""
    source = _pixels(x)
    if _fits_whole(source, spatial, spatial.weight.shape[0], tile):
        return _layers(source, [spatial, project] if expand is None else [expand, spatial, project], residual)
    memory = _Memory(source)
    hidden = None if expand is None else _Hidden(expand, tile.channels, memory)

    def chunks(band: _Band) -> Iterator[tuple[slice, Tensor]]:
        if hidden is None:
            return iter([(slice(0, spatial.weight.shape[0]), _filter_band(source, band, spatial, memory))])
        return _filtered_chunks(source, band, hidden, spatial)

    return _in_bands(source, chunks, spatial, project, residual, tile)


def _in_bands(
    source: Tensor,
    chunks: Callable[[_Band], Iterator[tuple[slice, Tensor]]],
    spatial: Unit,
    project: Unit,
    residual: bool,
    tile: Tile,
) -> Tensor:
    """Return the projection of the chunks of each band, (N, K, P, Q)."""
    height, width = _out_size(source, spatial)
    out = source.new_empty(source.shape[0], height, width, project.weight.shape[0])
    for band in _bands(source, spatial, tile.rows):
        target = out[band.images, band.rows]
        _project(chunks(band), project, target)
        if residual:
            target.add_(source[band.images, band.rows])
    return out.permute(0, 3, 1, 2)


def _fits_whole(source: Tensor, spatial: Unit, hidden: int, tile: Tile) -> bool:
    return tile.rows >= source.shape[0] * _out_size(source, spatial)[0] and tile.channels >= hidden


def _out_size(source: Tensor, spatial: Unit) -> tuple[int, int]:
    return (source.shape[1] - 1) // spatial.stride + 1, (source.shape[2] - 1) // spatial.stride + 1


def _layers(source: Tensor, units: list[Unit], residual: bool) -> Tensor:
    """Run the block layer by layer: (N, H, W, C) -> (N, K, P, Q)."""
    y = source.permute(0, 3, 1, 2)
    for unit in units:
        border, groups = unit.weight.shape[-1] // 2, y.shape[1] // unit.weight.shape[1]
        y = IN_PLACE[unit.activation](F.conv2d(y, unit.weight, unit.bias, unit.stride, border, 1, groups))
    y = y.add_(source.permute(0, 3, 1, 2)) if residual else y
    return y.contiguous(memory_format=torch.channels_last)


class _Memory:
    """Memory that is reused by tensors needed one after the other."""

    def __init__(self, like: Tensor) -> None:
        self.like, self.memory = like, like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """Return a tensor of this shape with arbitrary content."""
        numbers = prod(shape)
        if self.memory.numel() < numbers:
            # Free the old memory before allocating the new.
            self.memory = self.like.new_empty(0)
            self.memory = self.like.new_empty(numbers)
        return self.memory[:numbers].view(shape)


class _Hidden:
    """The expansion, a chunk of hidden channels at a time, each in the memory of the one before it."""

    def __init__(self, expand: Unit, channels: int, memory: _Memory) -> None:
        self.weight, self.bias = expand.weight.flatten(1).t(), expand.bias
        self.activate = IN_PLACE[expand.activation]
        self.channels, self.memory = channels, memory

    def slices(self) -> Iterator[slice]:
        hidden = self.weight.shape[1]
        for first in range(0, hidden, self.channels):
            yield slice(first, min(first + self.channels, hidden))

    def expand(self, pixels: Tensor, chunk: slice, out: Tensor) -> Tensor:
        """Write hidden channels of the chunk, pixels by channels, into `out`."""
        _multiply(pixels, self.weight[:, chunk], None if self.bias is None else self.bias[chunk], out)
        return self.activate(out)

    def chunks(self, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for chunk in self.slices():
            yield chunk, self.expand(pixels, chunk, self.memory.take(len(pixels), chunk.stop - chunk.start))


def _filtered_chunks(source: Tensor, band: _Band, hidden: _Hidden, spatial: Unit) -> Iterator[tuple[slice, Tensor]]:
    """Yield chunks of an MBConv's hidden channels after the spatial convolution.

    Its padding is zero, not the expansion of zeros.
    """
    pixels = _matrix(source[band.images, band.source])
    images, width = band.images.stop - band.images.start, source.shape[2]
    # Only bands of one image have rows of zeros, since there is one place for them above and one below.
    above, below = band.above * width, band.below * width
    for chunk in hidden.slices():
        channels = chunk.stop - chunk.start
        window = hidden.memory.take(above + len(pixels) + below, channels)
        window[:above].zero_()
        window[above + len(pixels) :].zero_()
        hidden.expand(pixels, chunk, window[above : above + len(pixels)])
        bias = None if spatial.bias is None else spatial.bias[chunk]
        unit = Unit(spatial.weight[chunk], bias, spatial.activation, spatial.stride)
        yield chunk, _filter(window.view(images, -1, width, channels), unit, band.whole)


def _filter_band(source: Tensor, band: _Band, spatial: Unit, memory: _Memory) -> Tensor:
    """Run the spatial convolution on the rows that a band reads, with activation: (pixels, channels)."""
    window = source[band.images, band.source]
    if band.above or band.below:
        rows = window.shape[1]
        padded = memory.take(window.shape[0], band.above + rows + band.below, *window.shape[2:])
        padded[:, : band.above].zero_()
        padded[:, band.above : band.above + rows].copy_(window)
        padded[:, band.above + rows :].zero_()
        window = padded
    return _filter(window, spatial, band.whole)


def _filter(window: Tensor, spatial: Unit, whole: bool) -> Tensor:
    """Run the spatial convolution on (images, rows, width, channels), with activation: (pixels, channels).

    Columns are padded; rows only if these are whole maps.
    """
    border = spatial.weight.shape[-1] // 2
    groups = window.shape[3] // spatial.weight.shape[1]
    padding = (border if whole else 0, border)
    y = F.conv2d(window.permute(0, 3, 1, 2), spatial.weight, spatial.bias, spatial.stride, padding, 1, groups)
    return IN_PLACE[spatial.activation](y.permute(0, 2, 3, 1).reshape(-1, y.shape[1]))


def _project(chunks: Iterator[tuple[slice, Tensor]], project: Unit, out: Tensor) -> None:
    """Write the sum of the chunks' projections into `out` (images, rows, width, channels).

    Half precision is rounded once, as in the plain block, so several chunks are added in float32.
    """
    target = _matrix(out)
    weight = project.weight.flatten(1).t()
    sums = target
    for chunk, hidden in chunks:
        if chunk.start == 0:
            if chunk.stop < weight.shape[0]:
                sums = target.to(torch.promote_types(target.dtype, torch.float32))
            bias = None if project.bias is None else project.bias.to(sums.dtype)
            _multiply(hidden.to(sums.dtype), weight[chunk].to(sums.dtype), bias, sums)
        else:
            sums.addmm_(hidden.to(sums.dtype), weight[chunk].to(sums.dtype))
        # Free a chunk before the next one is computed.
        del hidden
    if sums is not target:
        target.copy_(sums)


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _pixels(x: Tensor) -> Tensor:
    """Return x as contiguous (N, H, W, C); a view for channels-last maps."""
    return x.permute(0, 2, 3, 1).contiguous()


def _matrix(band: Tensor) -> Tensor:
    """View (images, rows, width, channels) as pixels by channels."""
    return band.view(-1, band.shape[3])


def _bands(source: Tensor, spatial: Unit, rows: int) -> Iterator[_Band]:
    """Yield bands of about `rows` rows, with several images per band if that exceeds one image."""
    batch, height = source.shape[:2]
    border, stride, total = spatial.weight.shape[-1] // 2, spatial.stride, _out_size(source, spatial)[0]
    together = max(1, rows // total)
    for first in range(0, batch, together):
        images = slice(first, min(first + together, batch))
        if rows >= total:
            yield _Band(images, slice(0, total), slice(0, height), 0, 0, whole=True)
            continue
        for begin in range(0, total, rows):
            end = min(begin + rows, total)
            top, bottom = begin * stride - border, (end - 1) * stride + border + 1
            inside = slice(max(top, 0), min(bottom, height))
            yield _Band(images, slice(begin, end), inside, max(-top, 0), max(bottom - height, 0), whole=False)
