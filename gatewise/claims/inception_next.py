"""InceptionNeXt in miniature: four cheap branches against one large depthwise kernel.

The experiment asks at dots for a symbol that stands 1 to 4 cells away, in any direction, so that the answer shows how
far a mixer of positions reaches. Identity, 3x3, 7x7 and Inception mixers learn it in otherwise equal networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Expectation, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.symbols import SymbolNearby
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.inception_next import (
    InceptionDepthwise,
    InceptionNeXt,
    InceptionNeXtConfig,
    MetaNeXtBlock,
    depthwise,
)

BAND, SQUARE = 11, 3
ARM = BAND // 2
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def dense_kernel(mixer: InceptionDepthwise) -> tuple[Float[Tensor, "channels 1 11 11"], Float[Tensor, " channels"]]:
    """Weight and bias of the one depthwise 11x11 convolution that computes what the four branches compute."""
    untouched = torch.zeros(mixer.split[0], 1, BAND, BAND)
    untouched[:, :, ARM, ARM] = 1
    weights, biases = [untouched], [torch.zeros(mixer.split[0])]
    for conv in (module for module in mixer.modules() if isinstance(module, nn.Conv2d)):
        top, left = (ARM - size // 2 for size in conv.kernel_size)
        weights.append(F.pad(conv.weight, (left, left, top, top)))
        biases.append(conv.get_parameter("bias"))
    return torch.cat(weights), torch.cat(biases)


def equivalence_error(mixer: InceptionDepthwise, x: Float[Tensor, "batch channels height width"]) -> float:
    """Largest relative difference between the mixer and its dense kernel."""
    weight, bias = dense_kernel(mixer)
    with torch.no_grad():
        return relative_difference(F.conv2d(x, weight, bias, padding=ARM, groups=x.shape[1]), mixer(x))


def branch_channels(mixer: InceptionDepthwise) -> list[slice]:
    """The channels of the identity and of each convolution, in order."""
    bounds = [0]
    for width in mixer.split:
        bounds.append(bounds[-1] + width)
    return [slice(*pair) for pair in pairwise(bounds)]


def seen_positions(mixer: nn.Module, dim: int, channels: slice) -> Int[Tensor, "height width"]:
    """1 where the input has a say in these channels' output at the middle of a map, 0 elsewhere."""
    side = 2 * BAND + 1
    x = torch.randn(1, dim, side, side, generator=generator(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, channels, side // 2, side // 2].sum(), x)
    return gradient[0].abs().sum(0).gt(0).int()


def cross() -> Int[Tensor, "height width"]:
    """Return the expected receptive field: the two bands and the square around the middle, 21 + 4 positions."""
    side = 2 * BAND + 1
    middle, half = side // 2, SQUARE // 2
    field = torch.zeros(side, side, dtype=torch.int32)
    field[middle, middle - ARM : middle + ARM + 1] = 1
    field[middle - ARM : middle + ARM + 1, middle] = 1
    field[middle - half : middle + half + 1, middle - half : middle + half + 1] = 1
    return field


def check_identities(run: Run) -> Finding:
    """The dense equivalent and the receptive field of the mixer."""
    dim = 96
    mixer = build(run.seed, lambda: InceptionDepthwise(dim))
    x = torch.randn(2, dim, 23, 19, generator=generator(run.seed))
    names = ("untouched", "square", "row", "column")
    fields = {name: seen_positions(mixer, dim, own) for name, own in zip(names, branch_channels(mixer), strict=True)}
    whole = seen_positions(mixer, dim, slice(None))
    return Finding(
        measured=(
            Measured("difference from one dense 11x11 kernel", exact(equivalence_error(mixer, x)), "", at_most(1e-5)),
            Measured("positions that the mixer sees", exact(whole.sum().item()), "", between(25, 25)),
            Measured("of these, off the cross and square", exact((whole > cross()).sum().item()), "", between(0, 0)),
            Measured(
                "positions that untouched channels see", exact(fields["untouched"].sum().item()), "", between(1, 1)
            ),
        ),
        charts=(
            Pictures("What one output position sees", {k: v.tolist() for k, v in ({"all": whole} | fields).items()}),
        ),
    )


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "identity": lambda dim: nn.Identity(),
    "3x3": lambda dim: depthwise(dim, (3, 3)),
    "7x7": lambda dim: depthwise(dim, (7, 7)),
    "Inception": InceptionDepthwise,
}
TIMED = ("Inception", "7x7", "3x3")
Times = Mapping[str, Sequence[float]]


def measure_cost(run: Run) -> Finding:
    """MACs per position and one-thread time of three mixers, in both memory formats."""
    dim, side, batch = 96, 56, 8
    mixers = {name: build(run.seed, partial(MIXERS[name], dim)) for name in TIMED}
    macs = {name: count(mixer, torch.zeros(1, dim, side, side)).macs / side**2 for name, mixer in mixers.items()}
    run.say("timing three mixers in two memory formats")
    x = torch.randn(batch, dim, side, side, generator=generator(run.seed))
    calls = {
        f"{name}, {memory}": partial(mixer, x.contiguous(memory_format=layout))
        for memory, layout in FORMATS.items()
        for name, mixer in mixers.items()
    }
    with torch.no_grad():
        times = time_by_turns(calls, run, seconds=15)
    return Finding(
        measured=(
            Measured(
                "MACs per position and channel, Inception", exact(macs["Inception"] / dim), "", between(3.875, 3.875)
            ),
            Measured("MACs, 7x7 over Inception", exact(macs["7x7"] / macs["Inception"]), "x", at_least(12.6)),
            in_better_formats("7x7", times, at_least(1)),
            *(in_format(slow, memory, times) for slow in ("7x7", "3x3") for memory in FORMATS),
        ),
        charts=(time_chart("Time of a mixer, 8 maps of 96x56x56", times),),
        remark="How a depthwise kernel fares depends on the library behind it. Where it has fast kernels for 3x3 and "
        "7x7, as for channels-last here, the split and join of Inception can cost more than its convolutions save.",
    )


def in_format(slow: str, memory: str, times: Times) -> Measured:
    """How many times faster Inception is than another mixer in one memory format."""
    interval = times_faster(times[f"{slow}, {memory}"], times[f"Inception, {memory}"])
    return Measured(f"time, {slow} over Inception, both {memory}", interval, "x")


def in_better_formats(slow: str, times: Times, expected: Expectation, published: Published | None = None) -> Measured:
    """The same with each in the memory format that suits it better, as the paper measures."""
    best = {
        name: min(FORMATS, key=lambda memory: median_ms(times[f"{name}, {memory}"])) for name in (slow, "Inception")
    }
    interval = times_faster(*(times[f"{name}, {memory}"] for name, memory in best.items()))
    return Measured(f"time, {slow} over Inception, each in its better format", interval, "x", expected, published)


def time_chart(title: str, times: Times) -> Bars:
    """Median times, a color per mixer."""
    bars = {name.replace(",", ":"): (median_ms(samples),) * 3 for name, samples in times.items()}
    return Bars(title, "ms, one thread", {name: bars[name] for name in sorted(bars)})


def time_training(run: Run) -> Finding:
    """Time of a training step of a network with three mixers, in both memory formats."""
    images = torch.randn(4, 3, 160, 160, generator=generator(run.seed))
    calls = {}
    for memory, layout in FORMATS.items():
        for name in TIMED:
            network = replace_mixers(build(run.seed, partial(InceptionNeXt, ATTO)), MIXERS[name])
            laid_out = images.contiguous(memory_format=layout)
            calls[f"{name}, {memory}"] = partial(run_backward, network.to(memory_format=layout), laid_out)
    run.say("timing a training step with three mixers in two memory formats")
    times = time_by_turns(calls, run, seconds=14)
    convnext = Published("ConvNeXt-T over InceptionNeXt-T, training on an A100", "1.6x", "abstract")
    return Finding(
        measured=(
            in_better_formats("7x7", times, at_least(1), convnext),
            in_better_formats("3x3", times, at_least(0.9)),
            *(in_format(slow, memory, times) for slow in ("7x7", "3x3") for memory in FORMATS),
        ),
        charts=(time_chart("Training step, 4 images of 160 pixels", times),),
    )


def run_backward(network: nn.Module, images: Tensor) -> None:
    """Forward and backward, without an optimizer."""
    network(images).sum().backward()


def check_folding(run: Run) -> Finding:
    """A network against its folded form: equal outputs, and what folding alone is worth."""
    network = randomise(build(run.seed, lambda: InceptionNeXt(ATTO)), run.seed)
    folded = fold(network)
    images = torch.randn(2, 3, 128, 160, generator=generator(run.seed))
    with torch.no_grad():
        difference = relative_difference(folded(images), network(images))
        run.say("timing it folded and unfolded")
        times = time_by_turns({"unfolded": lambda: network(images), "folded": lambda: folded(images)}, run, seconds=5)
    return Finding(
        measured=(
            Measured("relative difference of the logits", exact(difference), "", at_most(1e-4)),
            Measured("norms left but for the head's", exact(count_norms(folded)), "", between(0, 0)),
            Measured("speed-up by folding alone", times_faster(times["unfolded"], times["folded"]), "x"),
        ),
    )


ATTO = InceptionNeXtConfig(
    depths=(2, 2, 6, 2), embed_dims=(40, 80, 160, 320), band_kernel_size=9, branch_ratio=0.25, layer_scale_init=1.0
)


def count_norms(network: nn.Module) -> int:
    """Batch norms in the network."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


SCHEDULE = Schedule(steps=240, batch_size=16, lr=8e-3)


def make_network(mixer: Callable[[int], nn.Module]) -> InceptionNeXt:
    """Two blocks at one resolution, with this mixer in both."""
    config = InceptionNeXtConfig(
        in_chans=SymbolNearby.planes,
        num_classes=SymbolNearby.symbols,
        patch_size=1,
        depths=(2,),
        embed_dims=(32,),
        mlp_ratios=(2,),
        layer_scale_init=None,
        out_indices=(0,),
    )
    return init_by_fan_in(replace_mixers(InceptionNeXt(config), mixer))


def replace_mixers(network: InceptionNeXt, mixer: Callable[[int], nn.Module]) -> InceptionNeXt:
    """The network with `mixer(width)` in each of its blocks, changed in place."""
    for block in network.modules():
        if isinstance(block, MetaNeXtBlock):
            block.register_module("mixer", mixer(block.mlp.fc1.in_channels))
    return network


def compare_mixers(run: Run) -> Finding:
    """Accuracy of each mixer by distance, over several seeds."""
    task = SymbolNearby()
    distances = range(1, task.reach + 1)

    def once(seed: int) -> dict[str, list[float]]:
        networks = {name: build(seed, partial(make_network, mixer)) for name, mixer in MIXERS.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(500, generator(seed + 500))
        return {
            name: [task.percent_right(network, unseen, of=unseen[3] == distance) for distance in distances]
            for name, network in networks.items()
        }

    seeds = run.repeat(5, once)
    overall = {name: [sum(one[name]) / len(one[name]) for one in seeds] for name in MIXERS}
    intervals = {name: t_interval(values) for name, values in overall.items()}

    def more(better: str, worse: str) -> list[float]:
        return [a - b for a, b in zip(overall[better], overall[worse], strict=True)]

    return Finding(
        measured=(
            Measured("accuracy of Inception", intervals["Inception"], "%"),
            Measured("Inception minus 7x7", t_interval(more("Inception", "7x7")), "points", at_least(-2)),
            Measured("Inception minus 3x3", t_interval(more("Inception", "3x3")), "points", at_least(10, 0)),
            Measured("3x3 minus identity", t_interval(more("3x3", "identity")), "points", at_least(10, 0)),
        ),
        charts=(
            Lines(
                "Accuracy by distance of the symbol",
                "cells away",
                "% right (chance: 10)",
                list(distances),
                {
                    name: [sum(values) / len(seeds) for values in zip(*(one[name] for one in seeds), strict=True)]
                    for name in MIXERS
                },
                y_range=(0, 105),
            ),
            Bars(
                "Accuracy over all distances",
                "% right",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=overall,
                x_range=(0, 105),
            ),
        ),
    )


CLAIM = Claim(
    statement="A large depthwise kernel can be split into an untouched part, a small square and two bands: the "
    "context of the large kernel at the cost of a small one.",
    source="Yu et al. 2023, abstract",
    published=(
        Published("ImageNet-1K top-1, tiny, against ConvNeXt-T", "82.3 against 82.1 %", "model zoo"),
        Published("training images/s on an A100, float32: the same", "901 against 575 (1.6x)", "model zoo"),
        Published("the same for ConvNeXt-T with 3x3 kernels", "81.5 %, 798 images/s", "model zoo"),
    ),
    design="The mixer is compared with one dense 11x11 kernel that it must equal, and its receptive field is drawn; "
    "MACs are counted, and three mixers timed alone and in a training step, in both memory formats; a network is "
    "folded; and four otherwise equal networks (two blocks of width 32 at one resolution, so that nothing but the "
    f"mixer widens the view) learn, over {SCHEDULE.steps} equal steps, to name the symbol that stands 1 to 4 "
    "cells from a dot.",
    limits="The task needs context and nothing else: 3x3 and identity fail where they cannot see. It shows whether "
    "bands on an eighth of the channels each can carry what a 7x7 on all of them carries, not how much natural images "
    "need it. The paper's throughput was measured on a GPU; times here are a CPU's.",
    cautions=(
        "What a depthwise kernel costs depends on memory format and library; measure on the machine that matters.",
        "Accuracies after so few steps compare how readily the mixers learn, not where they would end.",
    ),
    budget_s=170,
    parts=(
        Part(
            "Identities",
            "The four branches against one dense 11x11 kernel, and the positions that have a say in one output.",
            check_identities,
            seconds=2,
        ),
        Part(
            "Cost of the mixer",
            "Inception, 7x7 and 3x3 depthwise mixers, 8 maps of 96x56x56: MACs counted, times interleaved, one thread.",
            measure_cost,
            seconds=16,
        ),
        Part(
            "Folding",
            "A network of atto's size (layer scales of 1, all weights random) with its batch norms and scales folded.",
            check_folding,
            seconds=7,
        ),
        Part(
            "Time of a training step",
            "Forward and backward of a network of atto's depth and width with Inception, 7x7 and 3x3 mixers, 4 images "
            "of 160 pixels, one thread, interleaved.",
            time_training,
            seconds=18,
        ),
        Part(
            "Context",
            "Accuracy on 500 new pictures after equal training with identity, 3x3, 7x7 and Inception mixers; five "
            "seeds, differences taken within a seed.",
            compare_mixers,
            seconds=70,
        ),
    ),
)
