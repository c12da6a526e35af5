"""Memory of one image of 1024x1024 pixels in inference on the CPU: what a forward pass needs beyond the weights.

python benchmarks/large_images.py [--pixels 1024] [--only overlock_t]
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from _report import Table, write_results
from torch import Tensor, nn

import gatewise
from gatewise.efficiency import fold
from gatewise.efficiency.timing.measure import peak_memory

NETWORKS = ("overlock_t", "unireplknet_t", "focalnet_tiny_srf", "hornet_tiny_7x7", "moat_0", "vig_tiny", "deit_tiny")


def run(network: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NETWORK")
    args = parser.parse_args()
    x = torch.randn(1, 3, args.pixels, args.pixels)
    rows, cases = [], []
    for name in args.only:
        network = gatewise.create_model(name).eval()
        found = {
            "as trained": peak_memory(partial(run, network), x) / 2**20,
            "folded": peak_memory(partial(run, fold(network)), x) / 2**20,
        }
        weights = sum(p.numel() for p in network.parameters()) * 4 / 2**20
        print(f"{name}: {found}", flush=True)
        rows.append([name, f"{weights:.0f}", *(f"{value:.0f}" for value in found.values())])
        cases.append({"network": name, "weights_mib": weights, "peak_mib": found})
    title = f"MiB at {args.pixels}x{args.pixels}, batch 1, float32"
    header = ["network", "weights", "forward pass, as trained", "folded"]
    headline = "Growth of resident memory at its highest during a forward pass, in inference mode."
    write_results("large_images", headline, [Table(title, header, rows)], {"cases": cases})


if __name__ == "__main__":
    main()
