"""A part's time and its repetitions."""

from __future__ import annotations

import pytest

from gatewise.claims.lab.run import OutOfTime, Run
from tests.claims.fakes import Clock


def repetition(clock, seconds):
    def once(seed):
        clock.pass_by(seconds)
        return seed

    return once


def test_all_repetitions_fit():
    clock = Clock()
    run = Run(seed=2, seconds=50, clock=clock)
    assert run.repeat(4, repetition(clock, 10)) == [2000, 2001, 2002, 2003]
    assert run.notes == []


def test_seeds_of_different_runs_never_meet():
    seeds = [set(Run(seed, 1, clock=Clock()).repeat(5, lambda own: own)) for seed in range(3)]
    assert seeds[0].isdisjoint(seeds[1])
    assert seeds[1].isdisjoint(seeds[2])


def test_a_repetition_that_does_not_fit_is_not_begun_and_that_is_stated():
    clock = Clock()
    run = Run(seed=0, seconds=35, clock=clock)
    assert run.repeat(5, repetition(clock, 10)) == [0, 1, 2]
    assert run.remaining == 5
    assert run.notes == ["3 of 5 seeds, for lack of time"]


def test_a_repetition_that_runs_out_of_time_is_left_out():
    clock = Clock()
    run = Run(seed=0, seconds=35, clock=clock)

    def once(seed):
        clock.pass_by(10 if seed == 0 else 30)
        run.check_time()
        return seed

    assert run.repeat(3, once) == [0]
    assert run.notes == ["1 of 3 seeds, for lack of time"]


def test_not_even_one_repetition_ends_the_part():
    clock = Clock()
    run = Run(seed=0, seconds=5, clock=clock)

    def once(seed):
        clock.pass_by(10)
        run.check_time()

    with pytest.raises(OutOfTime):
        run.repeat(3, once)


def test_stopping_ends_the_time():
    run = Run(seed=0, seconds=100, clock=Clock())
    run.check_time()
    run.stop()
    with pytest.raises(OutOfTime):
        run.check_time()
