"""The panels that claims draw: plain numbers in, one matplotlib axes out.

matplotlib is imported when something is drawn. What is published is drawn in one color throughout, so that the paper's
figure can be distinguished from the measured one at a glance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which color-blind readers can distinguish.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PUBLISHED_COLOR = "#000000"
LIMIT_COLOR = "#999999"


@dataclass(frozen=True)
class Chart(ABC):
    """A panel: plain numbers, which are saved with the result, and the way to draw them."""

    title: str

    @abstractmethod
    def draw(self, axes: Axes) -> None:
        """Draw on empty axes."""


@dataclass(frozen=True)
class Lines(Chart):
    """Curves over a common x.

    Args:
        series: label -> one y per x.
        published: label -> (x, y) pairs of a published curve.
        log: axes with a logarithmic scale: "", "x", "y" or "xy".
        y_range: ends of the y axis; what the curves need where None.
    """

    x_label: str
    y_label: str
    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    published: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    log: str = ""
    y_range: tuple[float, float] | None = None

    def draw(self, axes: Axes) -> None:
        for index, (color, (label, values)) in enumerate(zip(cycle(COLORS), self.series.items(), strict=False)):
            # Thinner and thinner, so that a curve on top of another leaves it visible.
            width = 1 + 1.2 * (len(self.series) - 1 - index)
            axes.plot(self.x, values, marker="o", color=color, label=label, linewidth=width, markersize=3 + width)
        for label, points in self.published.items():
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker="D", linestyle="--", color=PUBLISHED_COLOR, label=label)
        if "x" in self.log:
            axes.set_xscale("log")
            axes.set_xticks(list(self.x), [f"{x:g}" for x in self.x], minor=False)
            axes.minorticks_off()
        if "y" in self.log:
            axes.set_yscale("log")
        axes.set(xlabel=self.x_label, ylabel=self.y_label, ylim=self.y_range)
        axes.legend(frameon=False, fontsize=8)


@dataclass(frozen=True)
class Bars(Chart):
    """One horizontal bar per label, from the first at the top; labels `group: member` have their group's color.

    Args:
        bars: label -> (value, low, high); infinite bounds are not drawn, nor are zeros on a logarithmic scale.
        points: label -> the single repetitions behind it.
        published: label -> the published value.
        limit: a line that bars are to reach or to stay below.
        log: a logarithmic scale.
        x_range: ends of the scale; what the bars need where None.
    """

    x_label: str
    bars: Mapping[str, tuple[float, float, float]]
    points: Mapping[str, Sequence[float]] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None
    limit_label: str = ""
    log: bool = False
    x_range: tuple[float, float] | None = None

    def draw(self, axes: Axes) -> None:
        labels = list(self.bars)
        groups = list(dict.fromkeys(label.partition(":")[0] for label in labels))
        if self.log:
            axes.set_xscale("log")
        for row, label in enumerate(labels):
            value, low, high = self.bars[label]
            color = COLORS[groups.index(label.partition(":")[0]) % len(COLORS)]
            if not (self.log and value <= 0):
                axes.barh(row, value, height=0.6, color=color, alpha=0.75)
            if math.isfinite(high - low) and high > low:
                axes.plot([low, high], [row, row], color="black", linewidth=1.5, marker="|")
            axes.plot(self.points.get(label, ()), [row] * len(self.points.get(label, ())), "ko", markersize=3)
            if label in self.published:
                axes.plot(self.published[label], row, "D", color=PUBLISHED_COLOR, markersize=7, zorder=4)
        if self.published:
            axes.plot([], [], "D", color=PUBLISHED_COLOR, label="published")
        if self.limit is not None:
            axes.axvline(self.limit, color=LIMIT_COLOR, linestyle="--", label=self.limit_label)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set(xlabel=self.x_label, xlim=self.x_range)
        if self.published or self.limit_label:
            axes.legend(frameon=False, fontsize=8)


@dataclass(frozen=True)
class Pictures(Chart):
    """Small maps, each on its own scale from 0 up, in rows of at most three.

    Args:
        maps: label -> rows of values.
    """

    maps: Mapping[str, Sequence[Sequence[float]]]

    def draw(self, axes: Axes) -> None:
        axes.set_axis_off()
        columns = min(3, len(self.maps))
        rows = math.ceil(len(self.maps) / columns)
        for index, (label, values) in enumerate(self.maps.items()):
            row, column = divmod(index, columns)
            box = (column / columns, 1 - (row + 0.9) / rows, 0.9 / columns, 0.75 / rows)
            inner = axes.inset_axes(box)
            inner.imshow(values, cmap="viridis", interpolation="nearest", vmin=0)
            inner.set_title(label, fontsize=8)
            inner.set(xticks=[], yticks=[])
