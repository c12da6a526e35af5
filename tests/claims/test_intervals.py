"""Intervals against known values."""

from __future__ import annotations

import math
import statistics

import pytest

from gatewise.claims.lab.intervals import bootstrap, exact, t_interval


def test_t_interval_of_a_textbook_sample():
    # Student's t at 97.5 % with 4 degrees of freedom is 2.776; the standard error of 1..5 is sqrt(2.5 / 5).
    interval = t_interval([1, 2, 3, 4, 5])
    assert interval.value == 3
    assert interval.high - 3 == pytest.approx(2.776 * math.sqrt(0.5), rel=1e-3)
    assert interval.low == pytest.approx(6 - interval.high)
    assert interval.method == "95% t-interval over 5 seeds"


def test_one_repetition_bounds_nothing():
    interval = t_interval([42.0])
    assert (interval.value, interval.low, interval.high) == (42.0, -math.inf, math.inf)


def test_bootstrap_covers_the_median_and_repeats_itself():
    sample = [float(value) for value in range(1, 22)]
    interval = bootstrap(sample)
    assert interval.value == 11
    assert 5 < interval.low < 11 < interval.high < 17
    assert bootstrap(sample) == interval


def test_bootstrap_takes_other_statistics():
    interval = bootstrap([0.0, 0.0, 0.0, 8.0], statistics.fmean, of="draws")
    assert interval.value == 2
    assert interval.method == "95% bootstrap over 4 draws"


@pytest.mark.parametrize("make", [t_interval, bootstrap])
def test_an_empty_sample_is_refused(make):
    with pytest.raises(ValueError, match="at least one repetition"):
        make([])


def test_exact_has_no_width():
    assert (exact(3).low, exact(3).high) == (3, 3)
