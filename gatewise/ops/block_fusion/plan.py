"""Where a fused block is cut, so that what it holds at a time fits a memory and least is moved.

A tile is rows x columns of the block's output. All of the block happens to it before the next tile is begun, and the
hidden channels pass by in chunks, so that a tile holds (in numbers, not bytes)

    conv first:   tile (C + chunk + K)                     the filtered input, a hidden chunk, the output
    MBConv:       window (C + chunk) + tile (chunk + K)    the input and a hidden chunk with halo, and without

where a window is the rows x columns of input that a tile depends on. A tile moves

    window C + tile K, and all weights unless they stay beside the buffers from tile to tile.

Source: Lavin 2024, arXiv:2404.03617, the idea of depth-first execution; the planning is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, lcm
from pathlib import Path
from typing import Literal, NamedTuple

Form = Literal["conv first", "mbconv"]

LEAST_CHANNELS = 32
"""Hidden channels in the smallest chunk: thinner matrix products leave most of any processor idle."""

VECTOR = 16
"""Channels that chunks are multiples of: as many float32 numbers fill the widest registers of a CPU."""

USUAL_CACHE = 1 << 20
"""Bytes of second-level cache, where the system does not tell."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Tile(NamedTuple):
    """Rows and columns of output, and hidden channels, in work at a time."""

    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block and its input.

    Args:
        form: which of the convolutions is spatial: the first ("conv first"), or the middle one ("mbconv").
        in_dim: channels of the input.
        hidden_dim: channels in the middle.
        dim: channels of the output.
        group_width: channels per group of the spatial convolution.
        expands: whether an "mbconv" has a pointwise convolution before the spatial one.
        chunked: whether hidden channels may pass by in chunks.
    """

    form: Form
    batch: int
    in_dim: int
    hidden_dim: int
    dim: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    group_width: int = 1
    expands: bool = True
    chunked: bool = True

    @property
    def out_height(self) -> int:
        return (self.height - 1) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width - 1) // self.stride + 1

    @property
    def weights(self) -> int:
        """Numbers in all weights and biases."""
        spatial = self.in_dim if self.form == "conv first" else self.hidden_dim
        total = spatial * (self.kernel_size**2 * self.group_width + 1) + self.dim * (self.hidden_dim + 1)
        return total + (self.hidden_dim * (self.in_dim + 1) if self.expands else 0)

    @property
    def least_channels(self) -> int:
        """The smallest chunk of hidden channels."""
        if not (self.expands and self.chunked):
            return self.hidden_dim
        return min(self.hidden_dim, ceil(LEAST_CHANNELS / self._granule) * self._granule)

    @property
    def _granule(self) -> int:
        """What chunks are multiples of: whole groups, and whole vectors of a processor."""
        return lcm(self.group_width, VECTOR) if self.form == "mbconv" else VECTOR

    def window(self, tile: Tile) -> int:
        """Input positions that a tile depends on, padding included."""
        reach = self.kernel_size - self.stride
        return (tile.rows * self.stride + reach) * (tile.columns * self.stride + reach)

    def workspace(self, tile: Tile) -> int:
        """Numbers that are held while a tile is in work."""
        area = tile.rows * tile.columns
        if self.form == "conv first":
            return area * (self.in_dim + tile.channels + self.dim)
        return self.window(tile) * self._before(tile) + area * (tile.channels + self.dim)

    def _before(self, tile: Tile) -> int:
        """Channels of an MBConv's buffers with halo."""
        return self.in_dim + (tile.channels if self.expands else 0)

    def widest(self, rows: int, columns: int, numbers: int) -> Tile | None:
        """The tile of this size with the fewest chunks, cut evenly, in so many numbers; None if the least is too much.

        The workspace is linear in the chunk.
        """
        none, one = (self.workspace(Tile(rows, columns, channels)) for channels in (0, 1))
        fits = (numbers - none) // (one - none)
        if fits < self.least_channels:
            return None
        if fits >= self.hidden_dim:
            return Tile(rows, columns, self.hidden_dim)
        chunks = ceil(self.hidden_dim / (fits // self._granule * self._granule))
        return Tile(rows, columns, ceil(self.hidden_dim / chunks / self._granule) * self._granule)


@dataclass(frozen=True)
class TilePlan:
    """A tile, and what it costs.

    Attributes:
        bytes_moved: between the memory that was planned for and the one behind it, for the whole block.
        workspace_bytes: held at a time.
        tiles: how many there are.
        weights_stay: whether all weights fit beside the buffers, and are read once.
    """

    tile: Tile
    bytes_moved: int
    workspace_bytes: int
    tiles: int
    weights_stay: bool


def plan_tiles(shape: BlockShape, capacity_bytes: int, unit_bytes: int, *, whole_rows: bool = False) -> TilePlan:
    """The tile that fits `capacity_bytes` and moves least; of equal ones the one with the fewest steps.

        bytes = unit (N ceil(P / rows) ceil(Q / columns) window C + N P Q K + weights tiles / reuse)

    with reuse all tiles where the weights fit too, else 1. A larger capacity never moves more: it offers every tile
    that a smaller one does, at the same cost or less.

    Args:
        unit_bytes: of a number.
        whole_rows: tiles as wide as the map, which lie in one piece in channels-last memory.
    Raises:
        ValueError: if no tile fits.
    """
    if capacity_bytes < 1 or unit_bytes < 1:
        raise ValueError(f"capacity and unit must be positive numbers of bytes, not {capacity_bytes} and {unit_bytes}")
    plans = [plan for size in _sizes(shape, whole_rows) for plan in _plans(shape, size, capacity_bytes, unit_bytes)]
    if not plans:
        smallest = Tile(1, shape.out_width if whole_rows else 1, shape.least_channels)
        needed = unit_bytes * shape.workspace(smallest)
        raise ValueError(f"no tile fits {capacity_bytes} bytes: the smallest, {tuple(smallest)}, needs {needed}")
    return min(plans, key=lambda plan: (plan.bytes_moved, _steps(shape, plan), plan.workspace_bytes))


def _plans(shape: BlockShape, size: tuple[int, int], capacity: int, unit: int) -> Iterator[TilePlan]:
    """The plans for tiles of this size: with the weights kept, and without."""
    for stay in (True, False):
        left = capacity // unit - (shape.weights if stay else 0)
        tile = shape.widest(*size, left)
        if tile is not None:
            tiles = shape.batch * ceil(shape.out_height / tile.rows) * ceil(shape.out_width / tile.columns)
            moved = tiles * shape.window(tile) * shape.in_dim + shape.weights * (1 if stay else tiles)
            moved += shape.batch * shape.out_height * shape.out_width * shape.dim
            yield TilePlan(tile, unit * moved, unit * shape.workspace(tile), tiles, stay)


def _sizes(shape: BlockShape, whole_rows: bool) -> Iterator[tuple[int, int]]:
    """Rows and columns that cut the output evenly."""
    columns = [shape.out_width] if whole_rows else _even_cuts(shape.out_width)
    for rows in _even_cuts(shape.out_height):
        for width in columns:
            yield rows, width


def _even_cuts(length: int) -> list[int]:
    return sorted({ceil(length / parts) for parts in range(1, length + 1)})


def _steps(shape: BlockShape, plan: TilePlan) -> int:
    return plan.tiles * ceil(shape.hidden_dim / plan.tile.channels)


@cache
def cache_bytes() -> int:
    """Second-level cache of one core, as the system tells; `USUAL_CACHE` where it does not."""
    for level in sorted(_CACHES.glob("index*/level")):
        size = level.with_name("size")
        if level.read_text(encoding="ascii").strip() == "2" and size.exists():
            return _bytes(size.read_text(encoding="ascii").strip())
    return USUAL_CACHE


def _bytes(text: str) -> int:
    """512K -> 524288."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
    return int(text.rstrip("KMG")) * scale


@cache
def plan_bands(shape: BlockShape, capacity_bytes: int, unit_bytes: int) -> Tile:
    """The tile for a CPU: bands of whole rows; several small images together, as rows beyond the height.

    A cache is no hard limit. Where not even one row fits, a row at a time is what comes closest.
    """
    smallest = Tile(1, shape.out_width, shape.least_channels)
    if unit_bytes * shape.workspace(smallest) > capacity_bytes:
        return smallest
    tile = plan_tiles(shape, capacity_bytes, unit_bytes, whole_rows=True).tile
    if tile.rows < shape.out_height:
        return tile
    images = capacity_bytes // (unit_bytes * shape.workspace(tile))
    return tile._replace(rows=tile.rows * max(1, min(images, shape.batch)))
