"""`gatewise.optimize` against timm's same networks in eager float32 on the CPU.

    python benchmarks/optimize_networks.py [--batch-size 1 16] [--precision float32 bf16] [--budget 240]

Both hold the same weights. After the plans have been chosen, all networks of one batch size are measured together, by
turns, in this one process; the ratio is taken within rounds.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import timm
import torch
from _report import Table, write_results

import gatewise
from gatewise.catalog.checkpoint import load_state
from gatewise.efficiency import measure, ratio

NETWORKS = ("focalnet_tiny_srf", "inception_next_tiny", "mobilenetv2_100")
TARGETS = {("float32", 1): 3.0, ("float32", 16): 2.0, ("bf16", 1): 5.0, ("bf16", 16): 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), default=["float32", "bf16"])
    parser.add_argument("--budget", type=float, default=240.0, help="seconds of trying plans, per network and case")
    parser.add_argument("--seconds", type=float, default=60.0, help="of final measuring, per batch size")
    parser.add_argument("--name", default="optimize_networks", help="of the result files")
    args = parser.parse_args()
    rows, cases, means = [], [], []
    for batch_size in args.batch_size:
        found = compare(batch_size, args.precision, args.budget, args.seconds)
        cases += found
        for precision in args.precision:
            here = [case for case in found if case["precision"] == precision]
            mean = statistics.geometric_mean(case["ratio"] for case in here)
            means.append({"precision": precision, "batch_size": batch_size, "geometric_mean": mean})
            rows += [
                [str(case[key]) for key in ("network", "precision", "batch_size", "plan", "text")] for case in here
            ]
            target = TARGETS.get((precision, batch_size))
            rows.append(["geometric mean", precision, str(batch_size), f"target {target or '-'}", f"{mean:.2f}x"])
    slower = [case for case in cases if case["ratio"] < 1]
    headline = f"{len(slower)} of {len(cases)} cases slower than timm. Ratios: median over rounds (quartiles)."
    table = Table("Times faster than timm eager float32", ["network", "precision", "batch", "plan", "ratio"], rows)
    write_results(args.name, headline, [table], {"cases": cases, "means": means})


@torch.no_grad()
def compare(batch_size: int, precisions: list[str], budget_s: float, seconds: float) -> list[dict]:
    """One record per network and precision."""
    example = torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calls, reports = {}, {}
    for name in NETWORKS:
        torch.manual_seed(0)
        theirs = timm.create_model(name).eval()
        ours = gatewise.create_model(name).eval()
        load_state(ours, theirs.state_dict())
        calls[name, "timm"] = partial(_run, theirs)
        for precision in precisions:
            fast = gatewise.optimize(ours, example, precision, budget_s=budget_s)
            print(f"{name}: {fast.report}\n", flush=True)
            expected = theirs(example)
            error = ((fast(example) - expected).abs().max() / expected.abs().max()).item()
            calls[name, precision], reports[name, precision] = fast, (fast.report, error)
    timings = measure({" ".join(key): call for key, call in calls.items()}, example, budget_s=seconds, min_rounds=9)
    by_key = dict(zip(calls, timings, strict=True))
    cases = []
    for (name, precision), (report, error) in reports.items():
        before, after = by_key[name, "timm"], by_key[name, precision]
        faster = ratio(before, after)
        cases.append(
            {
                "network": name,
                "precision": precision,
                "batch_size": batch_size,
                "plan": report.chosen.name,
                "ratio": faster.median,
                "quartiles": [faster.low, faster.high],
                "text": f"{1e3 * before.median:.1f} ms / {1e3 * after.median:.1f} ms = {faster}",
                "timm_ms": [1e3 * value for value in before.samples],
                "gatewise_ms": [1e3 * value for value in after.samples],
                "error_against_timm": error,
                "search": report.to_dict(),
            }
        )
    return cases


def _run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


if __name__ == "__main__":
    main()
