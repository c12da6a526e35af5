"""The panels that claims draw: plain numbers in, one matplotlib axes out.

matplotlib is imported when something is drawn. What is published is drawn in one colour throughout, so that the paper's
figure can be told from the measured one at a glance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PUBLISHED_COLOUR = "#000000"
LIMIT_COLOUR = "#999999"


class Chart(Protocol):
    """A panel: a dataclass of plain numbers, which are saved with the result, and the way to draw them."""

    title: str

    def draw(self, axes: Axes) -> None:
        """Draw on empty axes."""


@dataclass(frozen=True)
class Lines:
    """Curves over a common x.

    Args:
        series: label -> one y per x.
        published: label -> (x, y) pairs of a published curve.
        log: axes with a logarithmic scale: "", "x", "y" or "xy".
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    published: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    log: str = ""

    def draw(self, axes: Axes) -> None:
        for colour, (label, values) in zip(cycle(COLOURS), self.series.items(), strict=False):
            axes.plot(self.x, values, marker="o", color=colour, label=label)
        for label, points in self.published.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker="D", linestyle="--", color=PUBLISHED_COLOUR, label=label)
        if "x" in self.log:
            axes.set_xscale("log")
            axes.set_xticks(list(self.x), [f"{x:g}" for x in self.x], minor=False)
            axes.minorticks_off()
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(xlabel=self.x_label, ylabel=self.y_label)
        axes.legend(frameon=False, fontsize=8)


@dataclass(frozen=True)
class Bars:
    """One horizontal bar per label, from the first at the top.

    Args:
        bars: label -> (value, low, high); infinite bounds are not drawn.
        points: label -> the single repetitions behind it.
        published: label -> the published value.
        limit: a line that bars are to reach or to stay below.
        log: a logarithmic scale.
    """

    title: str
    x_label: str
    bars: Mapping[str, tuple[float, float, float]]
    points: Mapping[str, Sequence[float]] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    limit_label: str = ""
    log: bool = False

    def draw(self, axes: Axes) -> None:
        labels = list(self.bars)
        if self.log:
            axes.set_xscale("log")
        for row, label in enumerate(labels):
            value, low, high = self.bars[label]
            axes.barh(row, value, height=0.6, color=COLOURS[row % len(COLOURS)], alpha=0.75)
            if low > -float("inf") and high < float("inf") and high > low:
                axes.plot([low, high], [row, row], color="black", linewidth=1.5, marker="|")
            if label in self.points:
                axes.plot(self.points[label], [row] * len(self.points[label]), "o", color="black", markersize=3)
            if label in self.published:
                axes.plot(self.published[label], row, "D", color=PUBLISHED_COLOUR, markersize=7, zorder=4)
        if self.published:
            axes.plot([], [], "D", color=PUBLISHED_COLOUR, label="published")
        if self.limit is not None:
            axes.axvline(self.limit, color=LIMIT_COLOUR, linestyle="--", label=self.limit_label)
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set(xlabel=self.x_label)
        if self.published or self.limit_label:
            axes.legend(frameon=False, fontsize=8)


@dataclass(frozen=True)
class Pictures:
    """Small maps side by side, each in its own scale of greys from 0 up.

    Args:
        maps: label -> rows of values.
    """

    title: str
    maps: Mapping[str, Sequence[Sequence[float]]]

    def draw(self, axes: Axes) -> None:
        axes.set_axis_off()
        share = 1 / len(self.maps)
        for column, (label, rows) in enumerate(self.maps.items()):
            inner = axes.inset_axes((column * share + 0.02, 0.0, share - 0.04, 0.9))
            inner.imshow(rows, cmap="viridis", interpolation="nearest", vmin=0)
            inner.set_title(label, fontsize=8)
            inner.set(xticks=[], yticks=[])
