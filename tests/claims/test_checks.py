"""Shared measurements."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims.lab.checks import median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.run import OutOfTime, Run


def test_relative_difference_is_of_the_largest_values():
    assert relative_difference(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125


def test_randomise_moves_everything_and_repeats_itself():
    def make():
        return randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), 0)

    torch.manual_seed(1)
    first = make()
    torch.manual_seed(1)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), make().state_dict().values(), strict=True)
    )
    assert (first[1].weight != 1).all()
    assert (first[1].running_mean != 0).all()
    assert (first[1].running_var > 1).all()
    assert not first.training


def test_calls_take_turns_on_one_thread():
    threads = []
    times = time_by_turns(
        {"a": lambda: threads.append(torch.get_num_threads()), "b": lambda: None}, Run(0, 10), seconds=0.05
    )
    assert set(threads) == {1}
    assert len(times["a"]) == len(times["b"]) >= 3
    assert median_ms(times["b"]) >= 0


def test_timing_needs_time():
    run = Run(0, 10)
    run.stop()
    with pytest.raises(OutOfTime):
        time_by_turns({"a": lambda: None}, run, seconds=1)


def test_times_faster_compares_within_rounds():
    interval = times_faster([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert (interval.value, interval.low, interval.high) == (2, 2, 2)
