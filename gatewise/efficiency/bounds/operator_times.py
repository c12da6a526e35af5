"""Times of single operators, each on tensors of the shapes that it had in the network, beside their bounds."""

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
"""Fewest and most."""

SMALLEST_FLUSH, LARGEST_FLUSH = 2**24, 2**28
"""Bytes between which twice the largest cache is written before each operator: it then finds its tensors in memory,
where the bound has them. Caches do not always drop what is oldest, so that once their size leaves some of it."""


@dataclass(frozen=True)
class KernelTime:
    """One operator with its times, one per round, in seconds."""

    bound: BoundKernel
    samples: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples)

    @property
    def efficiency(self) -> float:
        """What it used of the peak."""
        return self.bound.ideal_s / self.median_s

    @property
    def achieved(self) -> float:
        """Bound over time: 1 is as good as can be, more says that the bound, or the time, is wrong."""
        return self.bound.min_s / self.median_s

    @property
    def bandwidth(self) -> float:
        """Effective, in bytes per second: what had to be moved over the time, whatever else was moved."""
        return self.bound.kernel.bytes / self.median_s


@dataclass(frozen=True)
class MeasuredWaterline:
    """The operators of a network, timed.

    Attributes:
        noise: relative excess over a bound that passes for noise.
    """

    times: tuple[KernelTime, ...]
    noise: float

    @property
    def total_s(self) -> float:
        """Of all operators, one after the other."""
        return sum(entry.median_s for entry in self.times)

    @property
    def efficiency(self) -> float:
        """Of the whole sequence."""
        return sum(entry.bound.ideal_s for entry in self.times) / self.total_s

    @property
    def efficiency_correlation(self) -> float:
        """Spearman's rank correlation of the most and the measured efficiency, over operators that compute.

        NaN with fewer than three of them, or where all bounds are equal.
        """
        computing = [entry for entry in self.times if not entry.bound.is_drop]
        most = [entry.bound.max_efficiency for entry in computing]
        return rank_correlation(most, [entry.efficiency for entry in computing])

    @property
    def intensity_correlation(self) -> float:
        """As `efficiency_correlation`, of operations per byte, which also order what is above the waterline."""
        computing = [entry for entry in self.times if not entry.bound.is_drop]
        intensities = [entry.bound.kernel.intensity for entry in computing]
        return rank_correlation(intensities, [entry.efficiency for entry in computing])

    @property
    def time_correlation(self) -> float:
        """Spearman's rank correlation of bound and time, over all operators."""
        return rank_correlation([entry.bound.min_s for entry in self.times], [entry.median_s for entry in self.times])

    @property
    def exceeding(self) -> tuple[KernelTime, ...]:
        """Operators faster than their bound by more than the noise, the fastest first: peak, bandwidth or counts are
        wrong there, or the tensors did not come from memory."""
        over = [entry for entry in self.times if entry.achieved > 1 + self.noise]
        return tuple(sorted(over, key=lambda entry: -entry.achieved))

    @property
    def largest_excess(self) -> float:
        """Largest of bound over time; above 1 for an operator faster than its bound."""
        return max(entry.achieved for entry in self.times)

    def table(self, most: int | None = 20) -> str:
        """The operators that take longest, with bounds, efficiencies and what they reach of them, as text."""
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
    """Spearman's, ties at their mean rank; NaN for fewer than three pairs or a constant side."""
    from scipy.stats import spearmanr

    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return float("nan")
    return float(spearmanr(x, y).statistic)


@torch.no_grad()
def time_operators(invocations: Sequence[Invocation], *, budget_s: float = 10.0) -> list[tuple[float, ...]]:
    """Seconds of each operator, by turns: every round runs all of them once, and the next starts with another.

    Floating-point tensors are random, of the shapes and strides that were recorded; integers are those that were.

    Raises:
        ValueError: if `budget_s` is not positive.
    """
    if budget_s <= 0:
        raise ValueError(f"budget_s must be a positive number of seconds, not {budget_s}")
    pool = _Pool(_device_of(invocations))
    samples: list[list[float]] = [[] for _ in invocations]
    deadline = time.monotonic() + budget_s
    for invocation in invocations:
        pool.time(invocation)  # Kernels are chosen, and compiled, in a first call.
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
    """Random tensors, one per shape and place among an operator's arguments."""

    def __init__(self, where: torch.device) -> None:
        self._where = where
        self._tensors: dict[tuple[TensorShape, int], Tensor] = {}
        size = min(max(2 * largest_cache(where), SMALLEST_FLUSH), LARGEST_FLUSH)
        self._flush = torch.empty(size // 4, device=where)

    def time(self, invocation: Invocation) -> float:
        """Seconds of one call, whose tensors are in memory and in no cache when it starts."""
        places = iter(range(1_000_000))
        args, kwargs = torch.utils._pytree.tree_map(
            lambda leaf: self._tensor(leaf, next(places)), (invocation.args, invocation.kwargs)
        )
        if writes(invocation.function):
            # Written to again and again, numbers would run out of their range.
            args, kwargs = torch.utils._pytree.tree_map(_copy, (args, kwargs))
        # Last of all: a fresh copy is in the caches, too.
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
            # Away from zero and positive: a variance among the arguments stays one.
            memory = torch.empty(_span(leaf.shape, leaf.stride), device=leaf.device).uniform_(0.1, 1.0).to(leaf.dtype)
            self._tensors[key] = memory.as_strided(leaf.shape, leaf.stride)
        return self._tensors[key]


def writes(function: Any) -> bool:
    """Whether an operator changes one of its arguments."""
    schema = getattr(function, "_schema", None)
    return schema is not None and schema.is_mutable


def _copy(leaf: Any) -> Any:
    """A copy in memory of the same layout, axes that are expanded included."""
    if not isinstance(leaf, Tensor):
        return leaf
    memory = leaf.as_strided((_span(leaf.shape, leaf.stride()),), (1,)).clone()
    return memory.as_strided(leaf.shape, leaf.stride())


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements of memory from a tensor's first to its last."""
    return max(sum((size - 1) * step for size, step in zip(shape, stride, strict=True)), 0) + 1
