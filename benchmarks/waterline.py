"""This machine's waterline for our networks: what each can reach at best, and what its operators reach.

    python benchmarks/waterline.py [--only convfirstnet_small ...] [--seconds 10] [--threads 1] [--quick]

The machine's peak and bandwidth are measured first, anew. Every operator of a network is then timed by itself,
interleaved with the others, on tensors that come from memory, and held against its bound. What is asked: do the
bounds put the operators in the order of their measured efficiencies (Spearman's rank correlation, aimed at 0.7), and
is any operator faster than its bound, which would make the bound wrong? Operators above the waterline share one
bound, the peak; operations per byte order them too, so both correlations are told. `--quick` tries it all on two
small networks and writes nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from _report import Table, write_results

import gatewise
from gatewise.efficiency.bounds.device import Device, device
from gatewise.efficiency.bounds.operator_times import MeasuredWaterline
from gatewise.efficiency.bounds.waterline import LEVELS, Waterline, waterline

NETWORKS: dict[str, int] = {
    "convfirstnet_small": 256,
    "mobilenetv2_100": 224,
    "inception_next_tiny": 224,
    "focalnet_tiny_srf": 224,
    "hornet_tiny_7x7": 224,
    "unireplknet_a": 224,
    "resnet50_evonorm_s0": 224,
    "vig_tiny": 224,
    "convit_tiny": 224,
    "tiny_moat_0": 224,
    "tvconv_mobilenet_v2_x1_0": 96,
    "ninformer_cifar10": 32,
}
"""Pixels a side."""

QUICK = {"mobilenetv2_035": 64, "ninformer_cifar10": 32}

TARGET = 0.7


def bounds(name: str, side: int, batch_size: int, limits: Device) -> tuple[Waterline, Waterline]:
    """As it is trained, and with norms and branches folded."""
    model = gatewise.create_model(name).eval()
    x = torch.randn(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
    plain, folded = (waterline(model, x, limits, fold=fold) for fold in (False, True))
    return plain, folded


def row(name: str, plain: Waterline, folded: Waterline, times: MeasuredWaterline) -> list[str]:
    most = [plain.operators.max_efficiency, *(folded.at(level).max_efficiency for level in LEVELS)]
    return [
        name,
        *(f"{efficiency:.3f}" for efficiency in most),
        f"{times.efficiency:.3f}",
        f"{times.efficiency_correlation:.2f}",
        f"{times.intensity_correlation:.2f}",
        f"{times.time_correlation:.2f}",
        f"{times.largest_excess:.2f}x",
        f"{len(times.exceeding)} of {len(times.times)}",
    ]


def case(name: str, plain: Waterline, folded: Waterline, times: MeasuredWaterline) -> dict[str, Any]:
    """Everything that the tables are made from, plain."""
    operators = [
        {
            "module": entry.bound.kernel.module,
            "operator": entry.bound.kernel.name,
            "ops": entry.bound.kernel.ops,
            "bytes": entry.bound.kernel.bytes,
            "bound_ms": 1e3 * entry.bound.min_s,
            "times_ms": [1e3 * sample for sample in entry.samples],
        }
        for entry in times.times
    ]
    return {
        "network": name,
        "unfolded_max_efficiency": plain.operators.max_efficiency,
        "max_efficiency": {level: folded.at(level).max_efficiency for level in LEVELS},
        "efficiency": times.efficiency,
        "efficiency_correlation": times.efficiency_correlation,
        "intensity_correlation": times.intensity_correlation,
        "time_correlation": times.time_correlation,
        "largest_excess": times.largest_excess,
        "operators": operators,
    }


def pooled(measured: list[MeasuredWaterline], noise: float) -> MeasuredWaterline:
    """The operators of all networks together."""
    return MeasuredWaterline(tuple(entry for times in measured for entry in times.times), noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, per network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small networks, a moment each, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limits = device(threads=args.threads, refresh=True)
    print(limits, flush=True)
    chosen = QUICK if args.quick else {name: NETWORKS[name] for name in args.only}
    rows, cases, measured = [], [], []
    for name, side in chosen.items():
        plain, folded = bounds(name, side, args.batch_size, limits)
        times = folded.measured(budget_s=0.2 if args.quick else args.seconds)
        measured.append(times)
        rows.append(row(name, plain, folded, times))
        cases.append(case(name, plain, folded, times))
        print(" | ".join(rows[-1]), flush=True)
    together = pooled(measured, limits.noise)
    verdict = (
        f"{limits}. Over all networks the rank correlation of measured efficiency, aimed at {TARGET}, is "
        f"{together.efficiency_correlation:.2f} with the bound and {together.intensity_correlation:.2f} with op:byte; "
        f"the operator furthest above its bound is at {together.largest_excess:.2f} times it."
    )
    header = [
        "network",
        "e_max unfolded",
        "operators",
        "epilogues",
        "blocks",
        "measured",
        "rank correlation",
        "with op:byte",
    ]
    header += ["of times", "largest bound/time", "above bound"]
    table = Table("Most and measured efficiency", header, rows)
    if args.quick:
        print(f"{verdict}\n\n{table.markdown()}")
        return
    data = {
        "device": asdict(limits),
        "efficiency_correlation": together.efficiency_correlation,
        "intensity_correlation": together.intensity_correlation,
        "largest_excess": together.largest_excess,
        "cases": cases,
    }
    write_results("waterline", f"float32, batch {args.batch_size}. {verdict}", [table], data)


if __name__ == "__main__":
    main()
