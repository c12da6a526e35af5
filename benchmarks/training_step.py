"""A training step (forward, backward, AdamW), ours against timm's same networks on the CPU.

    python benchmarks/training_step.py [--batch-size 16] [--seconds 120]

Eager float32, both in the memory layout that they have by themselves, same weights and no stochastic depth. Measured by
turns in one process; the ratio is taken within rounds.
"""

from __future__ import annotations

import argparse
import statistics

import timm
import torch
import torch.nn.functional as F
from _report import Table, write_results
from optimize_networks import NETWORKS
from torch import Tensor, nn

import gatewise
from gatewise.catalog.checkpoint import load_state
from gatewise.efficiency import measure, ratio


class TrainingStep:
    """One step of AdamW on a fixed batch."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        self.model = model.train()
        self.labels = labels
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def __call__(self, images: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(images), self.labels).backward()
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0, help="of measuring, per network")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, 224, 224, generator=generator)
    labels = torch.randint(0, 1000, (args.batch_size,), generator=generator)
    rows, cases = [], []
    for name in args.networks:
        torch.manual_seed(0)
        # Dropout and stochastic depth off on both sides: they would give the sides different work by chance.
        theirs = timm.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
        ours = gatewise.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
        load_state(ours, theirs.state_dict())
        steps = {"timm": TrainingStep(theirs, labels), "gatewise": TrainingStep(ours, labels)}
        before, after = measure(steps, images, budget_s=args.seconds, min_rounds=9, warm_up=1)
        faster = ratio(before, after)
        times = f"{1e3 * before.median:.0f} ms", f"{1e3 * after.median:.0f} ms"
        print(f"{name}: timm {times[0]}, gatewise {times[1]}, {faster}", flush=True)
        rows.append([name, *times, str(faster)])
        samples = {"timm_ms": [1e3 * v for v in before.samples], "gatewise_ms": [1e3 * v for v in after.samples]}
        cases.append({"network": name, "ratio": faster.median, "quartiles": [faster.low, faster.high], **samples})
    mean = statistics.geometric_mean(case["ratio"] for case in cases)
    rows.append(["geometric mean", "", "", f"{mean:.2f}x"])
    title = f"Forward, backward and AdamW on {args.batch_size} images of 224x224, float32"
    table = Table(title, ["network", "timm", "gatewise", "times faster (quartiles)"], rows)
    headline = f"Geometric mean {mean:.2f}x; target: not slower."
    write_results("training_step", headline, [table], {"batch_size": args.batch_size, "cases": cases})


if __name__ == "__main__":
    main()
