"""Several networks side by side on this machine: size, cost, latency, throughput and memory."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gatewise.efficiency.count import count
from gatewise.efficiency.inputs import sample_input
from gatewise.efficiency.optimize import Precision, optimize
from gatewise.efficiency.time import Candidate, measure, peak_memory


@dataclass(frozen=True)
class Measured:
    """One network in one form at one batch size. MACs are per sample; times are per batch."""

    model: str
    form: str
    batch_size: int
    parameters: int
    macs: int
    median_ms: float
    spread_ms: float
    samples_per_s: float
    peak_memory_bytes: int


@torch.no_grad()
def compare(
    networks: Mapping[str, tuple[nn.Module, tuple[int, ...]]],
    batch_sizes: Sequence[int] = (1,),
    *,
    optimized: bool = False,
    precision: Precision = "float32",
    budget_s: float = 10.0,
    optimize_budget_s: float = 300.0,
) -> list[Measured]:
    """Measure networks by turns: at each batch size every one of them once per round.

    Args:
        networks: name -> (network in eval mode, shape of one sample).
        optimized: measure each network also as `optimize` returns it, with `precision` permitted.
        budget_s: seconds of measuring per batch size.
        optimize_budget_s: seconds of trying plans, per network and batch size.
    Raises:
        ValueError: for a batch size below 1, or a network that cannot run on its sample shape.
        Failure: if peak memory cannot be read on this system.
    """
    if not batch_sizes or any(size < 1 for size in batch_sizes):
        raise ValueError(f"batch sizes must be 1 or more, not {list(batch_sizes)}")
    costs = {name: count(model, sample_input(model, shape)) for name, (model, shape) in networks.items()}
    rows = []
    for size in batch_sizes:
        calls: dict[tuple[str, str], Candidate] = {}
        for name, (model, shape) in networks.items():
            example = sample_input(model, shape, size)
            calls[name, "eager"] = partial(_call, model, example)
            if optimized:
                fast = optimize(model, example, precision, budget_s=optimize_budget_s)
                calls[name, fast.report.chosen.name] = partial(_call, fast, example)
        nothing = torch.empty(size)
        memory = {key: peak_memory(call, nothing) for key, call in calls.items()}
        timings = measure({" | ".join(key): call for key, call in calls.items()}, nothing, budget_s=budget_s)
        for (name, form), timing in zip(calls, timings, strict=True):
            rows.append(
                Measured(
                    model=name,
                    form=form,
                    batch_size=size,
                    parameters=costs[name].parameters,
                    macs=costs[name].macs,
                    median_ms=1e3 * timing.median,
                    spread_ms=1e3 * timing.spread,
                    samples_per_s=timing.throughput,
                    peak_memory_bytes=memory[name, form],
                )
            )
    return rows


def _call(function: Candidate, example: Tensor, _: Tensor) -> object:
    # Networks differ in input size, so each is measured on an example of its own.
    return function(example)


def write_csv(rows: Sequence[Measured], path: str | Path) -> None:
    """One line per row, under the field names of `Measured`."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def draw(rows: Sequence[Measured], path: str | Path) -> None:
    """A bar chart of the time per sample, grouped by batch size; the quartile range as whiskers."""
    from matplotlib.figure import Figure

    sizes = sorted({row.batch_size for row in rows})
    height = 0.4 * len(rows) + 0.7 * len(sizes) + 0.4
    figure = Figure(figsize=(8, height), layout="constrained")
    shares = [sum(row.batch_size == size for row in rows) for size in sizes]
    panels = figure.subplots(len(sizes), 1, squeeze=False, gridspec_kw={"height_ratios": shares})
    for axes, size in zip(panels[:, 0], sizes, strict=True):
        here = [row for row in rows if row.batch_size == size]
        labels = [f"{row.model}, {row.form}" for row in here]
        times = [row.median_ms / size for row in here]
        colours = ["#8a8f98" if row.form == "eager" else "#1f77b4" for row in here]
        axes.barh(labels, times, xerr=[row.spread_ms / size / 2 for row in here], color=colours, height=0.65)
        axes.invert_yaxis()
        axes.set_xlabel(f"ms per sample at batch {size}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
