"""ConvFirst's claim in miniature: without block fusion few-operation blocks cannot be fast, whatever kernels they have.

What the paper measures on GPUs is arithmetic in part: the bound that memory sets to a sequence of kernels, and to the
same as one kernel per block. That is reproduced exactly, and the same analysis is then held against this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import Interval, bootstrap, exact
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.efficiency.acceleration.block_fusion import FusedBlock, Tile, fuse_blocks
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.bounds.device import Device, device
from gatewise.efficiency.bounds.waterline import waterline
from gatewise.networks.image.convfirst import ConvFirst, ConvFirstConfig, ConvFirstNet, MBConv
from gatewise.networks.image.focalnet import FocalNet, FocalNetConfig
from gatewise.networks.image.inception_next import InceptionNeXt, InceptionNeXtConfig
from gatewise.networks.image.mobilenetv2 import MobileNetV2, MobileNetV2Config

HALF_BYTES = "float16"
A5000 = Device("RTX A5000", {HALF_BYTES: 111.1e12}, 768e9)
H200 = Device("H200 SXM", {HALF_BYTES: 989.5e12}, 4800e9)
BATCH = 128


def _pointwise(in_dim: int, dim: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(in_dim, dim, 1, bias=bias)


def _spatial(dim: int, kernel: int, group_width: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim // group_width, bias=bias)


class Residual(nn.Module):
    """Convolutions with a shortcut around them: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, convolutions: tuple[nn.Conv2d, ...]) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(*convolutions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolutions(x)


@dataclass(frozen=True)
class Analyzed:
    """The convolutions of a block, its map, and the most of an A5000's and an H200's peak that it can use."""

    convolutions: tuple[nn.Conv2d, ...]
    size: int
    a5000: float
    h200: float


def analyzed_blocks() -> dict[str, Analyzed]:
    """Three residual blocks of equal kind and different order, without storage."""
    with torch.device("meta"):
        return {
            "ConvFirst, 64 channels, 64x64": Analyzed(
                (_spatial(64, 3, 8), _pointwise(64, 384), _pointwise(384, 64)), 64, 0.342, 0.240
            ),
            "MBConv, 256 channels, 16x16": Analyzed(
                (_pointwise(256, 1024), _spatial(1024, 3, 8), _pointwise(1024, 256)), 16, 0.729, 0.594
            ),
            "ConvNeXt, 96 channels, 56x56": Analyzed(
                (_spatial(96, 7, 1, True), _pointwise(96, 384, True), _pointwise(384, 96, True)), 56, 0.436, 0.306
            ),
        }


def bound_processors(run: Run) -> Finding:
    """Bound the share of two GPUs' peaks that three blocks can reach, layer by layer and as one kernel."""
    measured = []
    bars = {}
    for name, block in analyzed_blocks().items():
        network = nn.Sequential(Residual(block.convolutions)).eval()
        x = torch.empty(BATCH, block.convolutions[0].in_channels, block.size, block.size, device="meta")
        for processor, expected in ((A5000, block.a5000), (H200, block.h200)):
            found = waterline(network, x, processor, dtype=HALF_BYTES, fold=False)
            # The shortcut is added where the last convolution writes.
            plain, fused = found.epilogues.max_efficiency, found.blocks.max_efficiency
            # The bounds are quoted with three digits.
            within = between(expected - 5e-4, expected + 5e-4)
            measured.append(Measured(f"{name}, {processor.name}: layer by layer", exact(plain), "of peak", within))
            measured.append(Measured(f"{name}, {processor.name}: one kernel", exact(fused), "of peak", at_least(1)))
            bars[f"{name}: {processor.name}"] = (plain, plain, plain)
    return Finding(
        measured=tuple(measured),
        charts=(Bars("Most that any kernels reach, layer by layer", "of the peak, 16 bits", bars, limit=1.0),),
        remark="With one kernel per block every one of these bounds is the peak itself.",
    )


SIZES = ((8, 8), (17, 23), (64, 64), (31, 5))


@torch.no_grad()
def check_identity(run: Run) -> Finding:
    """Depth-first execution against the plain block, and the memory that both need."""
    kinds: dict[str, Callable[[], nn.Module]] = {
        "ConvFirst": partial(ConvFirst, 64, 64, expand_ratio=6),
        "ConvFirst, stride 2": partial(ConvFirst, 64, 96, 2, expand_ratio=6),
        "MBConv": partial(MBConv, 64, 64, expand_ratio=4),
        "MBConv, stride 2": partial(MBConv, 64, 96, 2, expand_ratio=4),
    }
    worst = {}
    for name, make in kinds.items():
        plain = fold(randomise(build(run.seed, make), run.seed))
        fused = fuse_blocks(nn.Sequential(plain).eval()).model
        found = []
        for height, width in SIZES:
            x = torch.randn(2, 64, height, width, generator=generator(run.seed))
            found.append(relative_difference(fused(x), plain(x)))
        worst[name] = max(found)
    plain_bytes, fused_bytes = _memory_of_both(run)
    hidden = 6 * 64 * 64 * 64 * 4
    return Finding(
        measured=(
            *(Measured(f"error, {name}", exact(error), "", at_most(1e-5)) for name, error in worst.items()),
            Measured("extra memory of the plain block", exact(plain_bytes / 1e6), "MB", at_least(2 * hidden / 1e6)),
            Measured("extra memory in bands of 8 rows", exact(fused_bytes / 1e6), "MB", at_most(1.1)),
        ),
        remark="64 channels expanded to 384 on a 64x64 map, one image, float32: the hidden map alone has 6.3 MB.",
    )


def _memory_of_both(run: Run) -> tuple[int, int]:
    """Bytes at the peak, beyond input and output, of a ConvFirst block layer by layer and in bands of eight rows."""
    block = fold(randomise(build(run.seed, partial(ConvFirst, 64, 64, expand_ratio=6)), run.seed))
    fused = next(m for m in fuse_blocks(nn.Sequential(block).eval()).model.modules() if isinstance(m, FusedBlock))
    fused.tile = Tile(8, 64, 64)
    x = torch.randn(1, 64, 64, 64, generator=generator(run.seed)).contiguous(memory_format=torch.channels_last)
    block = block.to(memory_format=torch.channels_last)
    return _extra_bytes(block, x), _extra_bytes(fused, x)


def _extra_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Of PyTorch's allocator at the peak of a call, less what it returns."""
    function(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = function(x)
    live = peak = 0
    for size in _allocations(recorded):
        live += size
        peak = max(peak, live)
    return peak - y.numel() * y.element_size()


def _allocations(recorded: profile) -> list[int]:
    """Bytes taken (positive) and given back, in the order in which that happened."""
    changes: list[tuple[int, int]] = []
    results: Any = recorded.profiler

    def collect(events: list[Any]) -> None:
        for event in events:
            size = getattr(event.typed[1], "alloc_size", None)
            if size is not None:
                changes.append((event.start_time_ns, size))
            collect(event.children)

    collect(results.kineto_results.experimental_event_tree())
    return [size for _, size in sorted(changes)]


MACHINE_BLOCKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ConvFirst 64, 64x64": (partial(ConvFirst, 64, 64, expand_ratio=6), 64),
    "ConvFirst 64, 128x128": (partial(ConvFirst, 64, 64, expand_ratio=6), 128),
    "MBConv 128, 48x48": (partial(MBConv, 128, 128, expand_ratio=4), 48),
}


@torch.no_grad()
def hold_against_machine(run: Run) -> Finding:
    """Measured efficiency of blocks in three forms beside the bounds of this machine, one thread."""
    here = device(threads=1, refresh=True)
    measured: list[Measured] = []
    bars = {}
    for name, (make, size) in MACHINE_BLOCKS.items():
        block = randomise(build(run.seed, make), run.seed).to(memory_format=torch.channels_last)
        folded = fold(block)
        x = torch.randn(1, _width(block), size, size, generator=generator(run.seed))
        x = x.contiguous(memory_format=torch.channels_last)
        separate = waterline(nn.Sequential(block).eval(), x, here, fold=False)
        joined = waterline(nn.Sequential(folded).eval(), x, here, fold=False)
        bounds = {
            "separate": separate.operators.max_efficiency,
            "folded": joined.operators.max_efficiency,
            "fused": joined.blocks.max_efficiency,
        }
        forms = {"separate": block, "folded": folded, "fused": fuse_blocks(nn.Sequential(folded).eval()).model}
        calls = {form: partial(network, x) for form, network in forms.items()}
        times = time_by_turns(calls, run, seconds=6)
        ops = joined.blocks.ops
        for form, samples in times.items():
            reached = bootstrap([ops / seconds / here.peak("float32") for seconds in samples])
            limit = at_most(1.05 * bounds[form] * (1 + here.noise), contrary_above=1.05 * (1 + here.noise))
            measured.append(Measured(f"{name}, {form}: of peak (bound {bounds[form]:.2f})", reached, "", limit))
            bars[f"{name}: {form}"] = (reached.value, reached.low, reached.high)
        measured += _orders(name, bounds, times)
    return Finding(
        measured=tuple(measured),
        charts=(Bars("Efficiency on this machine, one thread", "of the measured peak", bars, limit=1.0),),
        remark=f"{here}. Separate: norms and activations as kernels of their own. Fused: a block at a time, in bands.",
    )


def _width(block: nn.Module) -> int:
    return next(module for module in block.modules() if isinstance(module, nn.Conv2d)).in_channels


def _orders(name: str, bounds: dict[str, float], times: dict[str, tuple[float, ...]]) -> list[Measured]:
    """Whether the bounds order the forms, and the measured times follow."""
    ordered = bounds["separate"] < bounds["folded"] <= bounds["fused"]
    folding, fusing = (times_faster(times[a], times[b]) for a, b in (("separate", "folded"), ("folded", "fused")))
    return [
        Measured(f"{name}: the bounds are in order", exact(float(ordered)), "", at_least(1)),
        Measured(f"{name}: folding the norms", folding, "x faster", at_least(1)),
        Measured(f"{name}: fusing the block", fusing, "x faster", at_least(1, 0.9)),
    ]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV2": partial(MobileNetV2, MobileNetV2Config()),
    "ConvFirstNet-S": partial(ConvFirstNet, ConvFirstConfig()),
    "InceptionNeXt-A": partial(InceptionNeXt, InceptionNeXtConfig(embed_dims=(40, 80, 160, 320), depths=(2, 2, 6, 2))),
    "FocalNet, 48 wide": partial(FocalNet, FocalNetConfig(embed_dim=48)),
}


@torch.no_grad()
def compare_gaps(run: Run) -> Finding:
    """Arithmetic, latency and what lies between, of four networks at 224 pixels on one thread."""
    here = device(threads=1)
    x = torch.randn(1, 3, 224, 224, generator=generator(run.seed)).contiguous(memory_format=torch.channels_last)
    folded = {
        name: fold(build(run.seed, make).eval()).to(memory_format=torch.channels_last)
        for name, make in NETWORKS.items()
    }
    ops = {name: waterline(network, x, here, fold=False).operators.ops for name, network in folded.items()}
    times = time_by_turns({name: partial(network, x) for name, network in folded.items()}, run, seconds=10)
    reached = {name: bootstrap([ops[name] / s / here.peak("float32") for s in times[name]]) for name in NETWORKS}
    spread = _widest_ratio(reached)
    return Finding(
        measured=(
            *(Measured(f"{name}: of peak", one, "", at_most(1.05 * (1 + here.noise))) for name, one in reached.items()),
            Measured("best over worst efficiency", spread, "x", at_least(1.2, 1.0)),
        ),
        charts=(
            Bars(
                "What networks reach of this machine's peak",
                "of the measured peak, one thread, one image",
                {name: (one.value, one.low, one.high) for name, one in reached.items()},
                limit=1.0,
            ),
        ),
        remark="; ".join(f"{name}: {ops[name] / 2e6:.0f} M MACs, {median_ms(times[name]):.1f} ms" for name in NETWORKS),
    )


def _widest_ratio(reached: dict[str, Interval]) -> Interval:
    """The highest efficiency over the lowest: were latency arithmetic alone, it would be 1."""
    best, worst = max(reached.values(), key=lambda one: one.value), min(reached.values(), key=lambda one: one.value)
    return Interval(best.value / worst.value, best.low / worst.high, best.high / worst.low, best.method)


CLAIM = Claim(
    statement="Latency is arithmetic over peak and computational efficiency. Layer by layer, memory bounds the "
    "efficiency of convnets with few operations, whatever their kernels. One kernel per residual block lifts the "
    "bound, and ConvFirst blocks, whose halo and workspace are small, are made for that.",
    source="Lavin 2024, abstract",
    published=(
        Published(
            "ConvFirst model with block-fusion kernels against ConvNeXt, GPU, 16 bits", "about 4x as fast", "abstract"
        ),
    ),
    design="The waterline analysis is applied to three blocks on two GPUs' data sheets, which needs no GPU. Blocks are "
    "executed depth-first, compared with the plain ones, and their memory is counted. Then peak and bandwidth of this "
    "machine are measured, and blocks are timed with separate norms, folded and fused, beside their bounds.",
    limits="The paper's speed is that of GPU kernels, and none is run here. On a CPU thread a few operations per byte "
    "suffice: the bound is seldom below the peak, and what is lost is lost to the quality of kernels and to passes "
    "over the map.",
    cautions=(
        "A bound says what no kernel can exceed, not what any reaches.",
        "Measured peaks belong to this machine at this hour; on a busy one efficiencies look better than they are.",
        "The stage table of the paper's network could not be had: ConvFirstNet's sizes here are ours.",
    ),
    budget_s=120,
    parts=(
        Part(
            "Two GPUs by arithmetic",
            "Largest computational efficiency of ConvFirst, MBConv and ConvNeXt blocks, 16 bits, batch 128, layer by "
            "layer and as one kernel.",
            bound_processors,
            seconds=2,
        ),
        Part(
            "Depth-first execution is the block",
            "Fused against plain blocks at odd sizes and stride 2, float32; bytes of the allocator at the peak.",
            check_identity,
            seconds=5,
        ),
        Part(
            "This machine's waterline",
            "Three blocks with norms and activations as kernels of their own, folded, and fused: measured efficiency "
            "beside the bound, on one thread.",
            hold_against_machine,
            seconds=45,
        ),
        Part(
            "Efficiency gaps of networks",
            "What four networks of different arithmetic reach of the peak, one image at 224 pixels, one thread.",
            compare_gaps,
            seconds=25,
        ),
    ),
)
