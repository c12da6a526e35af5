"""Make a network fast on this machine with one call: build, check and measure several plans, and keep the best one.

Every plan must first reproduce the original's output, on the example and on a batch of another size. The plans that
pass and the original are then timed in interleaved rounds. If no plan is faster, the original is returned.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.plan_file import save_plan
from gatewise.efficiency.acceleration.plans import default_plans
from gatewise.efficiency.acceleration.report import ORIGINAL, OptimizationReport, PlanResult
from gatewise.efficiency.acceleration.runners import NotApplicableError, Runner
from gatewise.efficiency.inputs import check_example, check_inference, run
from gatewise.efficiency.quantization.prepare import Batches
from gatewise.efficiency.timing.measure import Timing, measure, ratio

Precision = Literal["float32", "bf16", "int8"]

TOLERANCE: dict[str, float] = {
    # Reordering float32 sums changes the output of deep networks by 1e-6 to 1e-5.
    "float32": 1e-4,
    # bfloat16 keeps 8 bits: 4e-3 per rounding, and a few roundings survive to the output.
    "bf16": 5e-2,
    # 256 codes per tensor; where roundings of many layers accumulate, single outputs may move by tens of codes.
    "int8": 2e-1,
}
"""Largest accepted error: the largest absolute difference from the original's output, over the largest output."""

FINALISTS = 3
"""Number of plans that are measured at length, after a brief measurement of all."""


class OptimizedModel:
    """A network optimized for one input shape and device. It maps float32 batches (or tokens) to float32 outputs.

    Gradients are not supported.
    Batches of any size are accepted, but only the example's size was measured. A compiled plan splits other sizes into
    chunks of the size that it was compiled for and pads the last one, so nothing is recompiled.
    `report` lists what was tried.
    """

    def __init__(self, runner: Runner, report: OptimizationReport, context: PlanContext) -> None:
        self.report = report
        self._runner = runner
        self._context = context
        self._device, self._dtype = context.example.device, context.example.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return the original network's outputs for a batch.

        Raises:
            TypeError: if `x` is not a tensor.
            ValueError: if the shape per sample, the dtype or the device differs from the example's, if the batch is
                empty, or if an integer plan gets values that are not finite.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"an optimized network takes a torch.Tensor, not {type(x).__name__}")
        expected = self.report.input_shape[1:]
        if tuple(x.shape[1:]) != expected or x.shape[0] < 1:
            raise ValueError(
                f"this network was optimized for batches of {expected}, not for shape {tuple(x.shape)}; "
                "call optimize again with an example of that shape"
            )
        if x.dtype != self._dtype or x.device != self._device:
            expected_dtype = str(self._dtype).removeprefix("torch.")
            raise ValueError(f"expected {expected_dtype} on {self._device}, not {x.dtype} on {x.device}")
        with torch.no_grad():
            return self._runner(x)

    def save(self, path: str | Path) -> Path:
        """Write the chosen plan and what it needs of the network to one file, for `load_optimized`.

        Raises:
            UserError: if the plan is not built into the library, since only built-in plans can be rebuilt.
            Failure: if the network cannot be serialized in a form that the plan can start from, or the file cannot be
                written. The message gives the reason.
        """
        return save_plan(self.report, self._context, self._runner, Path(path))

    def __repr__(self) -> str:
        return f"OptimizedModel({self.report.chosen.name}, {self.report.speedup:.2f}x)"


def optimize(
    model: nn.Module,
    example: Tensor,
    precision: Precision = "float32",
    *,
    calibration: Batches | None = None,
    budget_s: float = 300.0,
    plans: Sequence[Plan] | None = None,
) -> OptimizedModel:
    """Return a callable that computes what `model` does on batches like `example`, and is never slower.

    `model` itself is not modified. Outputs agree with the model's within `TOLERANCE[precision]`.

    Args:
        example: a float32 or token batch of the size, and on the device, to optimize for.
        precision: "bf16" permits weights and activations in bfloat16; "int8" permits 8-bit integers as well.
        calibration: a batch or batches of real inputs, prepared as for evaluation; "int8" derives value ranges from
            them. `gatewise.efficiency.quantize` reports and limits what that costs in accuracy.
        budget_s: seconds after which no further plan is started. A plan already started is finished, and measuring
            takes up to a fifth more.
        plans: plans to try; None for those that suit the precision, the device and the batch.
    Raises:
        TypeError: if `example` is not a tensor.
        ValueError: if the precision is unknown, the network is in training mode or not in float32, it cannot run on the
            example, its output is not finite (nothing could be checked against it), or "int8" has no calibration.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
    if (calibration is None) == (precision == "int8"):
        raise ValueError("int8, and only int8, needs calibration: a batch or batches of real inputs")
    if not budget_s > 0:
        raise ValueError(f"budget_s must be a positive number of seconds, not {budget_s}")
    check_inference(model, "optimize")
    check_example(model, example)
    if example.is_floating_point() and example.dtype != torch.float32:
        raise ValueError(f"optimize takes a float32 network and example, not {example.dtype}")
    checks = _Checks.of(model, example, TOLERANCE[precision])
    context = PlanContext(model, example, calibration)
    built = _build_all(default_plans(precision, example) if plans is None else plans, context, checks, budget_s)
    results = _choose(model, example, built, budget_s)
    report = OptimizationReport(
        device=str(example.device),
        threads=torch.get_num_threads(),
        precision=precision,
        tolerance=TOLERANCE[precision],
        input_shape=tuple(example.shape),
        plans=tuple(results),
    )
    runners = {entry.result.name: entry.runner for entry in built}
    return OptimizedModel(runners.get(report.chosen.name) or model, report, context)


@dataclass(frozen=True)
class _Checks:
    """Inputs and the original network's outputs for them."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, example: Tensor, tolerance: float) -> _Checks:
        other_size = torch.cat([example[:1], example.flip(0)])
        pairs = tuple((batch, run(model, batch)) for batch in (example, other_size))
        if not all(output.isfinite().all() for _, output in pairs):
            raise ValueError("the network's output for the example is not finite, so nothing can be checked against it")
        return cls(pairs, tolerance)

    def error(self, runner: Runner) -> float:
        """Return the largest relative error; infinite if the shape differs or an output is not finite."""
        return max(relative_error(runner(batch), expected) for batch, expected in self.pairs)


def relative_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape or output.dtype != torch.float32 or not output.isfinite().all():
        return float("inf")
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((output - expected).abs().max() / scale).item()


@dataclass(frozen=True)
class _Built:
    """A plan's outcome so far, with a runner if its output is correct."""

    result: PlanResult
    runner: Runner | None = None


def _build_all(plans: Sequence[Plan], context: PlanContext, checks: _Checks, budget_s: float) -> list[_Built]:
    names = [plan.name for plan in plans]
    if ORIGINAL in names or len(set(names)) < len(names):
        raise ValueError(f"plans need different names, none of them {ORIGINAL!r}: {', '.join(names)}")
    deadline = time.monotonic() + budget_s
    built = []
    for plan in plans:
        if time.monotonic() > deadline:
            built.append(_Built(PlanResult(plan.name, "not tried", note=f"the budget of {budget_s:g} s is spent")))
        else:
            built.append(_build(plan, context, checks))
    return built


def _build(plan: Plan, context: PlanContext, checks: _Checks) -> _Built:
    start = time.monotonic()
    try:
        with torch.no_grad():
            runner = plan.build(context)
            error = checks.error(runner)
    except NotApplicableError as reason:
        return _Built(PlanResult(plan.name, "not applicable", note=str(reason)))
    except Exception as failure:
        # A plan relies on exporters, compilers and runtimes, each with its own errors; the report carries the reason.
        reason = next(iter(str(failure).splitlines()), "")
        return _Built(PlanResult(plan.name, "failed", note=f"{type(failure).__name__}: {reason}"))
    result = PlanResult(plan.name, "slower", error=error, build_s=time.monotonic() - start)
    if error > checks.tolerance:
        note = f"differs from the original by {error:.1e}, more than {checks.tolerance:g}"
        return _Built(replace(result, status="wrong", note=note))
    return _Built(result, runner)


@torch.no_grad()
def _choose(model: nn.Module, example: Tensor, built: Sequence[_Built], budget_s: float) -> list[PlanResult]:
    """Return all results, the original's first, with one of them marked as chosen."""
    runners: dict[str, Runner] = {ORIGINAL: model}
    runners |= {entry.result.name: entry.runner for entry in built if entry.runner is not None}
    timings = _timings(runners, example, budget_s / 10, min_rounds=3)
    best = sorted((name for name in runners if name != ORIGINAL), key=lambda name: timings[name].median)[:FINALISTS]
    final = {name: runners[name] for name in (ORIGINAL, *best)}
    finals = _timings(final, example, budget_s / 10, min_rounds=7)
    # A plan that did not reach the final keeps the ratio from its own rounds.
    ratios = {name: ratio(timings[ORIGINAL], timing) for name, timing in timings.items() if name not in finals}
    ratios |= {name: ratio(finals[ORIGINAL], timing) for name, timing in finals.items()}
    winner = max(final, key=lambda name: ratios[name].median)
    results = [PlanResult(ORIGINAL, "slower", error=0.0), *(entry.result for entry in built)]
    for position, result in enumerate(results):
        if result.name in runners:
            timing = finals.get(result.name) or timings[result.name]
            results[position] = replace(
                result,
                status="chosen" if result.name == winner else "slower",
                median_ms=1e3 * timing.median,
                spread_ms=1e3 * timing.spread,
                ratio=ratios[result.name],
            )
    return results


def _timings(runners: dict[str, Runner], example: Tensor, budget_s: float, min_rounds: int) -> dict[str, Timing]:
    timings = measure(runners, example, budget_s=min(budget_s, 20.0), min_rounds=min_rounds)
    return {timing.name: timing for timing in timings}
