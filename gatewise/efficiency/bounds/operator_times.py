"""Times of single operators, each on tensors of the shapes that it had in the network, compared with their bounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gatewise.efficiency._text import columns, duration
from gatewise.efficiency.bounds.device import largest_cache
from gatewise.efficiency.cost.recorder import Invocation, TensorShape
from gatewise.efficiency.timing.hardware import synchronize

if TYPE_CHECKING:
    from gatewise.efficiency.bounds.waterline import BoundKernel

ROUNDS = 3, 50
"""Fewest and most rounds."""

SMALLEST_FLUSH, LARGEST_FLUSH = 2**24, 2**28
"""Smallest and largest number of bytes written before each operator; twice the largest cache in between. The operator
then finds its tensors in memory, as the bound assumes. Caches do not always evict the oldest data, so writing their
size once leaves some of it."""


@dataclass(frozen=True)
class KernelTime:
    """One operator with its times in seconds, one per round."""

    bound: BoundKernel
    samples: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def efficiency(self) -> float:
        """Used fraction of the peak."""
        return self.bound.ideal_s / self.median_s

    @property
    def achieved(self) -> float:
        """Ratio of bound to time: 1 is the best possible; more means that the bound or the time is wrong."""
        return self.bound.min_s / self.median_s

    @property
    def bandwidth(self) -> float:
        """Effective bandwidth in bytes per second: required traffic over time, whatever else was moved."""
        return self.bound.kernel.bytes / self.median_s


@dataclass(frozen=True)
class MeasuredWaterline:
    """Measured times of a network's operators.

    Attributes:
        noise: relative excess over a bound that counts as noise.
    """

    times: tuple[KernelTime, ...]
    noise: float

    @property
    def total_s(self) -> float:
        """Seconds for all operators, one after the other."""
        return sum(entry.median_s for entry in self.times)

    @property
    def efficiency(self) -> float:
        """Efficiency of the whole sequence."""
        return sum(entry.bound.ideal_s for entry in self.times) / self.total_s

    @property
    def efficiency_correlation(self) -> float:
        """Spearman's rank correlation of the largest possible and the measured efficiency, over computing operators.

        NaN for fewer than three operators, or if all bounds are equal.
        """
        computing = [entry for entry in self.times if not entry.bound.is_drop]
        most = [entry.bound.max_efficiency for entry in computing]
        return rank_correlation(most, [entry.efficiency for entry in computing])

    @property
    def intensity_correlation(self) -> float:
        """Like `efficiency_correlation`, for operations per byte, which also rank operators above the waterline."""
        computing = [entry for entry in self.times if not entry.bound.is_drop]
        intensities = [entry.bound.kernel.intensity for entry in computing]
        return rank_correlation(intensities, [entry.efficiency for entry in computing])

    @property
    def time_correlation(self) -> float:
        """Spearman's rank correlation of bound and time over all operators."""
        return rank_correlation([entry.bound.min_s for entry in self.times], [entry.median_s for entry in self.times])

    @property
    def exceeding(self) -> tuple[KernelTime, ...]:
        """Operators faster than their bound by more than the noise, fastest first. For these the peak, the bandwidth or
        a count is wrong, or the tensors did not come from memory."""
        over = [entry for entry in self.times if entry.achieved > 1 + self.noise]
        return tuple(sorted(over, key=lambda entry: -entry.achieved))

    @property
    def largest_excess(self) -> float:
        """Largest ratio of bound to time; above 1 if an operator is faster than its bound."""
        return max(entry.achieved for entry in self.times)

    def table(self, most: int | None = 20) -> str:
        """Return a text table of the slowest operators, with bounds, efficiencies and the fraction reached of both."""
        rows = [("module", "kernel", "time", "bound", "achieved", "efficiency", "GB/s")]
        for entry in sorted(self.times, key=lambda entry: -entry.median_s)[:most]:
            kernel = entry.bound.kernel
            flag = " !" if entry.achieved > 1 + self.noise else ""
            rows.append(
                (
                    kernel.module or "-",
                    kernel.name,
                    duration(entry.median_s),
                    duration(entry.bound.min_s),
                    f"{entry.achieved:.2f}{flag}",
                    f"{entry.efficiency:.3f}",
                    f"{entry.bandwidth / 1e9:.1f}",
                )
            )
        over = len(self.exceeding)
        faster = f"{over} of {len(self.times)} operators are faster than their bound by more than {self.noise:.0%}"
        verdict = (
            f"{duration(self.total_s)} in all, efficiency {self.efficiency:.3f}; rank correlation of measured "
            f"efficiency {self.efficiency_correlation:.2f} with the bound, {self.intensity_correlation:.2f} with "
            f"op:byte, of times and bounds {self.time_correlation:.2f}; {faster} (at most {self.largest_excess:.2f}x)"
        )
        return "\n".join([verdict, "", columns(rows)])

    def __str__(self) -> str:
        return self.table()


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation, ties at their mean rank; NaN for under three pairs or a constant side."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return float("nan")
    return float(spearmanr(x, y).statistic)


@torch.no_grad()
def time_operators(invocations: Sequence[Invocation], *, budget_s: float = 10.0) -> list[tuple[float, ...]]:
    """Return the seconds of each operator. Every round runs all of them once, and the next starts with another.

    Floating-point tensors are random, with the recorded shapes and strides; integers keep their recorded values.

    Raises:
        ValueError: if `budget_s` is not positive.
    """
    if budget_s <= 0:
        raise ValueError(f"budget_s must be a positive number of seconds, not {budget_s}")
    pool = _Pool(_device_of(invocations))
    samples: list[list[float]] = [[] for _ in invocations]
    deadline = time.monotonic() + budget_s
    for invocation in invocations:
        pool.time(invocation)  # The first call chooses and compiles kernels.
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.monotonic() > deadline:
            break
        first = done * 7 % max(len(invocations), 1)
        order = [*range(first, len(invocations)), *range(first)]
        for index in order:
            samples[index].append(pool.time(invocations[index]))
    return [tuple(times) for times in samples]


def _device_of(invocations: Sequence[Invocation]) -> torch.device:
    leaves = torch.utils._pytree.tree_leaves([(entry.args, entry.kwargs) for entry in invocations])
    return next((leaf.device for leaf in leaves if isinstance(leaf, TensorShape)), torch.device("cpu"))


class _Pool:
    """Random tensors, one per shape and position among an operator's arguments."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._tensors: dict[tuple[TensorShape, int], Tensor] = {}
        size = min(max(2 * largest_cache(where), SMALLEST_FLUSH), LARGEST_FLUSH)
        self._flush = torch.empty(size // 4, device=where)

    def time(self, invocation: Invocation) -> float:
        """Return the seconds of one call whose tensors are in memory and in no cache when it starts."""
        places = iter(range(1_000_000))
        args, kwargs = torch.utils._pytree.tree_map(
            lambda leaf: self._tensor(leaf, next(places)), (invocation.args, invocation.kwargs)
        )
        if writes(invocation.function):
            # Repeated writes to the same tensor would overflow.
            args, kwargs = torch.utils._pytree.tree_map(_copy, (args, kwargs))
        # Flush last, because a fresh copy is in the caches too.
        self._flush.fill_(1.0)
        synchronize(self._where)
        start = time.perf_counter()
        invocation.function(*args, **kwargs)
        synchronize(self._where)
        return time.perf_counter() - start

    def _tensor(self, leaf: Any, place: int) -> Any:
        if not isinstance(leaf, TensorShape):
            return leaf
        key = (leaf, place)
        if key not in self._tensors:
            # Positive and away from zero, so that a variance among the arguments stays valid.
            memory = torch.empty(_span(leaf.shape, leaf.stride), device=leaf.device).uniform_(0.1, 1.0).to(leaf.dtype)
            self._tensors[key] = memory.as_strided(leaf.shape, leaf.stride)
        return self._tensors[key]


def writes(function: Any) -> bool:
    """Return whether an operator changes one of its arguments."""
    schema = getattr(function, "_schema", None)
    return schema is not None and schema.is_mutable


def _copy(leaf: Any) -> Any:
    """Copy into memory of the same layout, including expanded axes."""
    if not isinstance(leaf, Tensor):
        return leaf
    memory = leaf.as_strided((_span(leaf.shape, leaf.stride()),), (1,)).clone()
    return memory.as_strided(leaf.shape, leaf.stride())


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Return the number of elements from a tensor's first to its last in memory."""
    return max(sum((size - 1) * step for size, step in zip(shape, stride, strict=True)), 0) + 1
