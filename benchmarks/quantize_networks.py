"""Every image network in 8-bit integers: accuracy of trained ones, noise of all at their published sizes.

    python benchmarks/quantize_networks.py [--epochs 2] [--seeds 3] [--only focalnet_tiny_srf FocalNet ...] [--speed]

Trained: the families of `compare_backbones`, trained there (or here, where that has not happened), calibrated on 512
training images, tested on 2,000 images as integers and as float. Those that lose more than a point are looked into:
weights or activations, other ranges, which layers. As published: fresh weights and images of noise, since the claim is
that everything goes through and how near the outputs stay, and no more. What has been measured is kept in
runs/quantize_networks and not measured again: stop and go on at will.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from statistics import fmean, geometric_mean
from typing import Any

import torch
from _quantize_published import BATCHES, IMAGES, SIZES, published_case, speed_case
from _quantize_trained import CALIBRATION_BATCHES, WAYS, cause_case, lost_points, trained_case
from _report import Table, write_results
from compare_backbones import FAMILIES

LOSS = 1.0
"""Points of accuracy; who loses more in the mean over seeds is looked into."""

QUIET_DB = 25.0
"""So is whose noise is louder than this, in any seed: accuracy may bear here what it would not bear elsewhere."""


NO_KERNEL = " has no integer kernel"
"""The end of the most frequent reason, which tables leave out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES, *SIZES], default=[*FAMILIES, *SIZES], metavar="NAME")
    parser.add_argument("--speed", action="store_true", help="measure the networks at their published sizes, too")
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, per network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trained = {
        family: [trained_case(family, seed, args.epochs) for seed in range(args.seeds)]
        for family in FAMILIES
        if family in args.only
    }
    causes: dict[str, dict[str, Any]] = {}
    published: dict[str, dict[str, Any]] = {}
    speeds: dict[str, dict[str, Any]] = {}
    # Again after each network, so that what was measured is written whatever ends the run.
    write(trained, causes, published, speeds, args.epochs)
    for family, cases in trained.items():
        if deserves_a_look(cases):
            causes[family] = cause_case(family, noisiest(cases)["seed"], args.epochs)
            write(trained, causes, published, speeds, args.epochs)
    for name in SIZES:
        if name in args.only:
            published[name] = published_case(name)
            if args.speed and "failed" not in published[name]:
                speeds[name] = speed_case(name, args.seconds)
            write(trained, causes, published, speeds, args.epochs)


def deserves_a_look(cases: list[dict[str, Any]]) -> bool:
    return lost_points(cases).value > LOSS or noisiest(cases)["noise_db"] < QUIET_DB


def noisiest(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a family's seeds the one with the loudest noise."""
    return min(cases, key=lambda case: case["noise_db"])


def write(
    trained: Mapping[str, list[dict[str, Any]]],
    causes: Mapping[str, dict[str, Any]],
    published: Mapping[str, dict[str, Any]],
    speeds: Mapping[str, dict[str, Any]],
    epochs: int,
) -> None:
    """The tables, and all figures behind them."""
    losers = [family for family, cases in trained.items() if lost_points(cases).value > LOSS]
    failed = [name for name, case in published.items() if "failed" in case]
    seeds = max((len(cases) for cases in trained.values()), default=0)
    headline = (
        f"8 bits, defaults of `quantize`, integers in onnxruntime. Trained: {epochs} epochs of 9,500 pictures (32x32), "
        f"{seeds} seeds from 0, calibrated on {CALIBRATION_BATCHES} batches of 64 training images, tested on 2,000; "
        "points lost with a 95 % t-interval over test images, in pairs; decibels of the noisiest seed. More than "
        f"{LOSS:.0f} point lost: {', '.join(losers) or 'none'}. As published: fresh weights of seed 0, calibrated on "
        f"{BATCHES * IMAGES} images of noise, compared on {IMAGES} others. Refused: {', '.join(failed) or 'none'}."
    )
    tables = [
        *([trained_table(trained), floats_table(trained)] if trained else []),
        *([cause_table(causes, trained)] if causes else []),
        *([published_table(published, speeds)] if published else []),
    ]
    data = {
        "trained": trained,
        "lost_points": {family: _bounds(cases) for family, cases in trained.items()},
        "causes": causes,
        "published": published,
        "speeds": speeds,
    }
    write_results("quantize_networks", headline, tables, data)


def trained_table(trained: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Accuracy before and after, the greatest loss first."""
    rows = []
    for family, cases in sorted(trained.items(), key=lambda item: -lost_points(item[1]).value):
        lost = lost_points(cases)
        rows.append(
            [
                family,
                f"{_mean(cases, 'float'):.2f}",
                f"{_mean(cases, 'integer'):.2f}",
                f"{lost.value:.2f} ({lost.low:.2f} to {lost.high:.2f})",
                f"{_mean(cases, 'agreement'):.1f}",
                f"{noisiest(cases)['noise_db']:.1f}",
                _layers(cases[0]),
                _smaller(cases[0]),
            ]
        )
    header = ["family", "float %", "integers %", "points lost", "same class %", "least dB", "layers", "smaller"]
    return Table("Trained at 32x32 on Fashion-MNIST's shipped part", header, rows)


def floats_table(trained: Mapping[str, list[dict[str, Any]]]) -> Table:
    """What stays float between the integers."""
    rows = [
        [family, str(sum(cases[0]["floats"].values())), _reasons(cases[0]["floats"])]
        for family, cases in trained.items()
    ]
    return Table(
        "What stays float: operators without an integer kernel, and other reasons",
        ["family", "operations", "reasons"],
        rows,
    )


def cause_table(causes: Mapping[str, dict[str, Any]], trained: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Where noise comes from and what helps, in the noisiest seed."""
    rows = []
    for family, case in causes.items():
        defaults = noisiest(trained[family])
        cells = [f"{way['percent']:.2f} ({way['noise_db']:.1f} dB)" for way in case["ways"].values()]
        cells[-1] += f", {len(case['ways']['max_loss=0.01']['on_request'])} float"
        layers = [f"{entry['layer']} {100 * entry['part']:.0f} %" for entry in case["worst_layers"]]
        grids = [
            f"{entry['tensors'][0]} and {len(entry['tensors']) - 1} more {100 * entry['part']:.0f} %"
            for entry in case["worst_grids"]
        ]
        rows.append(
            [
                family,
                str(case["seed"]),
                f"{defaults['float']:.2f}",
                f"{defaults['integer']:.2f} ({defaults['noise_db']:.1f} dB)",
                *cells,
                ", ".join(layers),
                ", ".join(grids),
            ]
        )
    title = f"Who loses more than {LOSS:.0f} point, or has noise above -{QUIET_DB:.0f} dB: accuracy in %, and where"
    header = ["family", "seed", "float", "integers", *WAYS, "noise of layers alone", "noise of grids alone"]
    return Table(title, header, rows)


def published_table(published: Mapping[str, dict[str, Any]], speeds: Mapping[str, dict[str, Any]]) -> Table:
    """Every network, and how fast, where that was measured."""
    rows = [[name, str(case["pixels"]), *_outcome(case), *_speed(name, speeds)] for name, case in published.items()]
    header = ["network", "pixels", "cosine", "noise dB", "layers", "left float", "smaller"]
    if speeds:
        mean = geometric_mean(speed["faster"] for speed in speeds.values())
        rows.append(["geometric mean", *[""] * (len(header) - 1), "", f"{mean:.2f}x"])
        header += ["float / int8 ms", "faster"]
    return Table("At their published sizes, fresh weights", header, rows)


def _outcome(case: Mapping[str, Any]) -> list[str]:
    if "failed" in case:
        return ["-", "-", "-", case["failed"], "-"]
    return [
        f"{case['cosine']:.4f}",
        f"{case['noise_db']:.1f}",
        _layers(case),
        _reasons(case["floats"]),
        _smaller(case),
    ]


def _speed(name: str, speeds: Mapping[str, dict[str, Any]]) -> list[str]:
    if not speeds:
        return []
    if name not in speeds:
        return ["-", "-"]
    speed = speeds[name]
    return [f"{speed['float_ms']:.2f} / {speed['integer_ms']:.2f}", speed["text"]]


def _layers(case: Mapping[str, Any]) -> str:
    return f"{case['layers']} of {case['layers'] + case['layers_float']}"


def _smaller(case: Mapping[str, Any]) -> str:
    return f"{case['bytes_before'] / case['bytes_after']:.2f}x"


def _reasons(floats: Mapping[str, int]) -> str:
    return "; ".join(f"{count} {reason.removesuffix(NO_KERNEL)}" for reason, count in floats.items())


def _bounds(cases: list[dict[str, Any]]) -> list[float]:
    lost = lost_points(cases)
    return [lost.value, lost.low, lost.high]


def _mean(cases: list[dict[str, Any]], key: str) -> float:
    return fmean(case[key] for case in cases)


if __name__ == "__main__":
    main()
