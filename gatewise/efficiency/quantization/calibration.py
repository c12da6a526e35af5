"""Ranges of activations from a few batches without labels.

There are five ways to choose a range from the observed values:

- min-max: the smallest and the largest value;
- averaged: the means over batches of each batch's smallest and largest value;
- percentile: the range between the percentiles 0.01 and 99.99;
- mse: the range whose grid has the least expected squared error, from rounding inside and clipping outside;
- entropy: the range for which the histogram of codes has the least Kullback-Leibler divergence from that of the values.

All are single passes. The last three keep a histogram that grows with the data.

Sources: Krishnamoorthi 2018, arXiv:1806.08342, section 3.1 (min-max, averaged; about 100 batches are enough); the
histogram methods as in Wu et al. 2020, arXiv:2004.09602, section 3.2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, get_args

import numpy as np

Calibration = Literal["min-max", "averaged", "percentile", "mse", "entropy"]

PERCENTILE = 99.99
BINS = 4096
"""Largest number of bins of a histogram: 16 per 8-bit code, with at least half of the bins in use."""

CANDIDATES = np.geomspace(0.05, 1, 64)
"""Candidate ends of a range, as fractions of what was observed on that side of 0."""


class Observer(ABC):
    """Observes all values of one tensor, batch by batch, and then chooses the range to represent."""

    @abstractmethod
    def observe(self, values: np.ndarray) -> None:
        """Observe finite values of a batch, of any shape; a batch may come in pieces."""

    def end_batch(self) -> None:  # noqa: B027  (most observers do nothing here)
        """Mark the end of a batch."""

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """Return the range to represent; it need not contain 0."""


class MinMax(Observer):
    """The smallest and the largest value of all batches."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf

    def observe(self, values: np.ndarray) -> None:
        self._low = min(self._low, float(values.min()))
        self._high = max(self._high, float(values.max()))

    def range(self) -> tuple[float, float]:
        return self._low, self._high


class AveragedMinMax(Observer):
    """The means over batches of the smallest and of the largest value."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float]] = []
        self._batch = MinMax()

    def observe(self, values: np.ndarray) -> None:
        self._batch.observe(values)

    def end_batch(self) -> None:
        self._ends.append(self._batch.range())
        self._batch = MinMax()

    def range(self) -> tuple[float, float]:
        low, high = np.mean(self._ends, axis=0).tolist()
        return low, high


class Histogram(MinMax):
    """Counts of values in bins whose edges are multiples of a width, so that 0 is an edge.

    If new values would need more than `BINS` bins, pairs of bins are merged until they do not. Counts stay exact, and
    no value is read twice. Zeros, of which ReLU makes many, are counted separately, since every grid represents them
    exactly.
    """

    def __init__(self) -> None:
        super().__init__()
        self._width = 0.0
        self._start = 0
        self._counts = np.zeros(0, dtype=np.int64)
        self._zeros = 0

    def observe(self, values: np.ndarray) -> None:
        super().observe(values)
        zeros = values.size - int(np.count_nonzero(values))
        self._zeros += zeros
        low, high = min(self._low, 0.0), max(self._high, 0.0)
        if high - low < np.finfo(np.float32).tiny:
            return
        if self._width == 0:
            # Zeros seen before have no width, and no range can leave them out.
            self._width = (high - low) / (BINS // 2)
        while np.floor(high / self._width) - np.floor(low / self._width) + 1 > BINS:
            self._double()
        indices = np.floor(values.ravel() / self._width).astype(np.int64)
        self._extend(min(int(indices.min()), 0), max(int(indices.max()), 0) + 1)
        self._counts += np.bincount(indices - self._start, minlength=len(self._counts))
        self._counts[-self._start] -= zeros

    def _extend(self, first: int, last: int) -> None:
        """Make room for the bins from `first` up to, but excluding, `last`."""
        if not len(self._counts):
            self._start = first
        before = max(self._start - first, 0)
        after = max(last - self._start - len(self._counts), 0)
        self._counts = np.pad(self._counts, (before, after))
        self._start -= before

    def _double(self) -> None:
        """Double the bin width: bins 2k and 2k + 1 become bin k."""
        self._width *= 2
        odd = self._start % 2
        padded = np.pad(self._counts, (odd, (len(self._counts) + odd) % 2))
        self._counts = padded.reshape(-1, 2).sum(axis=1)
        self._start = (self._start - odd) // 2

    def edges(self) -> np.ndarray:
        """Return the ends of the bins, one more than there are counts."""
        return (self._start + np.arange(len(self._counts) + 1)) * self._width

    def _within(self, low: float, high: float) -> tuple[float, float]:
        """Clip the range to the observed values, which bins may exceed."""
        return max(low, self._low), min(high, self._high)


class Percentile(Histogram):
    """The range between two percentiles, mirrored at 50; values are assumed uniform within a bin."""

    def __init__(self, percentile: float = PERCENTILE) -> None:
        super().__init__()
        self._part = percentile / 100

    def range(self) -> tuple[float, float]:
        if not len(self._counts):
            return super().range()
        counts = self._counts.copy()
        counts[-self._start] += self._zeros
        below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
        low, high = np.interp([1 - self._part, self._part], below, self.edges()).tolist()
        return self._within(low, high)


class LeastSquares(Histogram):
    """The range with the least expected squared error for an affine grid.

    Inside, rounding errors are uniform over a step: step^2 / 12. Outside, the error is the distance to the end.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._steps = 2**bits - 1

    def range(self) -> tuple[float, float]:
        if not len(self._counts):
            return super().range()
        edges = self.edges()
        middles = (edges[:-1] + edges[1:]) / 2
        lows, highs = min(self._low, 0.0) * CANDIDATES, max(self._high, 0.0) * CANDIDATES
        below = [(self._counts * np.clip(low - middles, 0, None) ** 2).sum() for low in lows]
        above = [(self._counts * np.clip(middles - high, 0, None) ** 2).sum() for high in highs]
        outside = np.add.outer(np.asarray(below), np.asarray(above))
        inside = self._counts.sum() * (np.subtract.outer(-lows, -highs) / self._steps) ** 2 / 12
        best = np.unravel_index(np.argmin(outside + inside), outside.shape)
        return float(lows[best[0]]), float(highs[best[1]])


class Entropy(Histogram):
    """The range for which the histogram of codes diverges least from that of the values.

    For each range, the reference histogram counts values outside at the range's ends. The bins inside are merged to as
    many as there are codes, and each code's count is spread evenly over its bins that are not empty. The end farther
    from 0 is chosen first, with all of the other side inside, and then the other end.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._codes = 2**bits

    def range(self) -> tuple[float, float]:
        if not len(self._counts):
            return super().range()
        zero, edges = -self._start, self.edges()
        bins = [zero, len(self._counts) - zero]
        for side in (0, 1) if bins[0] > bins[1] else (1, 0):
            bins[side] = self._best_end(bins, side)
        return self._within(float(edges[zero - bins[0]]), float(edges[zero + bins[1]]))

    def _best_end(self, bins: list[int], side: int) -> int:
        """Return how many of the existing bins to keep on one side of 0."""
        best, chosen = np.inf, bins[side]
        for count in dict.fromkeys(round(bins[side] * part) for part in CANDIDATES):
            tried = [*bins]
            tried[side] = count
            if sum(tried) < self._codes:
                continue
            divergence = self._divergence(-self._start - tried[0], -self._start + tried[1])
            if divergence < best:
                best, chosen = divergence, count
        return chosen

    def _divergence(self, first: int, last: int) -> float:
        inside = self._counts[first:last].astype(np.float64)
        reference = inside.copy()
        reference[0] += self._counts[:first].sum()
        reference[-1] += self._counts[last:].sum()
        codes = np.arange(len(inside)) * self._codes // len(inside)
        held = inside > 0
        totals = np.bincount(codes, inside, self._codes)
        bins = np.bincount(codes, held, self._codes)
        spread = np.where(held, (totals / np.maximum(bins, 1))[codes], 0.0)
        if not spread.sum():
            return np.inf
        reference /= reference.sum()
        # Only the reference counts a bin that holds nothing but outside values; a floor keeps its share finite.
        spread = np.maximum(spread / spread.sum(), 1e-9)
        some = reference > 0
        return float((reference[some] * np.log(reference[some] / spread[some])).sum())


def make_observer(calibration: Calibration, bits: int) -> Observer:
    """Return the observer with this name, for grids of `bits`.

    Raises:
        ValueError: for an unknown name.
    """
    if calibration == "min-max":
        return MinMax()
    if calibration == "averaged":
        return AveragedMinMax()
    if calibration == "percentile":
        return Percentile()
    if calibration == "mse":
        return LeastSquares(bits)
    if calibration == "entropy":
        return Entropy(bits)
    raise ValueError(f"activations must be one of {', '.join(get_args(Calibration))}, not {calibration!r}")
