"""OverLoCK in miniature: kernels made from the whole map, and a closer look that is guided by an overview.

Context mixing is an operator with identities, and is held to them; so is the merged form of a network. Its speed and
what it keeps for training are compared with the two ways in which one would write it: all windows at once, or one
offset after the other. The experiment asks for one of two signs, and how many dots there are in all of the
picture says for which; a network with its overview's guidance and one without learn it side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.networks.image.overlock import AUXILIARY_WEIGHT, OverLoCK, OverLoCKConfig
from gatewise.ops.context_mixing import context_mixing, context_mixing_reference, relative_bias, split_taps

Maps = Float[Tensor, "batch channels height width"]
Arguments = tuple[Tensor, ...]
SMALL_WINDOW, REGIONS = 5, 49


def arguments(seed: int, side: int, window: int = 13, heads: int = 8, batch: int = 1) -> Arguments:
    """Random arguments of context mixing, in the widths of the smallest size's third stage."""
    draw, dim, taps = generator(seed), 16, SMALL_WINDOW**2 + window**2
    return (
        torch.randn(batch, heads * dim, side, side, generator=draw) / dim**0.5,
        torch.randn(batch, heads * dim, REGIONS, generator=draw),
        0.1 * torch.randn(taps, REGIONS, generator=draw),
        0.1 * torch.randn(taps, generator=draw),
        0.1 * torch.randn(heads, *[2 * SMALL_WINDOW - 1] * 2, generator=draw),
        0.1 * torch.randn(heads, *[2 * window - 1] * 2, generator=draw),
        torch.randn(batch, 2 * heads * dim, side, side, generator=draw),
    )


def mix_by_unfolding(
    query: Tensor, centers: Tensor, weight: Tensor, bias: Tensor, small: Tensor, large: Tensor, value: Tensor
) -> Maps:
    """Context mixing as the authors' version without a library for it computes it: all windows of the values at once.

    Windows that fit into the map are cut out, and the outermost repeated for the positions beyond.
    """
    heads, (height, width) = small.shape[0], value.shape[2:]
    affinity = torch.einsum("bhcij,bhcl->bhijl", query.unflatten(1, (heads, -1)), centers.unflatten(1, (heads, -1)))
    logits = affinity @ weight.T + bias
    halves = []
    for table, part, v in zip((small, large), split_taps(logits, small), value.chunk(2, dim=1), strict=True):
        size = (table.shape[1] + 1) // 2
        kernels = (part + relative_bias(table, height, width)).softmax(-1)
        fitting = F.unfold(v, size).unflatten(2, (height - size + 1, width - size + 1))
        windows = F.pad(fitting, [size // 2] * 4, mode="replicate").unflatten(1, (heads, -1, size**2))
        halves.append(torch.einsum("bhijt,bhctij->bhcij", kernels, windows).flatten(1, 2))
    return torch.cat(halves, dim=1)


FORMS: dict[str, Callable[..., Tensor]] = {
    "here": context_mixing,
    "windows at once": mix_by_unfolding,
    "offset by offset": context_mixing_reference,
}


def uniform_error(seed: int) -> float:
    """With kernels that make no difference, the operator is a mean over windows; how far it is from that."""
    query, centers, *others, value = arguments(seed, 20)
    weight, bias, small, large = (torch.zeros_like(x) for x in others)
    y = context_mixing(query, centers, weight, bias, small, large, value)
    means = [
        F.pad(F.avg_pool2d(half, size, stride=1), [size // 2] * 4, mode="replicate")
        for half, size in zip(value.chunk(2, dim=1), (SMALL_WINDOW, 13), strict=True)
    ]
    return relative_difference(y, torch.cat(means, dim=1))


def reach_through_kernels(seed: int, side: int = 40) -> float:
    """The share of positions, of those beyond the window, that move the output at the middle of the map.

    Centers are means of the map over 7x7 regions, so that a far position has a say in the kernels and in nothing else.
    """
    query, _, *rest = arguments(seed, side)
    key = torch.randn(1, query.shape[1], side, side, generator=generator(seed + 1)).requires_grad_()
    y = context_mixing(query, F.adaptive_avg_pool2d(key, 7).flatten(2), *rest)
    (gradient,) = torch.autograd.grad(y[0, :, side // 2, side // 2].square().sum(), key)
    moved = gradient[0].abs().sum(dim=0) > 0
    moved[side // 2 - 6 : side // 2 + 7, side // 2 - 6 : side // 2 + 7] = False
    return moved.sum().item() / (side**2 - 13**2)


SMALL = OverLoCKConfig(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 1),
    embed_dims=(16, 32, 64, 96),
    focus_num_heads=(2, 3),
    projection_dim=64,
    num_classes=10,
)
"""The small network of the identities, with the published kernels."""


def check_identities(run: Run) -> Finding:
    """The operator against two other readings of its definition, its special case and its reach; a merged network."""
    given = arguments(run.seed, 17)
    y = context_mixing(*given)
    network = randomise(build(run.seed, lambda: OverLoCK(SMALL)), run.seed)
    images = torch.randn(1, 3, 96, 75, generator=generator(run.seed))
    with torch.no_grad():
        merged = relative_difference(network.merged()(images), network(images))
    figures = {
        "difference from all windows at once": relative_difference(mix_by_unfolding(*given), y),
        "difference from offset by offset": relative_difference(context_mixing_reference(*given), y),
        "difference of equal kernels from a mean over windows": uniform_error(run.seed),
    }
    reach = Measured(
        "positions beyond the window that move an output",
        exact(100 * reach_through_kernels(run.seed)),
        "%",
        at_least(100),
    )
    return Finding(
        measured=(
            *(Measured(what, exact(error), "", at_most(1e-5)) for what, error in figures.items()),
            reach,
            Measured("difference of the logits by merging a network", exact(merged), "", at_most(1e-4)),
        ),
        remark="Far positions are seen through the kernels alone. A block has other paths over the whole map as well, "
        "squeeze-excitation and response normalization, which is why reach is measured at the operator.",
    )


def kept_megabytes(mix: Callable[..., Tensor], given: Arguments) -> float:
    """Return the memory in MB that is kept for the backward pass. Storage shared by several tensors counts once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # What is kept must stay alive until all is counted, or its place in memory would be used again.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mix(*(tensor.clone().requires_grad_() for tensor in given))
    del y
    return sum(kept.values()) / 1e6


SIDES = (14, 28, 56)
"""Maps of the third stage for images of 224, 448 and 896 pixels."""


def compare_costs(run: Run) -> Finding:
    """Memory that training keeps and one-thread time of the operator's three forms."""
    measured: list[Measured] = []
    bars: dict[str, tuple[float, float, float]] = {}
    for side in SIDES:
        given = arguments(run.seed, side)
        kept = {name: kept_megabytes(mix, given) for name, mix in FORMS.items()}
        run.say(f"timing three forms on maps of {side}x{side}")
        steps = {name: partial(run_backward, mix, given) for name, mix in FORMS.items()}
        times = time_by_turns(steps, run, seconds=3 + side / 8)
        for name in ("windows at once", "offset by offset"):
            memory = exact(kept[name] / kept["here"])
            time = times_faster(times[name], times["here"])
            where = f"{name} over here, {side}x{side}"
            measured += [
                Measured(f"memory kept for training, {where}", memory, "x", at_least(5)),
                Measured(f"time of forward and backward, {where}", time, "x", at_least(1.5, contrary_below=1)),
            ]
        bars |= {f"{side}x{side}: {name}": (median_ms(samples),) * 3 for name, samples in times.items()}
    return Finding(
        measured=tuple(measured),
        charts=(Bars("Forward and backward, 8 heads, windows of 5 and 13", "ms, one thread", bars, log=True),),
    )


def run_backward(mix: Callable[..., Tensor], given: Arguments) -> None:
    """Forward and backward of the operator."""
    mix(*(tensor.detach().requires_grad_() for tensor in given)).sum().backward()


class SignsByDots:
    """Two signs somewhere in a picture of planes; how many dots there are in all of it says which one counts.

    Pictures (B, 9, 12, 12): one sign in the first four planes, one in the next four, and dots in the last, on 35 or 15
    cells in a hundred, which no part of the picture tells for sure. The answer is the plane of the first sign where
    dots are many, and that of the second where they are few: without the dots, 62.5 % are right at best.
    """

    classes, planes, side = 4, 9, 12
    few, many = 0.15, 0.35

    def batch(self, size: int, draw: torch.Generator) -> Batch:
        """Pictures (B, planes, side, side) and answers (B,)."""
        signs = torch.randint(self.classes, (size, 2), generator=draw)
        is_dense = torch.randint(2, (size,), generator=draw)
        pictures = torch.zeros(size, self.planes, self.side**2)
        cells = torch.randint(self.side**2, (size, 2), generator=draw)
        sample = torch.arange(size)[:, None]
        pictures[sample, signs + torch.tensor([0, self.classes]), cells] = 4
        density = self.few + (self.many - self.few) * is_dense[:, None]
        pictures[:, -1] = (torch.rand(size, self.side**2, generator=draw) < density).float()
        images = pictures.unflatten(2, (self.side, self.side)).contiguous(memory_format=torch.channels_last)
        return images, signs.gather(1, 1 - is_dense[:, None])[:, 0]

    def loss(self, model: OverLoCK, batch: Batch) -> Tensor:
        """As published: the main classifier's, and 0.4 of the overview's."""
        pictures, answers = batch
        logits = model.forward_with_auxiliary(pictures)
        return F.cross_entropy(logits["main"], answers) + AUXILIARY_WEIGHT * F.cross_entropy(logits["aux"], answers)

    @torch.no_grad()
    def percent_right(self, model: OverLoCK, batch: Batch) -> float:
        """Of the pictures in a batch."""
        return 100 * (model(batch[0]).argmax(1) == batch[1]).float().mean().item()


class NoOverview(nn.Module):
    """Zeros in the place of what the Focus-Net is told: (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, overview: Maps) -> Float[Tensor, "batch dim height width"]:
        return overview.new_zeros(overview.shape[0], self.dim, *overview.shape[2:])


LEARNER = OverLoCKConfig(
    in_chans=SignsByDots.planes,
    num_classes=SignsByDots.classes,
    depths=(1, 1, 1, 1),
    focus_depths=(1, 1),
    embed_dims=(16, 16, 32, 32),
    kernel_sizes=(5, 5, 5, 5),
    small_kernel_size=3,
    mlp_ratios=(2, 2, 2, 2),
    focus_mlp_ratios=(2, 2),
    focus_num_heads=(2, 2),
    projection_dim=64,
    deploy=True,
)
"""Networks that learn: large kernels without branches, for the time they take."""

GUIDED, UNGUIDED = "guided by the overview", "without guidance"
SCHEDULE = Schedule(steps=200, batch_size=32, lr=4e-3)


def make_networks(seed: int) -> dict[str, OverLoCK]:
    """Both networks from the same weights; the stem keeps the resolution, since pictures are small."""

    def make() -> OverLoCK:
        network = OverLoCK(LEARNER)
        network.register_module("stem", nn.Conv2d(SignsByDots.planes, LEARNER.embed_dims[0], 1))
        network.min_size = SignsByDots.side
        return init_by_fan_in(network)

    networks = {name: build(seed, make) for name in (GUIDED, UNGUIDED)}
    networks[UNGUIDED].register_module("context", NoOverview(LEARNER.context_dim))
    return networks


def compare_guidance(run: Run) -> Finding:
    """Accuracy on new pictures with guidance and without, over seeds."""
    task = SignsByDots()

    def once(seed: int) -> dict[str, float]:
        networks = make_networks(seed)
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(1000, generator(seed + 500))
        return {name: task.percent_right(network, unseen) for name, network in networks.items()}

    seeds = run.repeat(5, once)
    accuracies = {name: [one[name] for one in seeds] for name in seeds[0]}
    intervals = {name: t_interval(values) for name, values in accuracies.items()}
    gains = [a - b for a, b in zip(accuracies[GUIDED], accuracies[UNGUIDED], strict=True)]
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", interval, "%") for name, interval in intervals.items()),
            Measured("guided minus unguided", t_interval(gains), "points", at_least(2, contrary_below=0)),
        ),
        charts=(
            Bars(
                "Signs that dots choose between",
                "% right (chance: 25)",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=accuracies,
            ),
        ),
        remark="The unguided network is not blind to the dots: squeeze-excitation and the regions behind its kernels "
        "see the whole map too.",
    )


CLAIM = Claim(
    statement="A network that first takes a light look at the whole image and lets it guide a closer one, through its "
    "features and through convolution kernels that every position makes from the whole map, is more accurate than "
    "convolutional networks of several times its cost.",
    source="Lou and Yu 2025 (arXiv:2502.20087), abstract",
    published=(
        Published("ImageNet-1K top-1 at 224: XT, T, S, B", "82.7, 84.2, 84.8, 85.1 %", "model zoo"),
        Published("FLOPs and parameters of T, which beats ConvNeXt-B", "about a third", "abstract"),
        Published("COCO box AP, Mask R-CNN 1x: T, S, B", "48.3, 49.4, 49.9", "model zoo"),
        Published("ADE20K mIoU, UPerNet: T, S, B", "50.3, 51.3, 51.7 %", "model zoo"),
    ),
    design="Context mixing is compared with two other readings of its definition, with the mean over windows that "
    "equal kernels make of it, and by what moves an output; a network with its merged form. What the operator keeps "
    "for training and the time that it takes are compared with those of all windows of the values at once and of one "
    f"offset after the other. Two small networks from the same weights learn, over {SCHEDULE.steps} steps, which of "
    "two signs counts in a picture, where dots all over it say so: one is told by its overview, the other is told "
    "zeros in its place; both train the overview by its own classifier as well.",
    limits="The operator's identities, memory and time are shown as they are, on a CPU. Guidance can show in how early "
    "a network uses a global cue, no more: given more steps the unguided one learns to use it as well, and how early "
    "either does varies much between seeds. What it brings on ImageNet cannot be shown in minutes.",
    cautions=(
        "The library that the published code calls for context mixing has dropped the functions it needs (natten, from "
        "0.20 on). Nothing here depends on it.",
        "Training with automatic mixed precision has been reported to end in NaN; softmax and norms are in float32 "
        "here, but logits have no bound. Resume such a run with trainer.precision 32.",
        "Weight decay, as published, pulls the scales of identities towards 0; decay_scales=False leaves them out.",
        "Maps smaller than a window are enlarged to it: below 208 pixels the published sizes get no cheaper in their "
        "third stage, and below 224 in their fourth.",
        "Squeeze-excitation and response normalization see the whole map: padding images in a batch changes results.",
    ),
    budget_s=170,
    parts=(
        Part(
            "Identities",
            "The operator in the widths of a published stage against all windows at once, offsets one by one and "
            "average pooling; gradients at the middle of a map of 40x40 for every other position; a network with the "
            "published kernels against its merged form.",
            check_identities,
            seconds=5,
        ),
        Part(
            "Cost",
            "Storage that autograd keeps, and interleaved forward and backward times on one thread, for maps of 14x14, "
            "28x28 and 56x56.",
            compare_costs,
            seconds=35,
        ),
        Part(
            "Guidance",
            "Accuracy on 1,000 new pictures after equal training with the overview's guidance and without; five seeds, "
            "differences taken within a seed.",
            compare_guidance,
            seconds=120,
        ),
    ),
)
