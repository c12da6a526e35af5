"""Measuring takes turns, and its figures follow from the samples."""

from __future__ import annotations

import sys

import pytest
import torch

from gatewise.efficiency import Timing, measure, peak_memory, ratio


def test_candidates_take_turns_and_each_round_starts_with_another():
    calls = []
    # Long enough that a sample is one call.
    waits = {name: (lambda _, name=name: (calls.append(name), _wait())) for name in "abc"}
    timings = measure(waits, torch.empty(4), min_rounds=3, max_rounds=3, warm_up=1)
    warm_up = ["a", "a", "b", "b", "c", "c"]  # once to warm up, once to see how long a call takes
    # Quick ones are called once more, so that their data is in the caches when they are timed.
    assert calls == [*warm_up, *"aabbcc", *"bbccaa", *"ccaabb"]
    assert [timing.name for timing in timings] == ["a", "b", "c"]
    assert {len(timing.samples) for timing in timings} == {3}


def _wait(seconds=0.002):
    import time

    time.sleep(seconds)


def test_at_least_min_rounds_run_however_small_the_budget():
    (timing,) = measure({"sum": torch.sum}, torch.ones(8), budget_s=1e-9, min_rounds=4)
    assert len(timing.samples) == 4
    assert timing.batch_size == 8
    assert timing.median > 0


def test_a_long_call_is_made_once_per_round():
    calls = []
    measure({"slow": lambda _: (calls.append(1), _wait(0.06))}, torch.empty(1), min_rounds=2, max_rounds=2, warm_up=0)
    assert len(calls) == 1 + 2


def test_quick_calls_are_repeated_within_a_sample():
    calls = []
    measure({"quick": calls.append}, torch.empty(1), min_rounds=1, max_rounds=1, warm_up=0)
    assert len(calls) > 100


def test_figures_follow_from_the_samples():
    timing = Timing("a", 10, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert timing.median == 3.0
    assert timing.spread == 2.0
    assert timing.throughput == pytest.approx(10 / 3)


def test_ratios_are_taken_within_rounds():
    # The machine is three times slower in the second round, for both: the ratio does not notice.
    before, after = Timing("a", 1, (2.0, 6.0, 2.0)), Timing("b", 1, (1.0, 3.0, 1.0))
    assert ratio(before, after).median == 2.0
    assert ratio(before, after).low == ratio(before, after).high == 2.0
    with pytest.raises(ValueError, match="measure them together"):
        ratio(before, Timing("c", 1, (1.0,)))


@pytest.mark.parametrize(
    "limits", [{"budget_s": 0}, {"min_rounds": 0}, {"min_rounds": 9, "max_rounds": 8}, {"warm_up": -1}]
)
def test_senseless_limits_are_refused(limits):
    with pytest.raises(ValueError, match="measure needs"):
        measure({"sum": torch.sum}, torch.ones(1), **limits)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure({}, torch.ones(1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark")
def test_peak_memory_sees_what_is_allocated_and_freed_within_the_call():
    size = 64 * 2**20

    def allocate(x):
        torch.ones(size // 4).sum()

    measured = peak_memory(allocate, torch.empty(1))
    assert 0.9 * size < measured < 1.5 * size
    assert peak_memory(torch.sum, torch.ones(4)) < 0.1 * size
