"""UniRepLKNet in miniature: large kernels that see far, small dilated branches that train them and then disappear.

The merge of the branches is an identity and is held to it. The experiment asks at dots for a symbol that stands 1 to 6
cells away, in any direction, which is as far as one 13x13 kernel reaches; networks with 13x13 kernels and branches,
with the same kernels alone and with 3x3 kernels learn it side by side. A second one tells clothes apart, with branches
and without from the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.intervals import Interval, bootstrap, exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.symbols import SymbolNearby
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.layers.dilated_reparam import DilatedReparam
from gatewise.networks.image.unireplknet import BRANCHES, Downsample, Kernels, UniRepLKNet, UniRepLKNetConfig

MAPS = ((14, 14), (7, 5), (1, 3))
"""Sizes that merges are checked on; all but the first are smaller than most kernels."""

SMALL = UniRepLKNetConfig(
    depths=(1, 1, 3, 1),
    embed_dims=(16, 32, 64, 128),
    kernel_sizes=((3,), (13,), (13, 3, 13), (13,)),
    layer_scale_init=None,
    num_classes=10,
)
"""The small network of the identities and of the field of view."""


def merge_error(kernel_size: int, dtype: torch.dtype, seed: int) -> float:
    """Largest relative difference between a block of this kernel size and its merged form, over all `MAPS`."""
    block = randomise(build(seed, lambda: DilatedReparam(16, kernel_size, BRANCHES)), seed).to(dtype)
    merged = block.merged()
    errors = []
    for size in MAPS:
        x = torch.randn(2, 16, *size, generator=generator(seed)).to(dtype)
        with torch.no_grad():
            errors.append(relative_difference(merged(x), block(x)))
    return max(errors)


def drop_branches(network: UniRepLKNet) -> UniRepLKNet:
    """A copy whose large kernels are trained alone; all other weights are the same."""
    new = deepcopy(network)
    for module in new.modules():
        if isinstance(module, DilatedReparam):
            module.branches = nn.ModuleDict()
    return new


def check_merging(run: Run) -> Finding:
    """Blocks of all kernel sizes and a whole network against their merged forms; what is left of the branches."""
    single = {size: merge_error(size, torch.float32, run.seed) for size in BRANCHES}
    double = max(merge_error(size, torch.float64, run.seed) for size in BRANCHES)
    network = randomise(build(run.seed, lambda: UniRepLKNet(SMALL)), run.seed)
    merged, plain = network.merged(), drop_branches(network).merged()
    images = torch.randn(2, 3, 96, 75, generator=generator(run.seed))
    with torch.no_grad():
        whole = relative_difference(merged(images), network(images))
    costs = [count(one, images) for one in (merged, plain)]
    return Finding(
        measured=(
            Measured("difference by merging a block, float32", exact(max(single.values())), "", at_most(1e-5)),
            Measured("the same in float64", exact(double), "", at_most(1e-10)),
            Measured("difference of the logits by merging a network", exact(whole), "", at_most(1e-4)),
            Measured(
                "parameters that branches leave in the merged network",
                exact(costs[0].parameters - costs[1].parameters),
                "",
                between(0, 0),
            ),
            Measured("MACs that they leave in it", exact(costs[0].macs - costs[1].macs), "", between(0, 0)),
        ),
        charts=(
            Bars(
                "Difference by merging, float32",
                "relative to the largest output",
                {f"{size}x{size}": (error,) * 3 for size, error in single.items()},
                limit=1e-5,
                limit_label="equal up to rounding",
                log=True,
                x_range=(1e-9, 1e-3),
            ),
        ),
    )


LAYERS = {"160 channels, 28x28": (160, 28), "320 channels, 14x14": (320, 14)}
"""13x13 layers of stages 2 and 3 of tiny at 224 pixels."""

SIZE_A = UniRepLKNetConfig(depths=(2, 2, 6, 2), embed_dims=(40, 80, 160, 320), layer_scale_init=1.0)


def time_merging(run: Run) -> Finding:
    """One-thread time of layers and of a network with branches and merged, and what branches cost in training."""
    draw = generator(run.seed)
    network = randomise(build(run.seed, lambda: UniRepLKNet(SIZE_A)), run.seed)
    cases: dict[str, tuple[DilatedReparam | UniRepLKNet, Tensor, float]] = {
        name: (
            randomise(build(run.seed, partial(DilatedReparam, dim, 13, BRANCHES)), run.seed),
            torch.randn(8, dim, side, side, generator=draw),
            1.5,
        )
        for name, (dim, side) in LAYERS.items()
    }
    cases["network of size A"] = network, torch.randn(2, 3, 224, 224, generator=draw), 1
    measured: list[Measured] = []
    bars: dict[str, tuple[float, float, float]] = {}
    for name, (module, x, least) in cases.items():
        run.say(f"timing with branches and merged, {name}")
        with torch.no_grad():
            times = time_by_turns({"with branches": partial(module, x), "merged": partial(module.merged(), x)}, run, 6)
        ratio = times_faster(times["with branches"], times["merged"])
        measured.append(Measured(f"speed-up by merging, {name}", ratio, "x", at_least(least, contrary_below=1)))
        bars |= {f"{name}: {form}": (median_ms(samples),) * 3 for form, samples in times.items()}
    run.say("timing a training step with and without branches")
    images = torch.randn(4, 3, 128, 128, generator=draw)
    forms = {"with": network, "without": drop_branches(network)}
    times = time_by_turns({name: partial(run_backward, one.train(), images) for name, one in forms.items()}, run, 8)
    step = times_faster(times["with"], times["without"])
    return Finding(
        measured=(*measured, Measured("time of a training step, with branches over without", step, "x")),
        charts=(Bars("With branches and merged", "ms, one thread", bars),),
        remark="Branches cost nothing in use; the training that they help is what pays for them.",
    )


def run_backward(network: nn.Module, images: Tensor) -> None:
    """Forward and backward, without an optimizer."""
    network(images).sum().backward()


SIDE = 512
"""Pixels of the images in which the field of view is measured."""


def with_kernels(large: int) -> UniRepLKNetConfig:
    """The small network's configuration with kernels of another size in the place of its 13x13 ones."""
    sizes: Kernels = tuple(tuple(large if size == 13 else size for size in stage) for stage in SMALL.kernels)
    return replace(SMALL, kernel_sizes=sizes)


def energy_by_pixel(network: UniRepLKNet, images: Tensor) -> Tensor:
    """How much each pixel moves the middle of the last map: squared gradients, (H, W), summing to 1."""
    images = images.clone().requires_grad_()
    features = network.forward_features(images)
    middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle.sum(), images)
    energy = gradient.square().sum(dim=(0, 1))
    return energy / energy.sum()


def half_energy_area(energy: Tensor) -> int:
    """The fewest pixels that hold half of the energy."""
    sums = energy.flatten().sort(descending=True).values.cumsum(0)
    return int((sums < 0.5).sum()) + 1


def compare_fields(run: Run) -> Finding:
    """The area that holds half of what moves one output, with 13x13 and with 3x3 kernels, over random networks."""
    pictures: dict[str, list[list[float]]] = {}

    def once(seed: int) -> dict[str, int]:
        run.check_time()
        images = torch.randn(1, 3, SIDE, SIDE, generator=generator(seed))
        areas = {}
        for large in (13, 3):
            network = init_by_fan_in(build(seed, partial(UniRepLKNet, with_kernels(large)))).eval()
            energy = energy_by_pixel(network, images)
            areas[f"{large}x{large}"] = half_energy_area(energy)
            pictures.setdefault(f"{large}x{large}", nn.functional.avg_pool2d(energy[None], 16)[0].sqrt().tolist())
        return areas

    areas = run.repeat(6, once)
    ratios = [area["13x13"] / area["3x3"] for area in areas]
    return Finding(
        measured=(
            *(
                Measured(f"pixels with half of the energy, {name}", t_interval([area[name] for area in areas]))
                for name in areas[0]
            ),
            Measured("13x13 over 3x3", bootstrap(ratios, of="networks"), "x", at_least(3, contrary_below=1)),
        ),
        charts=(Pictures("What moves one output", pictures),),
    )


class SymbolFurther(SymbolNearby):
    """The same with symbols 1 to 6 cells away: pictures of 28x28 cells, a neighborhood of 13x13 for each dot."""

    reach = 6
    width = 2 * reach + 1
    side = SymbolNearby.across * width + SymbolNearby.shift


SCHEDULE = Schedule(steps=100, batch_size=16, lr=8e-3)
BRANCHED, ALONE, THREE = "13x13 with branches", "13x13 alone", "3x3"


def make_network(kernel_size: int) -> UniRepLKNet:
    """One block that looks at symbols: the stem only maps planes to channels."""
    config = UniRepLKNetConfig(
        in_chans=SymbolFurther.planes,
        num_classes=SymbolFurther.symbols,
        depths=(1,),
        embed_dims=(32,),
        kernel_sizes=((kernel_size,),),
        mlp_ratio=2,
        layer_scale_init=None,
        out_indices=(0,),
    )
    network = UniRepLKNet(config)
    network.register_module("stem", nn.Conv2d(SymbolFurther.planes, 32, 1))
    return init_by_fan_in(network)


def make_networks(seed: int) -> dict[str, UniRepLKNet]:
    """The networks that learn of symbols; those with large kernels start from the same weights."""
    branched = build(seed, partial(make_network, 13))
    return {BRANCHED: branched, ALONE: drop_branches(branched), THREE: build(seed, partial(make_network, 3))}


def compare_reach(run: Run) -> Finding:
    """Accuracy on new pictures, merged, by distance of the symbol, over seeds."""
    task = SymbolFurther()
    distances = range(1, task.reach + 1)

    def once(seed: int) -> dict[str, list[float]]:
        networks = make_networks(seed)
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(400, generator(seed + 500))
        return {
            name: [task.percent_right(network.merged(), unseen, of=unseen[3] == distance) for distance in distances]
            for name, network in networks.items()
        }

    seeds = run.repeat(3, once)
    overall = {name: [sum(one[name]) / len(distances) for one in seeds] for name in seeds[0]}
    by_distance = {
        name: [sum(values) / len(seeds) for values in zip(*(one[name] for one in seeds), strict=True)]
        for name in overall
    }
    return Finding(
        measured=(
            Measured(
                f"accuracy, {BRANCHED} minus {THREE}",
                difference(overall, BRANCHED, THREE),
                "points",
                at_least(10, contrary_below=0),
            ),
            Measured(f"accuracy, {BRANCHED} minus {ALONE}", difference(overall, BRANCHED, ALONE), "points"),
        ),
        charts=(
            Lines(
                "Accuracy by distance of the symbol",
                "cells away",
                "% right (chance: 10)",
                list(distances),
                by_distance,
                y_range=(0, 105),
            ),
        ),
        remark="The task is one symbol, mostly far off: branches, which see what is near, slow these first steps down.",
    )


def difference(figures: Mapping[str, Sequence[float]], more: str, less: str) -> Interval:
    """Of two networks, within each seed."""
    return t_interval([a - b for a, b in zip(figures[more], figures[less], strict=True)])


CLOTHES_SCHEDULE = Schedule(steps=150, batch_size=32, lr=4e-3)


def make_classifier() -> UniRepLKNet:
    """A block with a 13x13 kernel on maps of 14x14 and one on 7x7, as in the last two of the published stages."""
    config = UniRepLKNetConfig(
        in_chans=1,
        num_classes=Clothes.classes,
        depths=(1, 1),
        embed_dims=(32, 64),
        kernel_sizes=((13,), (13,)),
        mlp_ratio=2,
        layer_scale_init=None,
        out_indices=(1,),
    )
    network = UniRepLKNet(config)
    network.register_module("stem", Downsample(1, 32))
    return init_by_fan_in(network)


def compare_training(run: Run) -> Finding:
    """Loss at the end of training and test accuracy, merged, with and without branches, over seeds."""
    task = Clothes()

    def once(seed: int) -> dict[str, tuple[float, float]]:
        branched = build(seed, make_classifier)
        networks = {BRANCHED: branched, ALONE: drop_branches(branched)}
        losses = train_side_by_side(networks, task, CLOTHES_SCHEDULE, seed=seed, run=run)
        return {name: (losses[name], task.percent_right(network.merged())) for name, network in networks.items()}

    seeds = run.repeat(6, once)
    losses = {name: [one[name][0] for one in seeds] for name in seeds[0]}
    accuracies = {name: [one[name][1] for one in seeds] for name in seeds[0]}
    intervals = {name: t_interval(values) for name, values in accuracies.items()}
    return Finding(
        measured=(
            *(Measured(f"test accuracy, {name}", interval, "%") for name, interval in intervals.items()),
            Measured("test accuracy, with branches minus alone", difference(accuracies, BRANCHED, ALONE), "points"),
            Measured(
                "loss at the end of training, alone minus with branches",
                difference(losses, ALONE, BRANCHED),
                "nats",
                at_least(0),
            ),
        ),
        charts=(
            Bars(
                "Clothes told apart, merged networks",
                "% right",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=accuracies,
            ),
        ),
        remark="What branches are worth is small beside what a seed changes, at this size more than at the published.",
    )


CLAIM = Claim(
    statement="Few but very large kernels give a convolutional network a wide field of view; small dilated branches "
    "beside them help to train them, and merge into them exactly, so that they cost nothing in use.",
    source="Ding et al. 2024 (arXiv:2410.08049) and 2023 (arXiv:2311.15599), abstracts",
    published=(
        Published("ImageNet-1K top-1 at 224: A, T, S", "77.0, 83.2, 83.9 %", "model zoo"),
        Published("COCO box AP, Cascade Mask R-CNN: T, S", "51.7, 53.0", "model zoo"),
    ),
    design="Blocks of all kernel sizes and a network are compared with their merged forms, in float32 and float64; a "
    "13x13 layer is timed with its branches, merged and in training, and a network with them and merged; the area that "
    "holds half of what moves one output is measured with 13x13 and with 3x3 kernels in otherwise equal random "
    f"networks; one block learns, over {SCHEDULE.steps} steps, to name the symbol that stands 1 to 6 cells from a dot; "
    f"and two blocks learn to tell clothes apart over {CLOTHES_SCHEDULE.steps} steps, with branches and without from "
    "the same weights.",
    limits="The merge and its gain in speed are shown as they are. That branches help is a small effect; seconds of "
    "training can show it in the loss at best. The field of view is that of random networks.",
    cautions=(
        "Merging is for inference: in training each branch's norm follows the batch, and nothing can be merged.",
        "Branches make training slower, not faster; measure the step before choosing them.",
        "A network's speed-up by merging is smaller than a layer's: most of its time goes to other parts.",
        "Squeeze-excitation and response normalization see the whole map: padding images in a batch changes results.",
    ),
    budget_s=175,
    parts=(
        Part(
            "Merging",
            "Blocks of seven kernel sizes, on maps larger and smaller than the kernel, and a network with random "
            "weights and statistics against their merged forms.",
            check_merging,
            seconds=3,
        ),
        Part(
            "Speed",
            "A 13x13 layer on 8 maps of two published stages, and size A on 2 images of 224 pixels, with branches and "
            "merged, interleaved on one thread; a training step of size A on 4 images of 128 pixels as well.",
            time_merging,
            seconds=29,
        ),
        Part(
            "Field of view",
            f"Squared gradients of the middle of the last map for images of {SIDE} pixels; the fewest pixels that hold "
            "half of their sum; six random networks.",
            compare_fields,
            seconds=4,
        ),
        Part(
            "Reach",
            "Accuracy on 400 new pictures after equal training with 13x13 kernels and branches, 13x13 alone and 3x3; "
            "three seeds, differences taken within a seed.",
            compare_reach,
            seconds=50,
        ),
        Part(
            "Branches in training",
            "Loss of the last tenth of equal training from the same weights with branches and without, and accuracy on "
            "2,000 test pictures of clothes; six seeds, differences taken within a seed.",
            compare_training,
            seconds=75,
        ),
    ),
)
