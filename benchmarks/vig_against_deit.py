"""ViG-T against DeiT-T on larger and larger images, on the CPU: memory of training and inference, and time.

    python benchmarks/vig_against_deit.py [--sizes 224 512 1024] [--seconds 60] [--threads 2]

DeiT-T comes in two forms: with attention in one fused operator, which never lays its maps out, and with the maps of all
pairs of patches, as transformers were run when the paper compared with them. One image at a time, float32, positions
resized to the image as both networks do by themselves.

- Kept for training: bytes that one image's forward pass leaves for the backward pass, each piece of memory counted once
  and parameters not at all. Counted, not measured: nothing is kept while counting.
- Peak at inference: the rise of the process's memory during one call without gradients.
- Times are interleaved in one process; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from _report import Table, write_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gatewise
from gatewise.claims.vig import kept_for_training
from gatewise.efficiency import count, measure, ratio
from gatewise.efficiency.timing.measure import peak_memory

VIG, DEIT, DEIT_MAPS = "vig_tiny", "deit_tiny", "deit_tiny, attention maps"
NETWORKS = {VIG: VIG, DEIT: DEIT, DEIT_MAPS: DEIT}


class Network:
    """A network and how its attention is run."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model = gatewise.create_model(NETWORKS[name])
        self.maps = name == DEIT_MAPS

    def attention(self) -> Any:
        """Within the block, attention lays out its maps if this network is to."""
        return sdpa_kernel(SDPBackend.MATH) if self.maps else nullcontext()

    def infer(self, images: Tensor) -> None:
        with self.attention(), torch.inference_mode():
            self.model.eval()(images)

    def kept_for_training(self, images: Tensor) -> int:
        """Bytes that a forward pass keeps for the backward pass."""
        with self.attention():
            return kept_for_training(self.model, images)


def compare(networks: dict[str, Network], size: int, seconds: float) -> dict[str, Any]:
    """Counts, memory and times of all networks on one image of this size."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    case: dict[str, Any] = {"size": size}
    for name, network in networks.items():
        case[name] = {
            "macs": count(network.model, image).macs,
            "kept_bytes": network.kept_for_training(image),
        }
        network.infer(image)
        case[name]["peak_bytes"] = peak_memory(network.infer, image)
    calls = {name: network.infer for name, network in networks.items()}
    timings = {one.name: one for one in measure(calls, image, budget_s=seconds, min_rounds=3, warm_up=1)}
    for name, timing in timings.items():
        case[name]["ms"] = [1e3 * sample for sample in timing.samples]
    case["faster"] = {name: str(ratio(timings[name], timings[VIG])) for name in networks if name != VIG}
    case["median_ms"] = {name: 1e3 * timing.median for name, timing in timings.items()}
    return case


def cost_table(cases: list[dict[str, Any]]) -> Table:
    rows = []
    for case in cases:
        for name in NETWORKS:
            found = case[name]
            rows.append(
                [
                    str(case["size"]),
                    name,
                    f"{found['macs'] / 1e9:.2f} G",
                    _mebibytes(found["kept_bytes"]),
                    _mebibytes(found["peak_bytes"]),
                    f"{case['median_ms'][name]:.0f} ms",
                    case["faster"].get(name, ""),
                ]
            )
    header = ["pixels a side", "network", "MACs", "kept for training", "peak at inference", "time"]
    return Table("One image, float32", [*header, "ViG-T is faster (quartiles)"], rows)


def growth_table(cases: list[dict[str, Any]]) -> Table:
    """How each cost grows from one size to the next, over how the pixels grow: 1 is linear in the pixels."""
    rows = []
    for small, large in pairwise(cases):
        pixels = (large["size"] / small["size"]) ** 2
        for name in NETWORKS:
            before, after = small[name], large[name]
            growths = [after[key] / before[key] / pixels for key in ("macs", "kept_bytes", "peak_bytes")]
            growths.append(large["median_ms"][name] / small["median_ms"][name] / pixels)
            row = [f"{small['size']} to {large['size']}", name, *(f"{growth:.2f}" for growth in growths)]
            rows.append(row)
    header = ["pixels a side", "network", "MACs", "kept for training", "peak at inference", "time"]
    return Table("Growth over that of the pixels (1: linear in the pixels)", header, rows)


def headline(case: dict[str, Any]) -> str:
    """ViG-T against both forms of DeiT-T at the largest size."""
    texts = []
    for name in (DEIT, DEIT_MAPS):
        kept, peak = (case[VIG][key] / case[name][key] for key in ("kept_bytes", "peak_bytes"))
        texts.append(
            f"against {name}: {case[VIG]['macs'] / case[name]['macs']:.2f} of the MACs, {kept:.2f} of the memory kept "
            f"for training, {peak:.2f} of the peak at inference, {case['faster'][name]} as fast"
        )
    return f"ViG-T at {case['size']}x{case['size']} " + "; ".join(texts) + "."


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512, 1024], help="pixels a side, multiples of 16")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring times, per size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="vig_against_deit", help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    networks = {name: Network(name) for name in NETWORKS}
    cases = []
    for size in args.sizes:
        cases.append(compare(networks, size, args.seconds))
        print(cases[-1], flush=True)
    write_results(args.name, headline(cases[-1]), [cost_table(cases), growth_table(cases)], {"cases": cases})


if __name__ == "__main__":
    main()
