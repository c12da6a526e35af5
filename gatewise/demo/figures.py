"""Figures of the report."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, ACCENT, MUTED, PALE = "#1f2933", "#0b7285", "#9aa5b1", "#d9e2ec"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure in the style of the report, sized in inches, without a display or global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8)
    return figure, axes


def as_data_uri(figure: Figure, kind: str = "svg") -> str:
    """Return the figure as a `data:` URL, so that a page can embed it."""
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    media = "image/svg+xml" if kind == "svg" else f"image/{kind}"
    return f"data:{media};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def training_curve(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Plot training loss by step and validation accuracy by epoch, from the rows of a run's `metrics.csv`."""
    figure, axes = new_figure(6.4, 3.0)
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    scores = [(row["step"], row["val/top1"]) for row in rows if "val/top1" in row]
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color=MUTED, linewidth=1)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("training loss", fontsize=8, color="#616e7c")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    right.spines[["top", "left"]].set_visible(False)
    right.plot([step for step, _ in scores], [score for _, score in scores], color=ACCENT, marker="o", markersize=3)
    right.set_ylabel("validation accuracy", fontsize=8, color=ACCENT)
    right.tick_params(colors=INK, labelsize=8)
    right.yaxis.set_major_formatter("{x:.0%}")
    last_step, last_score = scores[-1]
    right.annotate(
        f"{last_score:.1%}",
        (last_step, last_score),
        textcoords="offset points",
        xytext=(-4, -12),
        ha="right",
        fontsize=8,
        color=ACCENT,
    )
    return figure


def confusion_matrix(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Plot the confusion matrix: shares of each true class (row) by predicted class (column), labeled with counts."""
    counts = np.asarray(confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = new_figure(5.6, 4.9)
    axes.imshow(shares, cmap="GnBu", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        color = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(class_names)), class_names, fontsize=8)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    axes.spines[:].set_visible(False)
    return figure


def latency_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the median latency and interquartile range of plans; rows have name, median, low, high (ms) and chosen."""
    figure, axes = new_figure(5.0, 0.6 + 0.34 * len(rows))
    positions = range(len(rows))
    medians = [row["median"] for row in rows]
    spread = [[row["median"] - row["low"] for row in rows], [row["high"] - row["median"] for row in rows]]
    colors = [ACCENT if row["chosen"] else MUTED for row in rows]
    axes.barh(positions, medians, xerr=spread, color=colors, height=0.62, error_kw={"ecolor": INK, "elinewidth": 1})
    for position, row in zip(positions, rows, strict=True):
        axes.text(row["high"], position, f"  {row['median']:.2f} ms", va="center", fontsize=8, color=INK)
    axes.set_yticks(positions, [row["name"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(row["high"] for row in rows))
    axes.set_xlabel("milliseconds per batch", fontsize=8)
    return figure


def stage_shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the share of each stage in parameters, MACs and activation bytes; rows have these by name."""
    figure, axes = new_figure(5.0, 2.2)
    measures = {"parameters": "parameters", "MACs": "macs", "activations": "activations"}
    starts = np.zeros(len(measures))
    shades = [_shade(index, len(rows)) for index in range(len(rows))]
    totals = {label: max(1, sum(row[key] for row in rows)) for label, key in measures.items()}
    for row, shade in zip(rows, shades, strict=True):
        shares = np.array([row[key] / totals[label] for label, key in measures.items()])
        axes.barh(list(measures), shares, left=starts, color=shade, height=0.62, label=row["name"])
        starts += shares
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend(ncols=4, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _shade(index: int, count: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["GnBu"](0.3 + 0.65 * index / max(1, count - 1))
