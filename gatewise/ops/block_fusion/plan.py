"""Plan the tiles of a fused block, so that its working set fits a memory and least data is moved.

A tile is rows x columns of the block's output. It passes through the whole block before the next tile is started, and
hidden channels are processed in chunks, so a tile holds (in numbers, not bytes)

    conv first:   tile (C + chunk + K)                     the filtered input, a hidden chunk, the output
    MBConv:       window (C + chunk) + tile (chunk + K)    the input and a hidden chunk with halo, and without

where a window is the rows x columns of input that a tile depends on. A tile moves

    window C + tile K, and all weights unless they stay beside the buffers from tile to tile.

Source: Lavin 2024, arXiv:2404.03617, for the idea of depth-first execution; the planning is ours.
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
"""Smallest chunk of hidden channels: thinner matrix products leave most of any processor idle."""

VECTOR = 16
"""Chunks are multiples of this many channels: as many float32 numbers fill the widest registers of a CPU."""

USUAL_CACHE = 1 << 20
"""Bytes of second-level cache, if the system does not report it."""

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Tile(NamedTuple):
    """Rows and columns of output, and hidden channels, that are processed at a time."""

    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a block and its input.

    Args:
        form: position of the spatial convolution: first ("conv first") or in the middle ("mbconv").
        in_dim: channels of the input.
        hidden_dim: channels in the middle.
        dim: channels of the output.
        group_width: channels per group of the spatial convolution.
        expands: whether an "mbconv" has a pointwise convolution before the spatial one.
        chunked: whether hidden channels may be processed in chunks.
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
        """Smallest chunk of hidden channels."""
        if not (self.expands and self.chunked):
            return self.hidden_dim
        return min(self.hidden_dim, ceil(LEAST_CHANNELS / self._granule) * self._granule)

    @property
    def _granule(self) -> int:
        """Chunk granularity: whole groups, and whole vectors of a processor."""
        return lcm(self.group_width, VECTOR) if self.form == "mbconv" else VECTOR

    def window(self, tile: Tile) -> int:
        """Return the number of input positions that a tile depends on, padding included."""
        reach = self.kernel_size - self.stride
        return (tile.rows * self.stride + reach) * (tile.columns * self.stride + reach)

    def workspace(self, tile: Tile) -> int:
        """Return how many numbers are held while a tile is processed."""
        area = tile.rows * tile.columns
        if self.form == "conv first":
            return area * (self.in_dim + tile.channels + self.dim)
        return self.window(tile) * self._before(tile) + area * (tile.channels + self.dim)

    def _before(self, tile: Tile) -> int:
        """Return the channels of an MBConv's buffers that have a halo."""
        return self.in_dim + (tile.channels if self.expands else 0)

    def widest(self, rows: int, columns: int, numbers: int) -> Tile | None:
        """Return the tile of this size with the fewest even chunks that fits `numbers`, or None if none fits.

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
    """A tile and its cost.

    Attributes:
        bytes_moved: traffic of the whole block between the planned-for memory and the next larger one.
        workspace_bytes: bytes held at a time.
        tiles: number of tiles.
        weights_stay: whether all weights fit beside the buffers, and are read once.
    """

    tile: Tile
    bytes_moved: int
    workspace_bytes: int
    tiles: int
    weights_stay: bool


def plan_tiles(shape: BlockShape, capacity_bytes: int, unit_bytes: int, *, whole_rows: bool = False) -> TilePlan:
    """Return the tile that fits `capacity_bytes` and moves least; of equal ones the one with the fewest steps.

        bytes = unit (N ceil(P / rows) ceil(Q / columns) window C + N P Q K + weights tiles / reuse)

    where reuse is all tiles if the weights fit too, else 1. A larger capacity never moves more, since it offers every
    tile that a smaller one does, at the same cost or less.

    Args:
        unit_bytes: bytes per number.
        whole_rows: use tiles as wide as the map, which are contiguous in channels-last memory.
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
    """Yield the plans for tiles of this size, with the weights kept and without."""
    for stay in (True, False):
        left = capacity // unit - (shape.weights if stay else 0)
        tile = shape.widest(*size, left)
        if tile is not None:
            tiles = shape.batch * ceil(shape.out_height / tile.rows) * ceil(shape.out_width / tile.columns)
            moved = tiles * shape.window(tile) * shape.in_dim + shape.weights * (1 if stay else tiles)
            moved += shape.batch * shape.out_height * shape.out_width * shape.dim
            yield TilePlan(tile, unit * moved, unit * shape.workspace(tile), tiles, stay)


def _sizes(shape: BlockShape, whole_rows: bool) -> Iterator[tuple[int, int]]:
    """Yield rows and columns that divide the output evenly."""
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
    """Return the second-level cache of one core as the system reports it, or else `USUAL_CACHE`."""
    for level in sorted(_CACHES.glob("index*/level")):
        size = level.with_name("size")
        if level.read_text(encoding="ascii").strip() == "2" and size.exists():
            return _bytes(size.read_text(encoding="ascii").strip())
    return USUAL_CACHE


def _bytes(text: str) -> int:
    """Parse a size: 512K -> 524288."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1], 1)
    return int(text.rstrip("KMG")) * scale


@cache
def plan_bands(shape: BlockShape, capacity_bytes: int, unit_bytes: int) -> Tile:
    """Return the tile for a CPU: bands of whole rows, with several small images together as rows beyond the height.

    A cache is not a hard limit. If not even one row fits, a row at a time comes closest.
    """
    smallest = Tile(1, shape.out_width, shape.least_channels)
    if unit_bytes * shape.workspace(smallest) > capacity_bytes:
        return smallest
    tile = plan_tiles(shape, capacity_bytes, unit_bytes, whole_rows=True).tile
    if tile.rows < shape.out_height:
        return tile
    images = capacity_bytes // (unit_bytes * shape.workspace(tile))
    return tile._replace(rows=tile.rows * max(1, min(images, shape.batch)))
