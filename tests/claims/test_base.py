"""Verdicts follow from figures and expectations alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from gatewise.claims.lab.base import (
    Finding,
    Measured,
    Outcome,
    PartOutcome,
    Verdict,
    at_least,
    at_most,
    between,
    number,
    weakest,
)
from gatewise.claims.lab.intervals import exact
from tests.claims.fakes import claim, finding, part, uncertain

SHOWN, NOT_SHOWN, CONTRARY = Verdict


@pytest.mark.parametrize(
    ("expected", "low", "high", "verdict"),
    [
        (at_least(10), 10.0, 12.0, SHOWN),
        (at_least(10), 9.9, 12.0, NOT_SHOWN),
        (at_least(10), 2.0, 9.9, CONTRARY),
        (at_least(10, contrary_below=0), 2.0, 9.9, NOT_SHOWN),
        (at_least(10, contrary_below=0), -3.0, -1.0, CONTRARY),
        (at_least(10, contrary_below=0), -3.0, 1.0, NOT_SHOWN),
        (at_most(1e-5), 0.0, 0.0, SHOWN),
        (at_most(1e-5), 2e-5, 2e-5, CONTRARY),
        (at_most(1, contrary_above=2), 1.5, 1.8, NOT_SHOWN),
        (between(4, 4), 4.0, 4.0, SHOWN),
        (between(4, 4), 4.1, 4.1, CONTRARY),
        (between(14, 16), 13.0, 17.0, NOT_SHOWN),
        (at_least(10), -math.inf, math.inf, NOT_SHOWN),
        (at_least(10), math.nan, math.nan, NOT_SHOWN),
    ],
)
def test_the_whole_interval_decides(expected, low, high, verdict):
    assert expected.judge(uncertain(low, high)) is verdict


def test_the_weakest_figure_decides_for_a_part():
    mixed = Finding(
        (Measured("good", exact(1), expected=at_least(0)), Measured("bad", exact(1), "points", at_least(2)))
    )
    outcome = PartOutcome(part(lambda run: mixed), mixed, (), 1.0)
    assert outcome.verdict is CONTRARY
    assert outcome.why == "bad: 1 points, where at least 2 was expected"


def test_figures_without_expectation_inform_only():
    told = finding(-5.0)
    assert told.measured[0].verdict is None
    assert PartOutcome(part(lambda run: told), told, (), 1.0).verdict is SHOWN


def test_a_part_that_was_given_up_shows_nothing():
    outcome = PartOutcome(part(lambda run: finding()), None, ("no time",), 0.0)
    assert outcome.verdict is NOT_SHOWN
    assert outcome.why == "no time"


def test_an_outcome_counts_and_names_parts():
    outcomes = [
        PartOutcome(part(lambda run: finding(), title), found, (), 1.0)
        for title, found in (
            ("first", finding(1.0, expected=at_least(0))),
            ("second", finding(-1.0, expected=at_least(0))),
            ("third", None),
        )
    ]
    outcome = Outcome("focalnet", claim(), tuple(outcomes), 0, 10.0, 3.0, Path("runs"))
    assert outcome.verdict is CONTRARY
    assert str(outcome) == "focalnet: shown in 1 of 3 parts; contrary: second; not shown here: third"


def test_weakest_of_nothing_is_shown():
    assert weakest([]) is SHOWN
    assert weakest([SHOWN, CONTRARY, NOT_SHOWN]) is CONTRARY


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (at_least(10), "at least 10"),
        (at_most(1e-5), "at most 1e-05"),
        (between(4, 4), "exactly 4"),
        (between(1, 2.5), "1 to 2.5"),
    ],
)
def test_expectations_read_as_words(expected, text):
    assert str(expected) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1605632.0, "1,605,632"),
        (45.5555, "45.6"),
        (-0.0506, "-0.0506"),
        (1234.56, "1,235"),
        (1.5, "1.5"),
        (7.2e-7, "7.2e-07"),
        (math.inf, "unbounded"),
        (math.nan, "undefined"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_an_unbounded_interval_is_not_printed():
    assert Measured("x", uncertain(1.0, 2.0), "s").figure == "1.5 s [1, 2]"
    assert Measured("x", exact(3.0)).figure == "3"
    assert "unbounded" not in Measured("x", uncertain(-math.inf, math.inf)).figure
