"""Which backbone? Every family's smallest member at 32x32 under one recipe: accuracy, latency, parameters.

    python benchmarks/compare_backbones.py [--epochs 4] [--seeds 3] [--jobs 2] [--only convit ...] [--report]

Families are scaled to about the same cost, with their own blocks, stems and widths in their own proportions, and learn
the part of Fashion-MNIST that comes with the package for equally many epochs. What has been trained is kept in
runs/compare_backbones and not trained again: stop and go on at will; --report measures and draws what is there.
Latency is a single image on one thread, of the folded network; all networks are interleaved in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _backbones import FAMILIES
from _report import RESULTS, Table, write_results
from torch import Tensor, nn

import gatewise
from gatewise.claims.lab.intervals import t_interval
from gatewise.efficiency import fold, measure
from gatewise.efficiency.cost.count import count
from gatewise.tasks import evaluate, load_trained, parse_recipe, train
from gatewise.tasks.training import build_data

RUNS = Path("runs/compare_backbones")


def recipe_of(family: str, seed: int, epochs: int) -> dict[str, Any]:
    """The one recipe, with this family's network."""
    name, overrides = FAMILIES[family]
    return {
        "seed": seed,
        "model": {"name": name, **overrides},
        "data": {
            "name": "fashion",
            "source": "subset",
            "channels": 1,
            "batch_size": 64,
            "eval_batch_size": 200,
            "val_fraction": 0.05,
            "num_workers": 0,
            "seed": seed,
            "augment": {"crop_padding": 1},
        },
        "task": {"name": "classification", "label_smoothing": 0.05},
        "optim": {"name": "adamw", "lr": 2.0e-3, "weight_decay": 0.05, "warmup_epochs": 0.5},
        "trainer": {
            "epochs": epochs,
            "clip_grad": 5.0,
            "channels_last": True,
            "accelerator": "cpu",
            "log_every": 50,
        },
        "output": str(folder_of(family, seed, epochs)),
    }


def folder_of(family: str, seed: int, epochs: int) -> Path:
    return RUNS / f"{family.lower().replace(' ', '_').replace(',', '')}-seed{seed}-epochs{epochs}"


def result_of(family: str, seed: int, epochs: int) -> float | None:
    """Test accuracy in percent of a finished training; None if there is none."""
    file = folder_of(family, seed, epochs) / "accuracy.json"
    return json.loads(file.read_text())["percent"] if file.exists() else None


def train_one(family: str, seed: int, epochs: int) -> None:
    """Train, test on all 2,000 images, and keep the accuracy."""
    torch.set_num_threads(1)
    recipe = parse_recipe(recipe_of(family, seed, epochs))
    result = train(recipe, overwrite=True)
    score = evaluate(load_trained(result.last).model, build_data(recipe))
    file = folder_of(family, seed, epochs) / "accuracy.json"
    file.write_text(json.dumps({"percent": 100 * score.top1}) + "\n")


def train_all(families: list[str], seeds: int, epochs: int, jobs: int) -> None:
    """What is not there yet, several at a time, each in a process and on a thread of its own."""
    missing = [
        (family, seed) for seed in range(seeds) for family in families if result_of(family, seed, epochs) is None
    ]

    def once(item: tuple[str, int]) -> None:
        family, seed = item
        command = [sys.executable, __file__, "--one", family, "--seed", str(seed), "--epochs", str(epochs)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{family}, seed {seed}:\n{done.stderr[-3000:]}")
        print(f"{family}, seed {seed}: {result_of(family, seed, epochs):.2f} %", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(once, missing))


def build(family: str) -> nn.Module:
    """The family's network, untrained, in eval mode."""
    fields = parse_recipe(recipe_of(family, 0, 1)).model.fields
    return gatewise.create_model(FAMILIES[family][0], **fields | {"in_chans": 1, "num_classes": 10}).eval()


def latencies(families: list[str], seconds: float) -> dict[str, float]:
    """Milliseconds of one image on one thread, the median over rounds that all families share."""
    torch.set_num_threads(1)
    example = torch.randn(1, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    networks = {family: fold(build(family)).to(memory_format=torch.channels_last) for family in families}

    def run(network: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return network(x)

    timings = measure({name: partial(run, network) for name, network in networks.items()}, example, budget_s=seconds)
    return {timing.name: 1e3 * timing.median for timing in timings}


def report(families: list[str], seeds: int, epochs: int, seconds: float) -> None:
    """Measure, tabulate and draw what has been trained."""
    found = {family: [result_of(family, seed, epochs) for seed in range(seeds)] for family in families}
    accuracy = {
        family: [value for value in values if value is not None]
        for family, values in found.items()
        if all(value is not None for value in values)
    }
    if not accuracy:
        raise SystemExit("nothing has been trained for so many seeds and epochs")
    times = latencies(list(accuracy), seconds)
    cases = []
    for family, values in accuracy.items():
        cost = count(build(family), torch.zeros(1, 1, 32, 32))
        interval = t_interval(values)
        cases.append(
            {
                "family": family,
                "network": FAMILIES[family][0],
                "accuracy": values,
                "mean": statistics.mean(values),
                "interval": [interval.low, interval.high],
                "latency_ms": times[family],
                "parameters": cost.parameters,
                "macs": cost.macs,
            }
        )
    cases.sort(key=lambda case: -case["mean"])
    rows = [
        [
            case["family"],
            f"{case['mean']:.2f} ({case['interval'][0]:.2f} to {case['interval'][1]:.2f})",
            f"{case['latency_ms']:.2f}",
            f"{case['parameters'] / 1e3:,.0f}",
            f"{case['macs'] / 1e6:.1f}",
            "yes" if case in pareto(cases, "latency_ms") else "",
            "yes" if case in pareto(cases, "parameters") else "",
        ]
        for case in cases
    ]
    header = ["family", "test accuracy in %", "ms per image", "thousand parameters", "million MACs"]
    header += ["front by latency", "front by parameters"]
    headline = (
        f"{epochs} epochs of 9,500 pictures, {seeds} seeds (95 % t-intervals), the same recipe for all; 2,000 test "
        "pictures. So short a training shows how readily a family learns small pictures, not where it would end on "
        "large ones."
    )
    title = "Families at 32x32 on Fashion-MNIST's shipped part"
    write_results("compare_backbones", headline, [Table(title, header, rows)], {"cases": cases})
    draw(cases)


def pareto(cases: list[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """The cases that no other beats in accuracy at less or equal cost."""
    return [
        case
        for case in cases
        if not any(other is not case and other[cost] <= case[cost] and other["mean"] >= case["mean"] for other in cases)
    ]


def draw(cases: list[dict[str, Any]]) -> None:
    """Accuracy against latency and against parameters, with the front of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.5), layout="constrained", sharey=True)
    for axes, cost, label in zip(
        panels, ("latency_ms", "parameters"), ("ms per image, one thread", "parameters"), strict=True
    ):
        front = sorted(pareto(cases, cost), key=lambda case: case[cost])
        axes.plot([c[cost] for c in front], [c["mean"] for c in front], color="#999999", linewidth=1, zorder=1)
        for case in cases:
            color = "#D55E00" if case in front else "#0072B2"
            low, high = min(case["accuracy"]), max(case["accuracy"])
            axes.plot([case[cost]] * 2, [low, high], color=color, linewidth=1, alpha=0.5)
            axes.scatter(case[cost], case["mean"], color=color, s=28, zorder=2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=label)
        axes.grid(alpha=0.2)
    panels[0].set(ylabel="test accuracy in %")
    figure.suptitle(
        "Backbones scaled to 32x32, one recipe; bars: lowest and highest seed; orange: not beaten at its cost"
    )
    figure.canvas.draw()
    for axes, cost in zip(panels, ("latency_ms", "parameters"), strict=True):
        label_points(axes, {case["family"]: (case[cost], case["mean"]) for case in cases})
    figure.savefig(RESULTS / "compare_backbones.png", dpi=110)


def label_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """Names beside their points, where they hide neither another name nor another point, if there is such a place."""
    scale = 72 / axes.figure.dpi
    places = {name: axes.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in places.values()]
    left, right = axes.bbox.x0 * scale, axes.bbox.x1 * scale
    for name, (x, y) in sorted(places.items(), key=lambda item: -item[1][1]):
        width, height = 4.4 * len(name), 8
        offsets = [(side, down) for down in (-3, 4, -11, 11, -18, 18) for side in (5, -5 - width)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in offsets]
        free = [
            (offset, box)
            for offset, box in zip(offsets, boxes, strict=True)
            if left < box[0]
            and box[2] < right
            and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)
        ]
        offset, box = free[0] if free else (offsets[0], boxes[0])
        taken.append(box)
        axes.annotate(name, points[name], xytext=offset, textcoords="offset points", fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring latencies")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--one", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        train_one(args.one, args.seed, args.epochs)
        return
    if not args.report:
        train_all(args.only, args.seeds, args.epochs, args.jobs)
    report(args.only, args.seeds, args.epochs, args.seconds)


if __name__ == "__main__":
    main()
