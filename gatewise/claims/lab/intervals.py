"""An estimate with the range that it is uncertain within, and how that range was made."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gatewise.efficiency.timing.measure import bootstrap_bounds

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate between two bounds; the bounds are infinite where the sample says nothing about its spread."""

    value: float
    low: float
    high: float
    method: str


def exact(value: float) -> Interval:
    """A figure that would come out the same again: a count, or the error of an identity."""
    return Interval(value, value, value, "exact")


def t_interval(sample: Sequence[float], of: str = "seeds") -> Interval:
    """The mean of independent repetitions with Student's t-interval; a single repetition bounds nothing.

    Raises:
        ValueError: for an empty sample.
    """
    mean = statistics.fmean(_not_empty(sample))
    if len(sample) == 1:
        return Interval(mean, -math.inf, math.inf, f"no interval: one of the {of} alone")
    from scipy.stats import t

    error = statistics.stdev(sample) / math.sqrt(len(sample))
    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)) * error
    return Interval(mean, mean - margin, mean + margin, f"{CONFIDENCE:.0%} t-interval over {len(sample)} {of}")


def bootstrap(
    sample: Sequence[float],
    statistic: Callable[[Sequence[float]], float] = statistics.median,
    of: str = "rounds",
    resamples: int = 2000,
) -> Interval:
    """A statistic of repetitions with the percentile bootstrap's interval, always from the same resamples.

    Raises:
        ValueError: for an empty sample.
    """
    low, high = bootstrap_bounds(_not_empty(sample), statistic, CONFIDENCE, resamples)
    return Interval(float(statistic(sample)), low, high, f"{CONFIDENCE:.0%} bootstrap over {len(sample)} {of}")


def _not_empty(sample: Sequence[float]) -> Sequence[float]:
    if not sample:
        raise ValueError("an interval needs at least one repetition")
    return sample
