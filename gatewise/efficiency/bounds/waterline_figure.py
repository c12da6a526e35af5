"""The waterline plot: kernels as bars in execution order, and the ridge as the water's surface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gatewise.efficiency._figures import save_figure

if TYPE_CHECKING:
    from gatewise.efficiency.bounds.waterline import Bound, BoundKernel, Waterline

ABOVE, UNDER, DROP, WATER = "#2b8a3e", "#c92a2a", "#868e96", "#1971c2"


@dataclass(frozen=True)
class Bar:
    """Horizontal place of a kernel, from `left` to `left + width` of all operations; drops have no width."""

    entry: BoundKernel
    left: float
    width: float

    @property
    def color(self) -> str:
        if self.entry.is_drop:
            return DROP
        return UNDER if self.entry.is_memory_bound else ABOVE


def bars(bound: Bound) -> Iterator[Bar]:
    """Yield the kernels with their places between 0 and 1."""
    total, left = bound.ops, 0.0
    for entry in bound.kernels:
        width = entry.kernel.ops / total if total else 0.0
        yield Bar(entry, left, width)
        left += width


def height_range(bound: Bound) -> tuple[float, float]:
    """Return the lowest and highest intensity of the plot, at least a factor of two beyond bars and waterline."""
    heights = [entry.kernel.intensity for entry in bound.kernels if entry.kernel.ops] + [bound.ridge]
    return min(heights) / 4, max(heights) * 2


def draw(waterline: Waterline, bound: Bound, path: str | Path) -> None:
    """Write the plot to a file in the format given by its suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    low, high = height_range(bound)
    slowest = max((entry.min_s for entry in bound.drops), default=0.0)
    for bar in bars(bound):
        if bar.entry.is_drop:
            # A drop's size shows how long it takes.
            size = 3 + 8 * (bar.entry.min_s / slowest if slowest else 0) ** 0.5
            axes.plot([bar.left], [low * 1.3], "v", color="black", alpha=0.6, markersize=size, mew=0, zorder=3)
            continue
        height = bar.entry.kernel.intensity - low
        axes.bar(bar.left, height, bar.width, low, align="edge", color=bar.color, edgecolor="white", linewidth=0.4)
    axes.axhline(bound.ridge, color=WATER, linewidth=1.6)
    axes.axhspan(low, bound.ridge, color=WATER, alpha=0.08, zorder=0)
    label = {"boxstyle": "square,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.annotate(
        f"ridge {bound.ridge:.1f}",
        (1.0, bound.ridge),
        xytext=(-2, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=WATER,
        bbox=label,
    )
    axes.set(yscale="log", xlim=(0, 1), ylim=(low, high), xlabel="share of operations, in order", ylabel="op:byte")
    most = f"at most {bound.max_efficiency:.0%} of the peak of {waterline.device.name} in {waterline.dtype}"
    axes.set_title(f"{waterline.name}, {bound.level}: {most}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
