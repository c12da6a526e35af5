"""Reports of a sweep: tables as CSV and JSON, a figure, and a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gatewise.files import finite_or_null, write_atomically, write_json, write_text
from gatewise.tasks.sweep_outcome import LEARNING_RATE, SEED, Best, Row, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

_WIDTH = "model.dim"
_OF_DATA = "data."
# Okabe and Ito's palette, which color-blind readers can distinguish.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")


def write_results(found: Sweep) -> None:
    """Write results.csv, results.json and, if an axis is numeric, figure.png into the folder of the sweep."""
    rows = [flat_row(row) for row in found.rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    whole = {
        "score": found.score,
        "lower_is_better": found.lower_is_better,
        "axes": {axis: list(values) for axis, values in found.axes.items()},
        "cells": rows,
        "best": [asdict(best) for best in found.best()],
    }
    write_text(found.folder / "results.csv", table.getvalue())
    write_json(found.folder / "results.json", finite_or_null(whole))
    figure = draw(found)
    if figure is not None:
        write_atomically(found.folder / "figure.png", lambda file: figure.savefig(file, format="png", dpi=150))


def flat_row(row: Row) -> dict[str, Any]:
    """Return a cell as one row of a table."""
    outcome = row.outcome
    metrics = {name.removeprefix("val/"): value for name, value in outcome.metrics.items() if name != "epoch"}
    return {
        **row.cell.values,
        "status": outcome.status,
        "best_epoch": outcome.metrics.get("epoch"),
        **metrics,
        "parameters": outcome.parameters,
        "state_bytes": outcome.state_bytes,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "folder": str(row.cell.folder),
        "error": outcome.error,
    }


def table_of_best(found: Sweep) -> RenderableType:
    """Return a table of the best results over learning rates, for the terminal."""
    from rich.table import Table

    score = found.score.removeprefix("val/")
    axes = [axis for axis in found.axes if axis not in (LEARNING_RATE, SEED)]
    table = Table(*axes, f"best {score}", "at best lr", "lr", "seeds", "parameters", box=None, padding=(0, 2, 0, 0))
    for best in found.best():
        spread = "" if best.spread is None else f" ± {best.spread:.4f}"
        table.add_row(
            *(str(best.values[axis]) for axis in axes),
            f"{best.best:.4f}",
            f"{best.mean:.4f}{spread}",
            "-" if best.lr is None else f"{best.lr:g}",
            str(best.seeds),
            "-" if best.parameters is None else f"{best.parameters:,}",
        )
    return table


def draw(found: Sweep) -> Figure | None:
    """Plot the score at the best learning rate over a numeric axis, or return None if none has two values.

    The axis is the width of the network, or else the first numeric one. There is one panel per combination of values on
    data axes, and one line per combination on the others.
    """
    from matplotlib.figure import Figure

    x = _axis_of_numbers(found)
    bests = found.best()
    if x is None or not bests:
        return None
    others = [axis for axis in found.axes if axis not in (x, LEARNING_RATE, SEED)]
    of_data = [axis for axis in others if axis.startswith(_OF_DATA)]
    of_network = [axis for axis in others if axis not in of_data]
    panels = list(_groups(bests, of_data))
    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for place, (title, members) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _panel(axes, found, x, [*_groups(members, of_network)])
        axes.set_title(title, fontsize=9)
    return figure


def _panel(axes: Axes, found: Sweep, x: str, lines: Sequence[tuple[str, list[Best]]]) -> None:
    for index, (label, members) in enumerate(lines):
        ordered = sorted(members, key=lambda best: best.values[x])
        axes.errorbar(
            [best.values[x] for best in ordered],
            [best.mean for best in ordered],
            [best.spread or 0.0 for best in ordered],
            marker="o",
            capsize=2,
            color=_COLORS[index % len(_COLORS)],
            label=label,
        )
    values = sorted(found.axes[x])
    if min(values) > 0 and max(values) >= 4 * min(values):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=found.score.removeprefix("val/"))
    if "accuracy" in found.score or "top" in found.score:
        axes.set_ylim(-0.02, 1.02)
    if lines[0][0]:
        axes.legend(frameon=False, fontsize=8)


def _axis_of_numbers(found: Sweep) -> str | None:
    candidates = [axis for axis in found.axes if axis not in (LEARNING_RATE, SEED)]
    numeric = [
        axis
        for axis in candidates
        if len(found.axes[axis]) > 1 and all(isinstance(value, int | float) for value in found.axes[axis])
    ]
    return _WIDTH if _WIDTH in numeric else next(iter(numeric), None)


def _groups(bests: Sequence[Best], axes: Sequence[str]) -> Iterator[tuple[str, list[Best]]]:
    """Yield groups with equal values on some axes, each with these values as a label."""
    groups: dict[str, list[Best]] = {}
    for best in bests:
        words = ", ".join(_word(axis, best.values[axis]) for axis in axes)
        groups.setdefault(words, []).append(best)
    yield from groups.items()


def _word(axis: str, value: Any) -> str:
    return str(value) if axis == "model.name" else f"{axis.rpartition('.')[2]} {value}"
