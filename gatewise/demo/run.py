"""Steps of the demo: train, evaluate, measure, optimize, export, draw the gates, and write a report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from gatewise.data.images.base import IndexedImageData
from gatewise.demo.findings import Demo, Pictures
from gatewise.demo.report import write_report
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.optimize import optimize
from gatewise.efficiency.acceleration.report import OptimizationReport
from gatewise.efficiency.cost.count import count
from gatewise.efficiency.timing.hardware import processor_name
from gatewise.errors import UserError
from gatewise.gates import capture
from gatewise.recipes import find_recipe
from gatewise.tasks import Trained, evaluate, load_recipe, load_trained, train
from gatewise.tasks.logs import read_log
from gatewise.tasks.training import build_data

RECIPE = find_recipe("focalnet/demo")
BATCH_SIZES = (1, 16)
PICTURES = 24
# Compiling takes most of this time. The whole demo has six minutes.
OPTIMIZE_BUDGET_S = {1: 20.0, 16: 20.0}


def run_demo(output: Path, recipe_source: str | Path = RECIPE, console: Console | None = None) -> Path:
    """Run all steps, write `report.html` into `output` and return its path.

    Args:
        output: folder for the demo only; an earlier demo in it is replaced.
        recipe_source: path or name of the recipe to train.
    Raises:
        UserError: if there is no such recipe, or the demo cannot show what it trains.
    """
    console = console or Console(highlight=False)
    started = time.perf_counter()
    recipe = load_recipe(recipe_source, {"output": str(output / "training")})
    with _step(console, 1, f"training {recipe.model.name} on {recipe.data.name}"):
        result = train(recipe, overwrite=True)
        trained = load_trained(result.best or result.last)
    if not result.metrics:
        raise UserError(
            f"the demo shows validation scores, but {recipe_source} validates nothing; lower validate_every"
        )
    data = build_data(trained.recipe)
    if not isinstance(data, IndexedImageData):
        raise UserError(f"the demo shows single images of its data, which {recipe.data.name} does not provide")
    with _step(console, 2, "evaluating on held-out images"):
        evaluation = evaluate(trained.model, data, "test", device="cpu")
        pictures = _pictures(trained, data)
    console.print(f"   test accuracy {evaluation.top1:.2%}")
    with _step(console, 3, "measuring and optimizing"):
        cost = count(trained.model, pictures.inputs[:1])
        optimizations = {size: _optimize(trained, pictures, size) for size in BATCH_SIZES}
    for size, report in optimizations.items():
        before, after = report.original.median_ms or 0.0, report.chosen.median_ms or 0.0
        told = f"{before:.2f} ms, then {after:.2f} ms ({report.speedup:.1f}x: {report.chosen.name})"
        console.print(f"   batch {size}: {told}")
    with _step(console, 4, "exporting and checking that the file gives the same outputs"):
        export = export_onnx(trained.model, output / "network.onnx", pictures.inputs[:2])
    console.print(f"   {export.files[0]}: largest relative difference {export.error:.1e}")
    with _step(console, 5, "drawing the gates and writing the report"):
        demo = Demo(
            result=result,
            trained=trained,
            log=read_log(result.folder / "metrics.csv"),
            evaluation=evaluation,
            cost=cost,
            optimizations=optimizations,
            export=export,
            pictures=pictures,
            readings=capture(trained.model, pictures.inputs),
            seconds=time.perf_counter() - started,
            machine=machine(),
        )
        report_path = output / "report.html"
        write_report(report_path, demo)
    return report_path


@contextmanager
def _step(console: Console, number: int, title: str) -> Iterator[None]:
    started = time.perf_counter()
    console.print(f"[bold]{number}/5[/bold] {title}")
    yield
    console.print(f"   [dim]{time.perf_counter() - started:.0f} s[/dim]")


def _pictures(trained: Trained, data: IndexedImageData) -> Pictures:
    """Return test images spread over the whole set, so that all classes occur."""
    source, transform = data.parts.test, data.transform_for_eval()
    indices = torch.linspace(0, len(source) - 1, PICTURES).long().tolist()
    inputs = torch.stack([transform(source.image(index)) for index in indices])
    with torch.no_grad():
        probabilities = trained.model(inputs).softmax(dim=1)
    labels = torch.tensor([int(source.labels[index]) for index in indices])
    return Pictures(data.denormalize(inputs), inputs, labels, probabilities)


def _optimize(trained: Trained, pictures: Pictures, batch_size: int) -> OptimizationReport:
    example = pictures.inputs[:batch_size].contiguous()
    return optimize(trained.model, example, budget_s=OPTIMIZE_BUDGET_S[batch_size]).report


def machine() -> str:
    """Return processor, cores in use and operating system in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores, {platform.system()}"
