"""Inverted residuals executed depth-first against the same blocks layer by layer, in time and in memory, on the CPU.

    python benchmarks/block_fusion.py [--seconds 10] [--threads 1] [--quick]

Norms are folded and maps are channels-last on all sides; blocks run without gradients. "in place" is the plain block
with activations and shortcut in place, which is no fusion, but what a small block gets from the operator. "planned" is
the tile that the operator plans by itself, "best" the fastest of those for caches of several sizes, which is what
`fuse_blocks` takes where it beats the plain block. Memory is the rise of the process's resident memory during one call,
output included. Networks are compared whole: folded, and with the blocks fused that gained when measured alone.

`--quick` tries it all on two small blocks and a small network, and writes nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _report import Table, write_results
from torch import nn

import gatewise
from gatewise.efficiency import fold, measure, peak_memory, ratio
from gatewise.efficiency.acceleration.block_chain import read_block
from gatewise.efficiency.acceleration.block_fusion import CACHES, FusedBlock, cache_bytes, fuse_blocks
from gatewise.efficiency.timing.measure import Ratio, Timing
from gatewise.layers.inverted_residual import InvertedResidual
from gatewise.networks.image.convfirst import ConvFirst, MBConv
from gatewise.ops.block_fusion.plan import Tile, plan_bands

WHOLE = Tile(1 << 20, 1 << 20, 1 << 20)


@dataclass(frozen=True)
class Case:
    """A block and the size of its input."""

    name: str
    block: nn.Module
    shape: tuple[int, int, int, int]


def cases(quick: bool) -> list[Case]:
    first = partial(ConvFirst, expand_ratio=6)
    if quick:
        return [
            Case("ConvFirst 16, e=6, 16x16", first(16, 16), (1, 16, 16, 16)),
            Case("MobileNetV2 16->24, 32x32, stride 2", InvertedResidual(16, 24, 2, 6), (1, 16, 32, 32)),
        ]
    found = [
        Case("ConvFirst 64, e=6, 64x64", first(64, 64), (1, 64, 64, 64)),
        Case("ConvFirst 64, e=6, 64x64, batch 4", first(64, 64), (4, 64, 64, 64)),
        Case("ConvFirst 64, e=6, 128x128", first(64, 64), (1, 64, 128, 128)),
        Case("MBConv 128, e=4, 48x48", MBConv(128, 128), (1, 128, 48, 48)),
        Case("MBConv 256, e=4, 16x16", MBConv(256, 256), (1, 256, 16, 16)),
        Case("MBConv 64, e=4, 5x5 depthwise, 56x56", MBConv(64, 64, kernel_size=5, group_width=1), (1, 64, 56, 56)),
    ]
    # The rows of table 2 of arXiv:1801.04381 at 224 pixels: input, output, stride, pixels a side.
    rows = [(32, 16, 1, 112), (16, 24, 2, 112), (24, 24, 1, 56), (32, 32, 1, 28), (64, 64, 1, 14), (160, 160, 1, 7)]
    for batch in (1, 8):
        for inputs, outputs, stride, side in rows:
            block = InvertedResidual(inputs, outputs, stride, 1 if inputs == 32 and outputs == 16 else 6)
            name = f"MobileNetV2 {inputs}->{outputs}, {side}x{side}, stride {stride}, batch {batch}"
            found.append(Case(name, block, (batch, inputs, side, side)))
    return found


def channels_last(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def compare(case: Case, seconds: float) -> dict[str, Any]:
    """Ratios and memory of one block."""
    x = torch.randn(case.shape).contiguous(memory_format=torch.channels_last)
    plain = channels_last(fold(case.block.eval()))
    parts = read_block(plain)
    planned = FusedBlock(parts)
    sides: dict[str, nn.Module] = {"plain": plain, "in place": FusedBlock(parts, WHOLE), "planned": planned}
    tiles = {caches: plan_bands(planned.shape(x), caches * cache_bytes(), x.element_size()) for caches in CACHES}
    for caches, tile in tiles.items():
        sides[f"{caches} caches"] = FusedBlock(parts, tile)
    calls = {name: channels_last(side) for name, side in sides.items()}
    expected = plain(x)
    for call in calls.values():
        torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    timings = {timing.name: timing for timing in measure(calls, x, budget_s=seconds)}
    times = {name: ratio(timings["plain"], timing) for name, timing in timings.items()}
    best = max(tiles, key=lambda caches: times[f"{caches} caches"].median)
    times["best"] = times[f"{best} caches"]
    return {
        "block": case.name,
        "plain_ms": 1e3 * timings["plain"].median,
        "ratios": {name: vars(found) for name, found in times.items()},
        "text": {name: str(times[name]) for name in ("in place", "planned", "best")},
        "tile": {"rows": tiles[best].rows, "channels": tiles[best].channels},
        "bytes": {name: peak_memory(calls[name], x) for name in ("plain", "planned", f"{best} caches")},
        "best": f"{best} caches",
    }


@torch.inference_mode()
def compare_network(name: str, side: int, batch: int, seconds: float, block_seconds: float) -> dict[str, Any]:
    """A whole network: folded, and with fused blocks."""
    model = gatewise.create_model(name).eval()
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    fused, report = fuse_blocks(model, x, block_budget_s=block_seconds)
    sides: dict[str, Any] = {"folded": channels_last(fold(model)), "fused": fused}
    before, after = measure(sides, x, budget_s=seconds)
    faster: Ratio = ratio(before, after)
    memory = {key: peak_memory(call, x) for key, call in sides.items()}
    return {
        "network": f"{name}, {side}x{side}, batch {batch}",
        "fused": f"{len(report.fused)} of {len(report.blocks)}",
        "text": f"{_ms(before)} / {_ms(after)} = {faster}",
        "ratio": vars(faster),
        "bytes": memory,
        "blocks": [vars(block) | {"ratio": block.ratio and vars(block.ratio)} for block in report.blocks],
    }


def _ms(timing: Timing) -> str:
    return f"{1e3 * timing.median:.1f} ms"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def row(found: dict[str, Any]) -> list[str]:
    memory = found["bytes"]
    tile = f"{found['tile']['rows']} rows, {found['tile']['channels']} channels"
    text = found["text"]
    cells = [found["block"], f"{found['plain_ms']:.2f} ms", text["in place"], text["planned"], text["best"], tile]
    return [*cells, *(_mb(memory[name]) for name in ("plain", "planned", found["best"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring, per block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two small blocks and a small network, nothing written")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seconds = 0.1 if args.quick else args.seconds
    blocks = []
    for case in cases(args.quick):
        blocks.append(compare(case, seconds))
        print(" | ".join(row(blocks[-1])), flush=True)
    sizes = [("mobilenetv2_100", 224, 1), ("mobilenetv2_100", 224, 8), ("convfirstnet_small", 256, 4)]
    networks = []
    for size in [("mobilenetv2_035", 32, 1)] if args.quick else sizes:
        networks.append(compare_network(*size, seconds, 0.01 if args.quick else 1.0))
        print(" | ".join(_network_row(networks[-1])), flush=True)
    if args.quick:
        return
    slower = [found["block"] for found in blocks if found["ratios"]["best"]["median"] < 1]
    headline = (
        f"float32, {args.threads} thread(s), second-level cache of {cache_bytes() >> 10} KiB. Ratios over the plain "
        "block, channels-last and folded: median (quartiles). Slower in every tiling, so that `fuse_blocks` keeps them "
        f"plain: {'; '.join(slower) or 'none'}."
    )
    header = ["block", "plain", "in place", "planned", "best", "its tile", "memory: plain", "planned", "best"]
    tables = [
        Table("Times faster than the plain block", header, [row(found) for found in blocks]),
        Table(
            "Whole networks",
            ["network", "blocks fused", "folded / fused", "memory: folded", "fused"],
            [_network_row(found) for found in networks],
        ),
    ]
    write_results("block_fusion", headline, tables, {"blocks": blocks, "networks": networks})


def _network_row(found: dict[str, Any]) -> list[str]:
    memory = found["bytes"]
    return [found["network"], found["fused"], found["text"], _mb(memory["folded"]), _mb(memory["fused"])]


if __name__ == "__main__":
    main()
