"""Several networks side by side on this machine: size, cost, latency, throughput, memory and energy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from gatewise.efficiency._figures import save_figure, save_table
from gatewise.efficiency.acceleration.optimize import Precision, optimize
from gatewise.efficiency.cost.count import count
from gatewise.efficiency.inputs import sample_input
from gatewise.efficiency.timing.energy import energy_counter, joules_per_call
from gatewise.efficiency.timing.hardware import torch_threads
from gatewise.efficiency.timing.measure import Candidate, Timing, measure, peak_memory

Networks = Mapping[str, tuple[nn.Module, tuple[int, ...]]]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

REFERENCE = "reference"
REFERENCE_SIDE = 512
"""Size of the matrices whose product is interleaved with the networks, to track the machine's speed over time."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one network in one form, at one batch size and number of threads.

    Attributes:
        dtype: data type of weights and activations.
        macs: multiply-accumulates per sample.
        median_ms, spread_ms: time per batch: median over rounds, and interquartile range.
        low_ms, high_ms: 95 % confidence interval of the median, by a bootstrap over the rounds.
        energy_j: joules per sample; None where the processor's counter cannot be read.
        over_reference: time relative to a fixed matrix product in the same round, one entry per round.
    """

    model: str
    form: str
    batch_size: int
    parameters: int
    macs: int
    median_ms: float
    spread_ms: float
    samples_per_s: float
    peak_memory_bytes: int
    threads: int = 1
    dtype: str = "float32"
    low_ms: float = float("nan")
    high_ms: float = float("nan")
    energy_j: float | None = None
    over_reference: tuple[float, ...] = ()

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """Measured configuration, without the results."""
        return self.model, self.form, self.batch_size, self.threads, self.dtype


@dataclass(frozen=True)
class _Call:
    model: str
    form: str
    dtype: str
    function: Candidate


@torch.no_grad()
def compare(
    networks: Networks,
    batch_sizes: Sequence[int] = (1,),
    *,
    threads: Sequence[int] | None = None,
    dtypes: Sequence[str] = ("float32",),
    optimized: bool = False,
    precision: Precision = "float32",
    budget_s: float = 10.0,
    optimize_budget_s: float = 300.0,
    warm_up: int = 2,
    warm_up_s: float = 0.0,
) -> list[Measured]:
    """Measure networks in interleaved rounds. Each round runs every network once per batch size and thread count.

    Args:
        networks: float32 networks in eval mode and the shape of one sample, by name.
        threads: numbers of CPU threads; None for torch's current number.
        dtypes: data types of the eager networks, of "float32" and "bf16".
        optimized: also measure each network as `optimize` returns it, with `precision` permitted.
        budget_s: measuring time in seconds per batch size and number of threads.
        optimize_budget_s: seconds for trying plans per network, batch size and number of threads.
        warm_up: number of calls of each network before it is measured.
        warm_up_s: minimum duration of the warm-up in seconds.
    Raises:
        ValueError: for a batch size or number of threads below 1, an unknown dtype, or a network that cannot run on its
            sample shape.
        Failure: if peak memory cannot be read on this system.
    """
    if not batch_sizes or any(size < 1 for size in batch_sizes):
        raise ValueError(f"batch sizes must be 1 or more, not {list(batch_sizes)}")
    threads = [torch.get_num_threads()] if threads is None else threads
    if not threads or any(number < 1 for number in threads):
        raise ValueError(f"numbers of threads must be 1 or more, not {list(threads)}")
    if not dtypes or any(dtype not in DTYPES for dtype in dtypes):
        raise ValueError(f"dtypes must be of {', '.join(DTYPES)}, not {', '.join(dtypes) or 'none'}")
    costs = {name: count(model, sample_input(model, shape)) for name, (model, shape) in networks.items()}
    rows = []
    for size, number in product(batch_sizes, threads):
        with torch_threads(number):
            calls = list(_calls(networks, size, dtypes))
            if optimized:
                calls += _optimized(networks, size, precision, optimize_budget_s)
            nothing = torch.empty(size)
            memory = [peak_memory(call.function, nothing) for call in calls]
            timings = _measure(calls, nothing, budget_s, warm_up, warm_up_s)
            reference = timings.pop()
            counter = energy_counter(nothing.device)
            for call, timing, peak in zip(calls, timings, memory, strict=True):
                energy = None if counter is None else joules_per_call(call.function, nothing, counter) / size
                cost = costs[call.model]
                rows.append(_row(call, timing, reference, size, cost.parameters, cost.macs, peak, energy))
    return rows


def _calls(networks: Networks, size: int, dtypes: Sequence[str]) -> Iterator[_Call]:
    for name, (model, shape) in networks.items():
        example = sample_input(model, shape, size)
        for dtype in dtypes:
            network, batch = model, example
            if DTYPES[dtype] is not torch.float32:
                network = deepcopy(model).to(DTYPES[dtype])
                # Tokens keep their dtype.
                batch = example.to(DTYPES[dtype]) if example.is_floating_point() else example
            yield _Call(name, "eager", dtype, partial(_on_example, network, batch))


def _optimized(networks: Networks, size: int, precision: Precision, budget_s: float) -> list[_Call]:
    calls = []
    for name, (model, shape) in networks.items():
        example = sample_input(model, shape, size)
        fast = optimize(model, example, precision, budget_s=budget_s)
        calls.append(_Call(name, fast.report.chosen.name, precision, partial(_on_example, fast, example)))
    return calls


def _on_example(function: Candidate, example: Tensor, _: Tensor) -> object:
    # Networks differ in input size, so each is measured on its own example.
    return function(example)


def _measure(calls: Sequence[_Call], nothing: Tensor, budget_s: float, warm_up: int, warm_up_s: float) -> list[Timing]:
    """Return the timings of the calls, followed by that of the reference."""
    square = torch.ones(REFERENCE_SIDE, REFERENCE_SIDE)
    candidates = {f"{index}": call.function for index, call in enumerate(calls)}
    candidates[REFERENCE] = lambda _: square @ square
    return measure(candidates, nothing, budget_s=budget_s, warm_up=warm_up, warm_up_s=warm_up_s)


def _row(
    call: _Call,
    timing: Timing,
    reference: Timing,
    size: int,
    parameters: int,
    macs: int,
    peak: int,
    energy: float | None,
) -> Measured:
    low, high = timing.interval
    return Measured(
        model=call.model,
        form=call.form,
        batch_size=size,
        parameters=parameters,
        macs=macs,
        median_ms=1e3 * timing.median,
        spread_ms=1e3 * timing.spread,
        samples_per_s=timing.throughput,
        peak_memory_bytes=peak,
        threads=torch.get_num_threads(),
        dtype=call.dtype,
        low_ms=1e3 * low,
        high_ms=1e3 * high,
        energy_j=energy,
        over_reference=tuple(own / fixed for own, fixed in zip(timing.samples, reference.samples, strict=True)),
    )


def write_csv(rows: Sequence[Measured], path: str | Path) -> None:
    """Write one line per row, under the field names of `Measured`. Single rounds are omitted."""
    names = [field.name for field in fields(Measured) if field.name != "over_reference"]
    save_table([names, *([getattr(row, name) for name in names] for row in rows)], path)


def draw(rows: Sequence[Measured], path: str | Path) -> None:
    """Draw a bar chart of the time per sample, grouped by batch size, with the median's bounds as whiskers."""
    from matplotlib.figure import Figure

    sizes = sorted({row.batch_size for row in rows})
    height = 0.4 * len(rows) + 0.7 * len(sizes) + 0.4
    figure = Figure(figsize=(8, height), layout="constrained")
    shares = [sum(row.batch_size == size for row in rows) for size in sizes]
    panels = figure.subplots(len(sizes), 1, squeeze=False, gridspec_kw={"height_ratios": shares})
    various = {(row.threads, row.dtype) for row in rows}
    for axes, size in zip(panels[:, 0], sizes, strict=True):
        here = [row for row in rows if row.batch_size == size]
        labels = [_label(row, len(various) > 1) for row in here]
        times = [row.median_ms / size for row in here]
        low = [max(row.median_ms - row.low_ms, 0) / size for row in here]
        high = [max(row.high_ms - row.median_ms, 0) / size for row in here]
        colors = ["#8a8f98" if row.form == "eager" else "#1f77b4" for row in here]
        axes.barh(labels, times, xerr=[low, high], color=colors, height=0.65)
        axes.invert_yaxis()
        axes.set_xlabel(f"ms per sample at batch {size}")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _label(row: Measured, various: bool) -> str:
    return f"{row.model}, {row.form}" + (f", {row.dtype}, {row.threads} threads" if various else "")
