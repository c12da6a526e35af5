"""Data structures that a claim file declares, and their outcomes.

A `Claim` has parts. A part measures, and returns a `Finding`: figures with intervals, each with what was expected of
it. The verdict on a figure follows only from these two: `Expectation.judge` is the only judge. The verdict of a part
or a claim is that of its weakest figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from gatewise.claims.lab.intervals import Interval
from gatewise.claims.lab.plot import Chart
from gatewise.claims.lab.run import Run


class Verdict(StrEnum):
    """Verdict of a measurement on a claim, from best to worst."""

    SHOWN = "shown"
    NOT_SHOWN = "not shown here"
    CONTRARY = "contrary"


def weakest(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; SHOWN of none."""
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.SHOWN)


@dataclass(frozen=True)
class Expectation:
    """Range in which a figure confirms the claim, and values that contradict it.

    Args:
        lowest: lower end of the range.
        highest: upper end of the range.
        contrary_below: bound below which a whole interval contradicts the claim; None: `lowest`. A claim of "at
            least 10 points" may be missed at 4 without being refuted, and be refuted below 0.
        contrary_above: the same at the upper end.
    """

    lowest: float = -math.inf
    highest: float = math.inf
    contrary_below: float | None = None
    contrary_above: float | None = None

    def judge(self, interval: Interval) -> Verdict:
        """SHOWN if the whole interval is within the range, CONTRARY if all of it is on the wrong side."""
        if self.lowest <= interval.low and interval.high <= self.highest:
            return Verdict.SHOWN
        below = self.lowest if self.contrary_below is None else self.contrary_below
        above = self.highest if self.contrary_above is None else self.contrary_above
        if interval.high < below or interval.low > above:
            return Verdict.CONTRARY
        return Verdict.NOT_SHOWN

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return f"exactly {number(self.lowest)}"
        if math.isinf(self.highest):
            return f"at least {number(self.lowest)}"
        if math.isinf(self.lowest):
            return f"at most {number(self.highest)}"
        return f"{number(self.lowest)} to {number(self.highest)}"


def at_least(lowest: float, contrary_below: float | None = None) -> Expectation:
    """No less than `lowest`."""
    return Expectation(lowest=lowest, contrary_below=contrary_below)


def at_most(highest: float, contrary_above: float | None = None) -> Expectation:
    """No more than `highest`."""
    return Expectation(highest=highest, contrary_above=contrary_above)


def between(lowest: float, highest: float) -> Expectation:
    """From `lowest` to `highest`."""
    return Expectation(lowest, highest)


@dataclass(frozen=True)
class Published:
    """A figure as published: what it is of, the figure in words, where it stands, and its value if it is to be drawn.

    Args:
        source: table, figure or section, and whether it is quoted from memory ("recalled").
    """

    what: str
    figure: str
    source: str
    value: float | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.figure} ({self.source})"


@dataclass(frozen=True)
class Measured:
    """One figure that came out here. Without an expectation it informs and is not judged."""

    what: str
    interval: Interval
    unit: str = ""
    expected: Expectation | None = None
    published: Published | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Verdict on the claim; None if nothing was expected."""
        return None if self.expected is None else self.expected.judge(self.interval)

    @property
    def figure(self) -> str:
        """Estimate and interval in words."""
        value = f"{number(self.interval.value)} {self.unit}".rstrip()
        if self.interval.low == self.interval.high or not math.isfinite(self.interval.high - self.interval.low):
            return value
        return f"{value} [{number(self.interval.low)}, {number(self.interval.high)}]"


@dataclass(frozen=True)
class Finding:
    """Result of a part.

    Args:
        charts: panels of the claim's figure; their numbers are saved with the result.
        remark: additional information that a reader needs about these figures.
    """

    measured: tuple[Measured, ...]
    charts: tuple[Chart, ...] = ()
    remark: str = ""


@dataclass(frozen=True)
class Part:
    """One check or experiment.

    Args:
        method: description of what is done and compared, in a sentence or two.
        seconds: duration on two idle cores, which sets its share of the budget.
    """

    title: str
    method: str
    run: Callable[[Run], Finding]
    seconds: float


@dataclass(frozen=True)
class Claim:
    """A paper's claim in miniature.

    Args:
        statement: claim of the paper, in our words.
        source: section, table or figure of the claim in the paper.
        published: published figures for the claim, at the scale of the paper.
        design: explanation of how the miniature tests the claim.
        limits: what the miniature cannot show.
        cautions: warnings before drawing conclusions, repeated with every run.
        budget_s: total seconds on two cores.
    """

    statement: str
    source: str
    published: tuple[Published, ...]
    design: str
    limits: str
    parts: tuple[Part, ...]
    budget_s: float
    cautions: tuple[str, ...] = ()


@dataclass(frozen=True)
class PartOutcome:
    """A part that was run, or given up: then there is no finding, and `notes` say why."""

    part: Part
    finding: Finding | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """That of its weakest figure; a part that was given up shows nothing."""
        if self.finding is None:
            return Verdict.NOT_SHOWN
        return weakest(one.verdict for one in self.finding.measured if one.verdict is not None)

    @property
    def why(self) -> str:
        """The reason for the verdict."""
        if self.finding is None:
            return "; ".join(self.notes)
        short = [one for one in self.finding.measured if one.verdict not in (None, Verdict.SHOWN)]
        if not short:
            return "every figure lies where it was expected"
        return "; ".join(f"{one.what}: {one.figure}, {_fault(one)}" for one in short)


def _fault(measured: Measured) -> str:
    if math.isfinite(measured.interval.high - measured.interval.low):
        return f"where {measured.expected} was expected"
    return "which without an interval shows nothing"


@dataclass(frozen=True)
class Outcome:
    """Result of a claim: one outcome per part, and where `result.json` and `figure.png` are."""

    paper: str
    claim: Claim
    parts: tuple[PartOutcome, ...]
    seed: int
    budget_s: float
    seconds: float
    folder: Path

    @property
    def verdict(self) -> Verdict:
        """That of the weakest part."""
        return weakest(part.verdict for part in self.parts)

    def __str__(self) -> str:
        shown = sum(part.verdict is Verdict.SHOWN for part in self.parts)
        rest = [
            f"{verdict}: " + ", ".join(part.part.title for part in self.parts if part.verdict is verdict)
            for verdict in (Verdict.CONTRARY, Verdict.NOT_SHOWN)
            if any(part.verdict is verdict for part in self.parts)
        ]
        return "; ".join([f"{self.paper}: shown in {shown} of {len(self.parts)} parts", *rest])


def number(value: float) -> str:
    """Three significant digits at most; whole numbers in full."""
    if not math.isfinite(value):
        return "undefined" if math.isnan(value) else "unbounded"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2g}"
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
