"""The efficiency gap: split latency into the amount of arithmetic and how much of the peak the kernels reach.

With W operations per sample, a device's peak F and a measured latency T per sample:

    T0 = W / F            ideal latency
    e  = T0 / T           computational efficiency;  T = W / (F e)
    gap = T / T0 = 1 / e

Accuracy over W tells how good a model is; e tells how good its kernels are on this device. Latency depends on both. On
a logarithmic axis the distance between a network's ideal and its actual latency is log(1 / e). If a family of models
has the better ideal curve but not the better actual curve, its kernels hold it back, not the model.

Source: Lavin 2024, arXiv:2404.03617.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gatewise.efficiency._figures import save_figure
from gatewise.efficiency._text import columns, duration
from gatewise.efficiency.bounds.device import Device
from gatewise.efficiency.bounds.device import device as measured_device
from gatewise.efficiency.cost.count import trace
from gatewise.efficiency.cost.operators import dtype_name
from gatewise.efficiency.inputs import eval_mode
from gatewise.efficiency.timing.measure import Candidate, measure


@dataclass(frozen=True)
class GapPoint:
    """One network: operations, seconds and accuracy, per sample.

    Attributes:
        flagged: whether the efficiency exceeds 1 by more than the noise, so the peak, operations or time is wrong.
    """

    name: str
    accuracy: float
    ops: float
    latency_s: float
    peak: float
    noise: float

    @property
    def ideal_s(self) -> float:
        """T0 in seconds."""
        return self.ops / self.peak

    @property
    def efficiency(self) -> float:
        """Used fraction of the peak, e."""
        return self.ideal_s / self.latency_s

    @property
    def gap(self) -> float:
        """Ratio of actual to ideal time, 1 / e."""
        return self.latency_s / self.ideal_s

    @property
    def flagged(self) -> bool:
        return self.efficiency > 1 + self.noise


@dataclass(frozen=True)
class EfficiencyGap:
    """Networks on one device, in the order in which they were given."""

    device: Device
    dtype: str
    points: tuple[GapPoint, ...]

    @property
    def flagged(self) -> tuple[GapPoint, ...]:
        """Networks whose efficiency exceeds the possible."""
        return tuple(point for point in self.points if point.flagged)

    def table(self) -> str:
        """Return the networks as a text table."""
        rows = [("network", "accuracy", "GMACs", "ideal", "actual", "efficiency", "gap")]
        for point in self.points:
            rows.append(
                (
                    point.name,
                    f"{point.accuracy:g}",
                    f"{point.ops / 2e9:,.4g}",
                    duration(point.ideal_s),
                    duration(point.latency_s),
                    f"{point.efficiency:.3f}{' !' if point.flagged else ''}",
                    f"{point.gap:.2f}x",
                )
            )
        lines = [columns(rows)]
        if self.flagged:
            what = f"more than the peak of {self.device.name} in {self.dtype}, so the peak or the count is wrong"
            lines.append(f"! {what}: {', '.join(point.name for point in self.flagged)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def plot(self, path: str | Path) -> None:
        """Draw accuracy over ideal and actual latency (png, svg or pdf), with flagged networks in red."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for point in self.points:
            color = "#c92a2a" if point.flagged else "#1971c2"
            ideal, actual = 1e3 * point.ideal_s, 1e3 * point.latency_s
            axes.plot([ideal, actual], [point.accuracy] * 2, color=color, linewidth=1, alpha=0.6)
            axes.plot(ideal, point.accuracy, "o", color=color, markerfacecolor="white")
            axes.plot(actual, point.accuracy, "o", color=color)
            label = f"{point.name}, {point.efficiency:.0%}{' (!)' if point.flagged else ''}"
            axes.annotate(label, (actual, point.accuracy), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axes.set(xscale="log", xlabel="ms per sample: ideal (open) and actual (full)", ylabel="accuracy")
        axes.set_title(f"efficiency gap on {self.device.name} in {self.dtype}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.2, y=0.15)
        save_figure(figure, path)


def efficiency_gap(
    models: Mapping[str, nn.Module],
    accuracies: Mapping[str, float],
    example: Tensor | Mapping[str, Tensor],
    device: Device | None = None,
    *,
    latencies: Mapping[str, float] | None = None,
    budget_s: float = 10.0,
) -> EfficiencyGap:
    """Return how far networks are from the latency that their arithmetic permits.

    Args:
        models: networks by name; they are run in eval mode, interleaved.
        accuracies: accuracy by network, in any unit.
        example: one batch for all networks, or one per network, all of the same dtype.
        device: processor limits; by default, measured on the examples' device.
        latencies: seconds per sample, if measured otherwise; nothing is measured then.
        budget_s: measuring time in seconds.
    Raises:
        ValueError: if there are no models, names disagree, a latency is not positive, the examples have several dtypes,
            a network has no operations, or it cannot run on its example.
    """
    if not models:
        raise ValueError("there is nothing to compare: pass at least one network")
    examples = dict(example) if isinstance(example, Mapping) else dict.fromkeys(models, example)
    for what, given in (("accuracies", accuracies), ("examples", examples), ("latencies", latencies)):
        if given is not None and set(given) != set(models):
            raise ValueError(
                f"{what} must be given for {', '.join(sorted(models))}, not for {', '.join(sorted(given))}"
            )
    traces = {name: trace(model, examples[name]) for name, model in models.items()}
    found = {run.actual_dtype for run in traces.values()}
    if len(found) > 1:
        raise ValueError(f"one peak is for one dtype, and the networks run in {', '.join(sorted(found))}")
    dtype = dtype_name(found.pop())
    if latencies is None:
        latencies = _latencies(models, examples, budget_s)
    if wrong := [name for name, latency in latencies.items() if not 0 < latency < float("inf")]:
        raise ValueError(f"latencies must be positive and finite, and that of {wrong[0]} is {latencies[wrong[0]]}")
    if idle := [name for name, run in traces.items() if not run.cost.ops]:
        raise ValueError(f"{idle[0]} has no operations that count, so it has no ideal latency")
    limits = measured_device(next(iter(examples.values())).device) if device is None else device
    points = tuple(
        GapPoint(
            name=name,
            accuracy=accuracies[name],
            ops=run.cost.ops / examples[name].shape[0],
            latency_s=latencies[name],
            peak=limits.peak(dtype),
            noise=limits.noise,
        )
        for name, run in traces.items()
    )
    return EfficiencyGap(limits, dtype, points)


@torch.no_grad()
def _latencies(models: Mapping[str, nn.Module], examples: Mapping[str, Tensor], budget_s: float) -> dict[str, float]:
    """Return median seconds per sample, from interleaved measurements."""
    calls: dict[str, Candidate] = {name: partial(_call, model, examples[name]) for name, model in models.items()}
    # Examples may differ, so each call has its own; the first one's device decides whether to wait for a GPU.
    first = next(iter(examples.values()))
    timings = measure(calls, first, budget_s=budget_s)
    return {timing.name: timing.median / examples[timing.name].shape[0] for timing in timings}


def _call(model: nn.Module, example: Tensor, _: Tensor) -> object:
    with eval_mode(model):
        return model(example)
