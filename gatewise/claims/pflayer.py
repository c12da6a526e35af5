"""PfLayer in miniature: a 3x3 convolution without weights, what it saves, what it keeps, and what it cannot do.

Sizes, identities and memory are exact. The experiment tells clothes apart with six thin residual networks that differ
in what mixes positions in their bottlenecks, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.catalog.registry import family_of
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.comparison import compare_accuracy
from gatewise.claims.lab.intervals import Interval, exact
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import Cost, count
from gatewise.layers.conv import ConvNormAct
from gatewise.networks.image.pflayer import SPATIAL, Bottleneck, PfResNetConfig, SpatialMaxPool
from gatewise.ops.spatial_pool import spatial_max_pool, spatial_max_pool_reference

PUBLISHED = {
    "resnet50": (25_557_032, 4_089_184_256),
    "resnet50_max": (14_232_232, 2_239_496_192),
    "resnet50_hybrid": (17_330_600, 2_586_312_704),
    "vit_ti_max": (6_159_400, 1_244_757_504),
    "vit_s_max": (23_819_368, 4_743_822_336),
    "vit_b_max": (93_644_008, 18_504_873_984),
    "pit_ti_max": (5_174_504, 631_512_960),
    "pit_s_max": (25_119_784, 2_813_372_640),
    "pit_b_max": (79_005_928, 12_428_636_160),
    "vit_s_attention": (22_049_896, 4_574_026_752),
    "pit_s_attention": (23_253_544, 2_845_539_072),
}
"""Parameters and multiply-accumulates at 224 pixels of the published code."""


def cost_of(name: str) -> Cost:
    """Of a registered variant at 224 pixels, without storage."""
    family = family_of(name)
    with torch.device("meta"):
        return count(family.network(family.variants[name].config), torch.empty(1, 3, 224, 224))


def check_sizes(run: Run) -> Finding:
    """Parameters and MACs of all published networks, and of two that they are compared with."""
    costs = {}
    for name in PUBLISHED:
        run.say(f"counting {name}")
        costs[name] = cost_of(name)
    wrong = sum((cost.parameters, cost.macs) != PUBLISHED[name] for name, cost in costs.items())

    def ratio(of: str, to: str, what: str) -> Interval:
        return exact(getattr(costs[of], what) / getattr(costs[to], what))

    return Finding(
        measured=(
            Measured(f"networks of another size, of {len(PUBLISHED)}", exact(wrong), "", between(0, 0)),
            Measured(
                "parameters, R50-max over R50", ratio("resnet50_max", "resnet50", "parameters"), "", at_most(0.56)
            ),
            Measured("MACs, R50-max over R50", ratio("resnet50_max", "resnet50", "macs"), "", at_most(0.55)),
            Measured("MACs, R50-hybrid over R50", ratio("resnet50_hybrid", "resnet50", "macs"), "", at_most(0.65)),
            Measured("MACs, ViT-S-max over ViT-S", ratio("vit_s_max", "vit_s_attention", "macs")),
            Measured("MACs, PiT-S-max over PiT-S", ratio("pit_s_max", "pit_s_attention", "macs")),
        ),
        charts=(
            Bars(
                "Multiply-accumulates at 224 pixels",
                "billions",
                {name: (cost.macs / 1e9,) * 3 for name, cost in costs.items()},
                published={name: macs / 1e9 for name, (_, macs) in PUBLISHED.items()},
                log=True,
            ),
        ),
        remark="The transformers do not shrink: their pooling mixer has 6 D^2 weights where attention has 4 D^2. What "
        "they lose is the part that grows with the square of the tokens.",
    )


class LargestOfWindows(nn.Module):
    """Max pooling by its definition, window by window, minus infinity around the map."""

    def forward(self, x: Tensor) -> Tensor:
        return spatial_max_pool_reference(x)


def definition_error(seed: int) -> float:
    """Largest difference between a max block and a regular one whose convolution is the definition instead."""
    block = randomise(build(seed, lambda: Bottleneck(32, 16, 32, SpatialMaxPool())), seed)
    other = Bottleneck(32, 16, 32, LargestOfWindows()).eval()
    other.load_state_dict(block.state_dict())
    x = torch.randn(2, 32, 23, 19, generator=generator(seed))
    with torch.no_grad():
        return (block(x) - other(x)).abs().max().item()


def turning_error(stem: int, spatial: str, seed: int) -> float:
    """Relative difference of the logits of an image and of the image turned by a quarter."""
    network = randomise(build(seed, lambda: make_network(spatial, stem=stem, stem_stride=1)), seed)
    # An odd side: positions that are left out by the stride then turn with the image.
    x = torch.randn(2, 1, 25, 25, generator=generator(seed))
    with torch.no_grad():
        return relative_difference(network(x.rot90(dims=(2, 3))), network(x))


def kept_bytes(pool: Callable[[Tensor], Tensor]) -> float:
    """Bytes per output, beside its input, that a pool keeps for the backward pass."""
    x = torch.randn(2, 16, 24, 24, generator=generator(0)).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = pool(x)
    return sum(one.numel() * one.element_size() for one in kept if one.dtype != x.dtype) / y.numel()


def check_identities(run: Run) -> Finding:
    """The definition, bit by bit; what symmetry rules out; and what a training step keeps."""
    symmetric = turning_error(1, "max", run.seed)
    by_stem, by_depthwise = turning_error(3, "max", run.seed), turning_error(1, "depthwise", run.seed)
    ours, library = kept_bytes(spatial_max_pool), kept_bytes(lambda x: F.max_pool2d(x, 3, 1, 1))
    return Finding(
        measured=(
            Measured(
                "max block against its definition: difference", exact(definition_error(run.seed)), "", between(0, 0)
            ),
            Measured("image turned, pointwise stem and max pools: change", exact(symmetric), "", at_most(1e-4)),
            Measured("the same with a 3x3 stem", exact(by_stem), "", at_least(1e-2)),
            Measured("the same with depthwise convolutions", exact(by_depthwise), "", at_least(1e-2)),
            Measured("kept for the backward pass, per output", exact(ours), "bytes", between(1, 1)),
            Measured("the same by the library's pool", exact(library), "bytes", at_least(8)),
        ),
        remark="A max pool looks the same from all sides. A network whose other maps are pointwise cannot tell a "
        "stroke from the same stroke turned by a quarter, however long it is trained: direction must come from a "
        "trained convolution, such as the stem's or the three that the hybrid keeps.",
    )


RESNETS = ("resnet50", "resnet50_max", "resnet50_hybrid")
PIXELS = 160


def time_networks(run: Run) -> Finding:
    """Latency of the three residual networks, folded and channels-last, at two batch sizes."""
    measured = []
    charts = []
    networks = {}
    for name in RESNETS:
        family = family_of(name)
        network = randomise(build(run.seed, partial(family.network, family.variants[name].config)), run.seed)
        networks[name] = fold(network).to(memory_format=torch.channels_last)
    for batch, share in ((1, 0.25), (4, 0.75)):
        images = torch.randn(batch, 3, PIXELS, PIXELS, generator=generator(run.seed))
        images = images.contiguous(memory_format=torch.channels_last)
        run.say(f"timing three networks on {batch} image{'s' if batch > 1 else ''}")
        with torch.no_grad():
            calls = {name: partial(network, images) for name, network in networks.items()}
            times = time_by_turns(calls, run, seconds=36 * share)
        for name, figure in (("resnet50_max", "8.7 against 6.8 ms"), ("resnet50_hybrid", "8.7 against 7.3 ms")):
            published = Published(f"resnet50 against {name}, a GPU", figure, "repository, results table")
            faster = times_faster(times["resnet50"], times[name])
            what = f"batch {batch}: resnet50 over {name}"
            measured.append(Measured(what, faster, "x", at_least(1), published))
        bars = {name: (median_ms(samples),) * 3 for name, samples in times.items()}
        charts.append(Bars(f"Batch of {batch}, {PIXELS} pixels", "ms, one thread", bars))
    return Finding(measured=tuple(measured), charts=tuple(charts))


class Subsample(nn.Module):
    """No mixing of positions: every `stride`-th of them."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


VARIANTS = ("conv", "hybrid", "depthwise", "max", "average", "none")
SCHEDULE = Schedule(steps=200, batch_size=64, lr=5e-3)


def mixer(spatial: str, width: int, stride: int) -> nn.Module:
    """Spatial operators of a bottleneck: the published ones, and none at all."""
    return Subsample(stride) if spatial == "none" else SPATIAL[spatial](PfResNetConfig(), width, stride, 1)


def make_network(spatial: str, stem: int = 3, stem_stride: int = 2) -> nn.Sequential:
    """A convolution, two bottlenecks, one that halves the resolution, one more, mean and classifier."""
    blocks = ((32, 16, 32, 1), (32, 16, 32, 1), (32, 32, 64, 2), (64, 32, 64, 1))
    network = nn.Sequential(
        ConvNormAct(1, 32, stem, stem_stride, act=nn.ReLU),
        *(Bottleneck(before, width, dim, mixer(spatial, width, s), s) for before, width, dim, s in blocks),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, Clothes.classes),
    )
    return init_by_fan_in(network)


def compare_operators(run: Run) -> Finding:
    """Test accuracy of six spatial operators after equal training, over several seeds."""
    costs = {name: count(build(0, partial(make_network, name)), torch.zeros(1, 1, 28, 28)) for name in VARIANTS}

    makes = {name: partial(make_network, name) for name in VARIANTS}
    found = compare_accuracy(run, makes, Clothes(), SCHEDULE, seeds=4)
    return Finding(
        measured=(
            Measured("accuracy with max pools", found.intervals["max"], "%"),
            Measured("max minus depthwise", found.gap("max", "depthwise"), "points", at_least(-2)),
            Measured("max minus no mixing", found.gap("max", "none"), "points", at_least(10, 0)),
            Measured("max minus average", found.gap("max", "average"), "points"),
            Measured("hybrid minus conv", found.gap("hybrid", "conv"), "points", at_least(-1)),
            Measured("max minus conv", found.gap("max", "conv"), "points"),
            *(
                Measured(f"parameters, {name}", exact(cost.parameters / 1e3), "thousand")
                for name, cost in costs.items()
            ),
        ),
        charts=(found.chart(f"Accuracy on clothes after {SCHEDULE.steps} steps", "% of 2,000 test images"),),
        remark="; ".join(f"{name}: {cost.macs / 1e6:.2f} M MACs" for name, cost in costs.items()),
    )


CLAIM = Claim(
    statement="The trained operator over positions of a building block can be a 3x3 max pool: fewer parameters and "
    "operations, lower latency, and about the same accuracy; the best of both is a hybrid that trains it where the "
    "resolution changes.",
    source="Han et al. 2022, abstract, and the results table of the repository",
    published=(
        Published("ImageNet-1K top-1: R50, R50-max, R50-hybrid", "76.2, 74.3, 77.1 %", "repository, results table"),
        Published("with longer training: R50-max, R50-hybrid", "75.5, 78.0 %", "repository, results table"),
        Published("GPU latency: R50, R50-max, R50-hybrid", "8.7, 6.8, 7.3 ms", "repository, results table"),
        Published("with DeiT's recipe: R50, ViT-S-max, PiT-S-max", "78.8, 80.0, 80.8 %", "repository, results table"),
    ),
    design="All published networks are counted; a max block is held to its definition, its symmetry and its memory in "
    f"training; the three residual networks are timed; and six thin networks are trained for {SCHEDULE.steps} equal "
    "steps on 10,000 pictures of clothes (Fashion-MNIST). They share a trained 3x3 stem, and differ in the operator of "
    "their four bottlenecks: a convolution, the hybrid, a depthwise convolution, a max pool, an average pool, or none.",
    limits="Clothes at 28 pixels are told apart by little context, and the stem sees a part of it: what an operator is "
    "worth on ImageNet is out of reach. The published latencies are a GPU's, where launches and memory weigh more.",
    cautions=(
        "A network of max pools and pointwise maps alone is blind to direction; keep a trained convolution in it.",
        "On a CPU a 3x3 convolution is well optimized and saves less than its share of operations; measure on the "
        "machine that matters, in both memory formats.",
        "ViT and PiT with max pooling have more parameters than with attention.",
        "Accuracies after so few steps compare how readily the variants learn, not where they would end.",
    ),
    budget_s=170,
    parts=(
        Part("Sizes", "Parameters and MACs of eleven networks, counted without storage.", check_sizes, seconds=8),
        Part(
            "Identities",
            "A max block against windows laid out one by one; logits of images turned by a quarter; and the bytes kept "
            "for the backward pass.",
            check_identities,
            seconds=2,
        ),
        Part(
            "Latency",
            f"R50, R50-max and R50-hybrid, folded, channels-last, 1 and 4 images of {PIXELS} pixels, one thread, by "
            "turns.",
            time_networks,
            seconds=50,
        ),
        Part(
            "Operators",
            "Accuracy on 2,000 test pictures after equal training with six operators; four seeds, differences taken "
            "within a seed.",
            compare_operators,
            seconds=100,
        ),
    ),
)
