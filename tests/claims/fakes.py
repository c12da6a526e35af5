"""A clock that tests move, and small claims."""

from __future__ import annotations

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least
from gatewise.claims.lab.intervals import Interval, exact


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def finding(*values: float, expected=None) -> Finding:
    """One exact figure per value, all with the same expectation."""
    return Finding(tuple(Measured(f"figure {i}", exact(value), "points", expected) for i, value in enumerate(values)))


def part(run, title="a part", seconds=10.0) -> Part:
    return Part(title, "how it is measured", run, seconds)


def claim(*parts: Part, budget_s: float = 100.0) -> Claim:
    return Claim(
        statement="gates help",
        source="table 1",
        published=(Published("gain", "12 points", "table 1", 12.0),),
        design="a small network",
        limits="no large one",
        parts=parts,
        budget_s=budget_s,
        cautions=("small networks differ from large ones",),
    )


def passing_claim() -> Claim:
    return claim(part(lambda run: finding(11.0, expected=at_least(10))))


def uncertain(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, "by hand")
