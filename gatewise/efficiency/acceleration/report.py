"""The report of `optimize`: what it tried, measured and chose."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gatewise.efficiency.timing.measure import Ratio

Status = Literal["chosen", "slower", "wrong", "failed", "not applicable", "not tried"]

ORIGINAL = "original"


@dataclass(frozen=True)
class PlanResult:
    """One plan: its speed and error, and why it was chosen or not.

    Attributes:
        median_ms, spread_ms: median and interquartile range per call; None if it was not measured.
        ratio: speedup over the original, from interleaved measurements.
        error: largest difference from the original's output, relative to the largest output.
        build_s: seconds needed to build it, including compilation.
        note: reason why the plan was not measured.
    """

    name: str
    status: Status
    median_ms: float | None = None
    spread_ms: float | None = None
    ratio: Ratio | None = None
    error: float | None = None
    build_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class OptimizationReport:
    """All plans for one network, example and precision; the original is the first row."""

    device: str
    threads: int
    precision: str
    tolerance: float
    input_shape: tuple[int, ...]
    plans: tuple[PlanResult, ...]

    @property
    def chosen(self) -> PlanResult:
        return next(plan for plan in self.plans if plan.status == "chosen")

    @property
    def original(self) -> PlanResult:
        return self.plans[0]

    @property
    def speedup(self) -> float:
        """Median speedup of the chosen plan; 1 if that is the original."""
        return self.chosen.ratio.median if self.chosen.ratio else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Return name, median, spread, ratio, error and status of each plan, as text."""
        return [
            (
                plan.name,
                _number(plan.median_ms, ".2f", " ms"),
                _number(plan.spread_ms, ".2f", " ms"),
                str(plan.ratio) if plan.ratio else "-",
                _number(plan.error, ".1e"),
                f"{plan.status}: {plan.note}" if plan.note else plan.status,
            )
            for plan in self.plans
        ]

    def __str__(self) -> str:
        header = ("plan", "median", "spread", "faster", "error", "")
        table = [header, *self.rows()]
        widths = [max(len(row[column]) for row in table) for column in range(5)]
        lines = [
            f"{self.precision} on {self.device} ({self.threads} threads), input {tuple(self.input_shape)}, "
            f"tolerance {self.tolerance:g}"
        ]
        for row in table:
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
