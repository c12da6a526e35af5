"""MobileNetV2 in miniature: thin linear ends, a wide middle that need not be kept, and what a ReLU costs when thin.

Information is measured directly (how much of a plane curve survives a ReLU in n dimensions), memory by counting and by
watching the tensors that a block makes, and accuracy by a short training of three otherwise equal networks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most
from gatewise.claims.lab.checks import generator, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.comparison import compare_accuracy
from gatewise.claims.lab.intervals import bootstrap, exact
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, one_thread_each
from gatewise.layers.inverted_residual import InvertedResidual, SplitInvertedResidual
from gatewise.networks.image.mobilenetv2 import MobileNetV2, MobileNetV2Config

PARTS = (2, 3, 4, 5)
KILOBYTE = 1000


def blocks_of(network: MobileNetV2) -> list[InvertedResidual]:
    """All blocks, in the order in which they run."""
    return [module for module in network.modules() if isinstance(module, InvertedResidual)]


@torch.no_grad()
def split_error(network: MobileNetV2, images: Tensor) -> float:
    """Largest relative difference between a block and its split forms, each on the input that it gets for `images`."""
    worst = 0.0
    x = network.stem(images)
    for block in blocks_of(network):
        y = block(x)
        if block.expand is not None:
            splits = (SplitInvertedResidual(block, parts) for parts in PARTS)
            worst = max(worst, *(relative_difference(split(x), y) for split in splits))
        x = y
    return worst


class LargestTensor(TorchDispatchMode):
    """Within the block: the bytes of the largest tensor that any operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]
        self.bytes = max(self.bytes, *sizes, 0)
        return returned


@torch.no_grad()
def largest_tensor(block: nn.Module, x: Tensor) -> int:
    """Bytes of the largest tensor that `block(x)` makes."""
    with LargestTensor() as largest:
        block(x)
    return largest.bytes


def check_split(run: Run) -> Finding:
    """A block computed in parts equals the whole block, and makes smaller tensors."""
    network = randomise(build(run.seed, partial(MobileNetV2, MobileNetV2Config())), run.seed)
    images = torch.randn(1, 3, 96, 96, generator=generator(run.seed))
    with one_thread_each():
        run.say("splitting every block, float32")
        single = exact(split_error(network, images))
        run.say("splitting every block, float64")
        double = exact(split_error(deepcopy(network).double(), images.double()))
    first, second = blocks_of(network)[1:3]
    inputs = {"first": torch.randn(1, 16, 112, 112), "second": torch.randn(1, 24, 56, 56)}
    megabytes = {
        f"{name} block: {'whole' if parts == 1 else f'{parts} parts'}": largest_tensor(
            block if parts == 1 else SplitInvertedResidual(block, parts), inputs[name]
        )
        / 1e6
        for name, block in (("first", first), ("second", second))
        for parts in (1, *PARTS)
    }
    return Finding(
        measured=(
            Measured("whole against 2 to 5 parts, float32: relative difference", single, "", at_most(1e-5)),
            Measured("whole against 2 to 5 parts, float64: relative difference", double, "", at_most(1e-12)),
            Measured("largest tensor, first block, whole", exact(megabytes["first block: whole"]), "MB"),
            Measured(
                "largest tensor, first block, 4 parts", exact(megabytes["first block: 4 parts"]), "MB", at_most(1.3)
            ),
            Measured("largest tensor, second block, whole", exact(megabytes["second block: whole"]), "MB"),
            Measured(
                "largest tensor, second block, 4 parts", exact(megabytes["second block: 4 parts"]), "MB", at_most(0.5)
            ),
        ),
        charts=(
            Bars(
                "Largest tensor that a block makes (float32)",
                "MB",
                {name: (size,) * 3 for name, size in megabytes.items()},
            ),
        ),
    )


def spiral(points: int = 1000, turns: float = 2.0) -> Float[Tensor, "points two"]:
    """A spiral around the origin, in float64."""
    t = torch.linspace(0, 1, points, dtype=torch.float64)
    angle = 2 * math.pi * turns * t
    return torch.stack([t * angle.cos(), t * angle.sin()], dim=1)


def readout_error(dim: int, draw: torch.Generator) -> float:
    """Share of the spiral's variance that no linear map recovers from relu(T x), T random of shape (dim, 2)."""
    x = spiral()
    embedding = torch.randn(dim, 2, dtype=torch.float64, generator=draw)
    y = F.relu(x @ embedding.T)
    # gelsd bears a rank-deficient y: in few dimensions a unit may never be active.
    readout = torch.linalg.lstsq(y, x, driver="gelsd").solution
    return ((y @ readout - x).square().sum() / x.square().sum()).item()


def measure_bottleneck(run: Run) -> Finding:
    """Loss of information by a ReLU in n dimensions, over 20 random embeddings each."""
    dims, draws = (2, 3, 5, 15, 30), 20
    random = generator(run.seed)
    errors = {dim: [readout_error(dim, random) for _ in range(draws)] for dim in dims}
    intervals = {dim: bootstrap(errors[dim], statistics.fmean, "random embeddings") for dim in dims}
    expected = {2: at_least(0.2), 3: at_least(0.1), 15: at_most(1e-3), 30: at_most(1e-5)}
    seen = {2: "collapsed", 3: "collapsed", 15: "largely preserved", 30: "largely preserved"}
    return Finding(
        measured=tuple(
            Measured(
                f"variance lost in {dim} dimensions",
                intervals[dim],
                "",
                expected.get(dim),
                Published(f"picture for n = {dim}", seen[dim], "figure 1") if dim in seen else None,
            )
            for dim in dims
        ),
        charts=(
            Lines(
                "What a ReLU in n dimensions loses of a spiral",
                "dimensions",
                "share of variance lost",
                dims,
                {
                    "mean of 20 embeddings": [intervals[dim].value for dim in dims],
                    "worst of 20": [max(errors[dim]) for dim in dims],
                },
                log="xy",
            ),
        ),
        remark="The paper projects back with the embedding's inverse; here the best linear readout is taken, which can "
        "only lose less.",
    )


@dataclass(frozen=True)
class BlockBytes:
    """Count the values that a block reads, holds inside and writes per image."""

    input: int
    hidden: int
    output: int

    def materialized(self, parts: int) -> int:
        """Bytes held at once when the inner tensor is computed in `parts` parts."""
        return self.input + self.output + -(-self.hidden // parts)


def count_bytes(network: MobileNetV2, size: int, bytes_per_value: int = 2) -> list[BlockBytes]:
    """Bytes of every block's tensors for an image of `size` pixels a side; nothing is computed."""
    counted = []
    with torch.device("meta"):
        x = network.to("meta").stem(torch.empty(1, 3, size, size))
        for block in blocks_of(network):
            hidden = x if block.expand is None else block.expand(x)
            y = block(x)
            counted.append(BlockBytes(*(bytes_per_value * tensor.numel() for tensor in (x, hidden, y))))
            x = y
    return counted


def account_memory(run: Run) -> Finding:
    """The largest tensor that must exist whole, and what that needs of the inner tensors."""
    network = build(run.seed, partial(MobileNetV2, MobileNetV2Config())).eval()
    blocks = count_bytes(network, 224)
    thin, wide = (max(getattr(block, name) for block in blocks) / KILOBYTE for name in ("output", "hidden"))
    held = {parts: max(block.materialized(parts) for block in blocks) / KILOBYTE for parts in (1, 4)}
    published = {"MobileNetV2: between blocks": 400.0, "ShuffleNet (2x, g=3)": 600.0, "MobileNetV1": 1600.0}
    return Finding(
        measured=(
            Measured(
                "largest tensor between blocks, 16-bit",
                exact(thin),
                "kB",
                at_most(published["ShuffleNet (2x, g=3)"]),
                Published("MobileNetV2; ShuffleNet; MobileNetV1", "400; 600; 1600 kB", "table 3, recalled", 400.0),
            ),
            Measured("largest tensor inside a block, 16-bit", exact(wide), "kB"),
            Measured("most held at once, blocks whole", exact(held[1]), "kB"),
            Measured("most held at once, blocks in 4 parts", exact(held[4]), "kB", at_most(held[1] / 2)),
        ),
        charts=(
            Bars(
                "Largest tensor to be kept whole, 16-bit",
                "kB per image",
                {
                    "MobileNetV2: between blocks": (thin,) * 3,
                    "MobileNetV2: inside blocks": (wide,) * 3,
                    "ShuffleNet (2x, g=3)": (0.0,) * 3,
                    "MobileNetV1": (0.0,) * 3,
                },
                published=published,
            ),
        ),
        remark="As in the paper, the stem is taken as one with the first block, whose input is not counted between "
        "blocks. MobileNetV1 and ShuffleNet are quoted, not counted.",
    )


ROWS = ((1, 8, 1, 1), (6, 8, 2, 1), (6, 8, 3, 2), (6, 16, 4, 2), (6, 24, 3, 1))
"""The first five rows at width 0.25, with strides for images of 28 pixels."""
SCHEDULE = Schedule(steps=240, batch_size=64, lr=5e-3)


def keep(block: InvertedResidual) -> None:
    """The block as published."""


def add_relu6(block: InvertedResidual) -> None:
    """An activation after the projection: the bottleneck is no longer linear."""
    block.project.act = nn.ReLU6()


def cut_shortcut(block: InvertedResidual) -> None:
    """No residual connection."""
    block.residual = False


VARIANTS: dict[str, Callable[[InvertedResidual], None]] = {
    "linear, residual": keep,
    "ReLU6 bottleneck": add_relu6,
    "no residual": cut_shortcut,
}


def make_network(change: Callable[[InvertedResidual], None]) -> MobileNetV2:
    """The thin network of the experiment, with a change in every block."""
    network = MobileNetV2(MobileNetV2Config(rows=ROWS, in_chans=1, num_classes=10, drop_rate=0.0))
    for block in blocks_of(network):
        change(block)
    return network


def compare_bottlenecks(run: Run) -> Finding:
    """Test accuracy of three variants after equal training, over several seeds."""

    makes = {name: partial(make_network, change) for name, change in VARIANTS.items()}
    found = compare_accuracy(run, makes, Clothes(), SCHEDULE, seeds=5)
    return Finding(
        measured=(
            Measured("accuracy, linear bottlenecks with residual", found.intervals["linear, residual"], "%"),
            Measured(
                "lost by a ReLU6 behind the projection",
                found.gap("linear, residual", "ReLU6 bottleneck"),
                "points",
                at_least(0),
            ),
            Measured(
                "lost without residual connections", found.gap("linear, residual", "no residual"), "points", at_least(0)
            ),
        ),
        charts=(found.chart(f"Accuracy on clothes after {SCHEDULE.steps} steps", "% of 2,000 test images"),),
    )


def time_formats(run: Run) -> Finding:
    """Latency of the network in both memory formats."""
    network = build(run.seed, partial(MobileNetV2, MobileNetV2Config())).eval()
    images = torch.randn(8, 3, 224, 224, generator=generator(run.seed))
    formats = {
        name: (deepcopy(network).to(memory_format=layout), images.contiguous(memory_format=layout))
        for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last))
    }
    with torch.no_grad():
        calls = {name: lambda model=model, x=x: model(x) for name, (model, x) in formats.items()}
        times = time_by_turns(calls, run, seconds=12)
    per_image = {
        name: bootstrap([1e3 * seconds / len(images) for seconds in samples]) for name, samples in times.items()
    }
    return Finding(
        measured=(
            *(Measured(f"{name}, one thread, batch 8", ms, "ms an image") for name, ms in per_image.items()),
            Measured(
                "NCHW over channels-last, time", times_faster(times["NCHW"], times["channels-last"]), "x", at_least(1)
            ),
        ),
        charts=(
            Bars(
                "Latency by memory format",
                "ms an image, one thread",
                {name: (ms.value, ms.low, ms.high) for name, ms in per_image.items()},
            ),
        ),
    )


CLAIM = Claim(
    statement="Blocks with thin linear ends and a wide, filtered middle classify better than blocks with a ReLU in the "
    "thin part or without shortcuts between the thin ends, and their wide middle never has to be kept in memory.",
    source="Sandler et al. 2018, on linear bottlenecks, memory-efficient inference and its ablation",
    published=(
        Published("ImageNet top-1 at width 1.0 and 224 pixels, 300 M MACs", "71.8 %", "checkpoint table"),
        Published("largest tensor: MobileNetV2, ShuffleNet, MobileNetV1", "400, 600, 1600 kB", "table 3, recalled"),
    ),
    design="Every expanding block of MobileNetV2 is computed whole and in 2 to 5 parts and compared, watching the "
    "largest tensor made; the loss of a plane spiral in relu(T x) is measured for 2 to 30 dimensions; bytes are "
    "counted at 224 pixels; and three variants of a thin network (first five rows at width 0.25, 13 blocks, 92 "
    f"thousand parameters) are trained for {SCHEDULE.steps} equal steps on 10,000 pictures of clothes (Fashion-MNIST).",
    limits="So short a training shows which variant learns readily, not where each would end; ImageNet is out of "
    "reach. MobileNetV1 and ShuffleNet are not built here: the order of memory needs rests on their published figures.",
    cautions=(
        "The saving of memory is in the tensors of one block; what a runtime holds in all depends on its allocator.",
        "What channels-last gains depends on the processor and the library; it is no claim of the paper.",
    ),
    budget_s=170,
    parts=(
        Part(
            "Blocks in parts",
            "Whole blocks against the same in 2, 3, 4 and 5 parts, each on its true input (96 pixels), in float32 and "
            "float64; then the largest tensor that the first two make at 224 pixels.",
            check_split,
            seconds=6,
        ),
        Part(
            "ReLU in few dimensions",
            "A spiral is embedded in n dimensions by a random matrix and put through a ReLU; how much of it does the "
            "best linear readout miss?",
            measure_bottleneck,
            seconds=1,
        ),
        Part(
            "Memory between blocks",
            "Bytes of every tensor between and inside the blocks of MobileNetV2 at 224 pixels, 16 bits a value.",
            account_memory,
            seconds=1,
        ),
        Part(
            "Memory format",
            "Latency of MobileNetV2 on one thread, batch 8, 224 pixels, NCHW and channels-last, interleaved.",
            time_formats,
            seconds=15,
        ),
        Part(
            "Linear bottlenecks and shortcuts",
            "Test accuracy after equal training: as published, with a ReLU6 behind each projection, without shortcuts; "
            "five seeds, differences taken within a seed.",
            compare_bottlenecks,
            seconds=90,
        ),
    ),
)
