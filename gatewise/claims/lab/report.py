"""An outcome in three forms: lines in the terminal, a JSON file, a figure."""

from __future__ import annotations

import json
import math
import os
import platform
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gatewise import __version__
from gatewise.catalog.papers import paper as paper_entry
from gatewise.claims.lab.base import Claim, Measured, Outcome, PartOutcome, Verdict
from gatewise.files import finite_or_null, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VERDICT_COLORS = {Verdict.SHOWN: "#00795A", Verdict.NOT_SHOWN: "#8A6100", Verdict.CONTRARY: "#B23A00"}
VERDICT_STYLES = {Verdict.SHOWN: "green", Verdict.NOT_SHOWN: "yellow", Verdict.CONTRARY: "red"}
"""Of the terminal."""


def describe_claim(paper: str, claim: Claim, seed: int, budget_s: float) -> list[tuple[str, str]]:
    """Return the lines that introduce a claim, each as label and text."""
    entry = paper_entry(paper)
    arxiv = f" (arXiv:{entry.arxiv})" if entry.arxiv else ""
    return [
        ("paper", f"{entry.title}{arxiv}"),
        ("claim", f"{claim.statement} [{claim.source}]"),
        *(("published", str(published)) for published in claim.published),
        ("miniature", claim.design),
        ("limits", claim.limits),
        *(("caution", caution) for caution in claim.cautions),
        ("run", f"{len(claim.parts)} parts, seed {seed}, at most {budget_s:g} s"),
    ]


def describe_part(outcome: PartOutcome) -> Iterator[str]:
    """Yield the lines that report a part: one figure per line, followed by its expectation."""
    for measured in outcome.finding.measured if outcome.finding else ():
        yield f"{measured.what}: {measured.figure}"
        told = [f"({measured.interval.method})"]
        if measured.expected is not None:
            told.append(f"expected {measured.expected}: {measured.verdict}")
        if measured.published is not None:
            told.append(f"published {measured.published}")
        yield "    " + "; ".join(told)
    if outcome.finding is not None and outcome.finding.remark:
        yield outcome.finding.remark
    for note in outcome.notes:
        yield f"cut: {note}"


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The outcome in plain types; what is infinite or undefined becomes None."""
    import torch

    claim = outcome.claim
    record = {
        "paper": outcome.paper,
        "title": paper_entry(outcome.paper).title,
        "claim": claim.statement,
        "source": claim.source,
        "published": [asdict(published) for published in claim.published],
        "design": claim.design,
        "limits": claim.limits,
        "cautions": list(claim.cautions),
        "verdict": str(outcome.verdict),
        "summary": str(outcome),
        "parts": [_part_as_dict(part) for part in outcome.parts],
        "seed": outcome.seed,
        "budget_s": outcome.budget_s,
        "seconds": round(outcome.seconds, 1),
        "versions": {"gatewise": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"system": platform.platform(), "processor": platform.processor(), "cores": os.cpu_count()},
    }
    return finite_or_null(record)


def _part_as_dict(outcome: PartOutcome) -> dict[str, Any]:
    finding = outcome.finding
    return {
        "title": outcome.part.title,
        "method": outcome.part.method,
        "verdict": str(outcome.verdict),
        "why": outcome.why,
        "measured": [_measured_as_dict(measured) for measured in finding.measured] if finding else [],
        "remark": finding.remark if finding else "",
        "notes": list(outcome.notes),
        "charts": [asdict(chart) for chart in finding.charts] if finding else [],
        "seconds": round(outcome.seconds, 1),
    }


def _measured_as_dict(measured: Measured) -> dict[str, Any]:
    return {
        "what": measured.what,
        "unit": measured.unit,
        **asdict(measured.interval),
        "expected": None if measured.expected is None else str(measured.expected),
        "verdict": None if measured.verdict is None else str(measured.verdict),
        "published": None if measured.published is None else asdict(measured.published),
    }


def write_report(outcome: Outcome, folder: Path) -> None:
    """Write figure.png and result.json; where one of them cannot be written, the earlier pair stays.

    Raises:
        Failure: if one cannot be written (a full disk, no permission); names it.
    """
    record = json.dumps(as_dict(outcome), indent=2, allow_nan=False) + "\n"

    def write_both(result: IO[bytes]) -> None:
        # The figure takes its place once the result is on the disk, and the result takes its own right after.
        result.write(record.encode("utf-8"))
        result.flush()
        os.fsync(result.fileno())
        write_atomically(folder / "figure.png", lambda file: draw_figure(outcome, file))

    write_atomically(folder / "result.json", write_both)


def draw_figure(outcome: Outcome, file: IO[bytes]) -> None:
    """Draw every chart, and below them every figure beside what was expected and what was published, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(part, chart) for part in outcome.parts if part.finding for chart in part.finding.charts]
    rows_of_table = [row for part in outcome.parts for row in _table_rows(part)]
    rows_of_table += [
        ("the paper itself", one.what, "", "", f"{one.figure}, {one.source}", "") for one in outcome.claim.published
    ]
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns)
    table_height = 0.21 * (len(rows_of_table) + 2)
    figure = Figure(figsize=(15, 1.1 + 3.7 * rows + table_height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3.7] * rows + [table_height])
    for index, (part, chart) in enumerate(panels):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        chart.draw(axes)
        axes.set_title(f"{chart.title}\n{part.verdict}", fontsize=10, color=_VERDICT_COLORS[part.verdict])
    _draw_table(figure.add_subplot(grid[rows, :]), rows_of_table)
    heading = f"{paper_entry(outcome.paper).title}: {outcome.claim.statement}"
    figure.suptitle("\n".join(textwrap.wrap(heading, 150)), fontsize=12)
    figure.savefig(file, format="png", dpi=110)


_TABLE_HEADING = ("part", "measured here", "figure [interval]", "expected", "published", "verdict")
_TABLE_EDGES = (0.0, 0.15, 0.44, 0.59, 0.67, 0.92)
_TABLE_LETTERS = 200


def _table_rows(outcome: PartOutcome) -> Iterator[tuple[str, ...]]:
    if outcome.finding is None:
        yield outcome.part.title, "; ".join(outcome.notes), "", "", "", str(outcome.verdict)
        return
    for index, measured in enumerate(outcome.finding.measured):
        yield (
            outcome.part.title if index == 0 else "",
            measured.what,
            measured.figure,
            "" if measured.expected is None else str(measured.expected),
            "" if measured.published is None else f"{measured.published.figure}, {measured.published.source}",
            "" if measured.verdict is None else str(measured.verdict),
        )


def _draw_table(axes: Axes, rows: list[tuple[str, ...]]) -> None:
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(len(rows) + 1, 0))
    for line, row in enumerate([_TABLE_HEADING, *rows]):
        cells = [(left, text) for left, text in zip(_TABLE_EDGES, row, strict=True) if text]
        ends = [left for left, _ in cells[1:]] + [1.0]
        for (left, text), end in zip(cells, ends, strict=True):
            color = next((_VERDICT_COLORS[verdict] for verdict in Verdict if text == verdict), "black")
            weight = "bold" if line == 0 else "normal"
            # A cell runs on over empty ones.
            short = textwrap.shorten(text, round(_TABLE_LETTERS * (end - left)), placeholder="…")
            axes.text(left, line + 0.5, short, fontsize=8, va="center", color=color, weight=weight)
