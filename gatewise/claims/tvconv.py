"""TVConv in miniature: kernels that differ from place to place, at the cost of one kernel for all places.

Three questions. Are kernels that are made once and kept equal to those made in every call, and as cheap as a depthwise
convolution's? Can they learn a filter that depends on the place, which one kernel for all places cannot? And does it
help where the layout of images is fixed and what counts is where something stands?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gatewise.catalog.registry import family_of
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.comparison import compare_accuracy
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.layers.tvconv import TVConv, TVConvOptions
from gatewise.ops.translation_variant_conv import translation_variant_conv

SETTINGS = ((3, 1, False), (3, 2, False), (3, 2, True), (5, 1, True), (5, 2, False))
"""Kernel size, stride and bias of the operators whose forms are compared."""

NETWORK = "tvconv_mobilenet_v2_x0_1"


def fixed_form_error(kernel_size: int, stride: int, bias: bool, seed: int) -> float:
    """Largest relative difference between a TVConv that makes its kernels and the same with fixed ones."""
    options = TVConvOptions(kernel_size=kernel_size, hidden=16, hidden_layers=1, bias=bias)
    operator = randomise(build(seed, lambda: TVConv(6, (11, 8), stride, options)), seed)
    x = torch.randn(2, 6, 11 * stride, 8 * stride, generator=generator(seed))
    return relative_difference(operator.merged()(x), operator(x))


def shared_kernel_error(seed: int) -> float:
    """Largest relative difference from a depthwise convolution where all places have one kernel."""
    draw = generator(seed)
    x, kernel = torch.randn(2, 6, 11, 8, generator=draw), torch.randn(6, 3, 3, generator=draw)
    everywhere = kernel[..., None, None].expand(-1, -1, -1, 11, 8)
    return relative_difference(
        translation_variant_conv(x, everywhere), F.conv2d(x, kernel[:, None], padding=1, groups=6)
    )


def operators(network: nn.Module) -> list[TVConv]:
    """All TVConvs of a network."""
    return [module for module in network.modules() if isinstance(module, TVConv)]


def make_network(name: str, seed: int) -> nn.Module:
    """A registered network in eval mode, its parameters off their initial values."""
    family = family_of(name)
    return randomise(build(seed, lambda: family.network(family.variants[name].config)), seed)


def check_forms(run: Run) -> Finding:
    """Equality of the forms, and what is counted of them."""
    worst = max(fixed_form_error(*setting, run.seed) for setting in SETTINGS)
    shared = shared_kernel_error(run.seed)
    network, plain = make_network(NETWORK, run.seed), make_network(f"{NETWORK}_base", run.seed)
    images = torch.randn(1, 3, 96, 96, generator=generator(run.seed))
    calls: list[int] = []
    for operator in operators(network):
        operator.generator.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        network(images)
        network(images)
    makings = len(calls) / len(operators(network))
    kept, depthwise = count(network, images).macs, count(plain, images).macs
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for operator in operators(network):
            operator.kernels()
    making = counter.get_total_flops() // 2
    return Finding(
        measured=(
            Measured("fixed kernels against kernels made anew", exact(worst), "", at_most(1e-5)),
            Measured("one kernel everywhere against depthwise", exact(shared), "", at_most(1e-5)),
            Measured("makings of kernels in two calls", exact(makings), "", between(1, 1)),
            Measured("MACs an image over those of depthwise, width 0.1", exact(kept / depthwise), "x", between(1, 1)),
            Measured("making all kernels once, in images", exact(making / kept)),
        ),
        remark="The published conversion to fixed kernels steps one row down where it should step two, at stride 2; "
        "the forms here agree at both strides.",
    )


def time_forms(run: Run) -> Finding:
    """One-thread time of the network with kernels made in each call, with kept ones, and with plain convolutions."""
    network, plain = make_network(NETWORK, run.seed), make_network(f"{NETWORK}_base", run.seed)
    images = torch.randn(2, 3, 96, 96, generator=generator(run.seed))

    def making() -> None:
        for operator in operators(network):
            operator.uncache()
        network(images)

    run.say("timing three forms of the network")
    with torch.no_grad():
        calls = {"made in each call": making, "kept": lambda: network(images), "depthwise": lambda: plain(images)}
        times = time_by_turns(calls, run, seconds=20)
    milliseconds = {name: median_ms(samples) / len(images) for name, samples in times.items()}
    return Finding(
        measured=(
            Measured("kernels made in each call over kept ones", times_faster(*_pair(times, 0, 1)), "x", at_least(3)),
            Measured("kept kernels over depthwise", times_faster(*_pair(times, 1, 2)), "x"),
        ),
        charts=(Bars("Time of an image", "ms, one thread, batch 2", {k: (v,) * 3 for k, v in milliseconds.items()}),),
        remark="Kernels of all places are read where one was, nine numbers for each of the map's, once for a batch: "
        "what equal MACs cost in time depends on the machine, and comes closer as batches grow.",
    )


def _pair(times: dict[str, tuple[float, ...]], slow: int, fast: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    samples = list(times.values())
    return samples[slow], samples[fast]


SIDE, CHANNELS = 12, 8


def basis_maps() -> Float[Tensor, "maps height width"]:
    """1, x, y, x y, sin 3 x and sin 3 y over the map, with x and y from -1 to 1."""
    line = torch.linspace(-1, 1, SIDE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.ones_like(x), x, y, x * y, torch.sin(3 * x), torch.sin(3 * y)])


@dataclass(frozen=True)
class PlacedFilter:
    """White noise in; out, what a depthwise 3x3 filter makes of it whose kernel changes smoothly from place to place.

    Kernels are random combinations of `basis_maps`.
    """

    kernels: Float[Tensor, "channels 3 3 height width"]

    @classmethod
    def draw(cls, seed: int) -> PlacedFilter:
        """Random kernels."""
        combination = torch.randn(CHANNELS, 3, 3, 6, generator=generator(seed))
        return cls(torch.einsum("cuvm,mhw->cuvhw", combination, basis_maps()))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise and filtered noise."""
        x = torch.randn(size, CHANNELS, SIDE, SIDE, generator=generator)
        return x, translation_variant_conv(x, self.kernels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean squared error over the mean square of what is to be learnt: 1 - R^2."""
        x, y = batch
        return F.mse_loss(model(x), y) / y.square().mean()

    def r_squared(self, model: nn.Module) -> float:
        """The part of the variance that is explained, for 500 unseen inputs."""
        with torch.no_grad():
            return 1 - self.loss(model, self.batch(500, generator(1))).item()

    def bound(self) -> float:
        """The most that one kernel for all places can explain of white noise, borders aside."""
        shared = self.kernels.mean(dim=(3, 4)).square().sum()
        return (shared / self.kernels.square().sum(dim=(0, 1, 2)).mean()).item()


STUDENTS = {
    "TVConv, m 16, L 1": TVConvOptions(hidden=16, hidden_layers=1),
    "TVConv, m 64, L 3": TVConvOptions(hidden=64, hidden_layers=3),
}
FILTER_SCHEDULE = Schedule(steps=300, batch_size=64, lr=1e-2, weight_decay=0.0)


def make_student(options: TVConvOptions | None) -> nn.Module:
    """A depthwise convolution, or a TVConv with these options."""
    if options is None:
        return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)
    return TVConv(CHANNELS, (SIDE, SIDE), options=options)


def without_layout(student: TVConv, of: str) -> TVConv:
    """The same with each map whose name has `of` in it replaced by its mean over positions."""
    twin = TVConv(CHANNELS, (SIDE, SIDE), options=student.options).eval()
    twin.load_state_dict(student.state_dict())
    with torch.no_grad():
        for name, maps in twin.named_parameters():
            if of in name:
                maps.copy_(maps.mean(dim=(-2, -1), keepdim=True).expand_as(maps))
    return twin


def learn_filters(run: Run) -> Finding:
    """How much of a filter that depends on the place each operator learns, over several seeds."""
    drawn: dict[str, list[list[float]]] = {}

    def once(seed: int) -> dict[str, float]:
        task = PlacedFilter.draw(seed)
        students = {"depthwise": build(seed, partial(make_student, None))}
        students |= {name: build(seed, partial(make_student, options)) for name, options in STUDENTS.items()}
        train_side_by_side(students, task, FILTER_SCHEDULE, seed=seed, run=run)
        explained = {name: task.r_squared(student) for name, student in students.items()}
        explained["bound"] = task.bound()
        student = students["TVConv, m 16, L 1"]
        if not isinstance(student, TVConv):
            raise TypeError(f"expected a TVConv, not {type(student).__name__}")
        if not drawn:
            drawn.update(_pictures(task, student))
        explained["deviation of affinity"] = student.affinity.std(dim=(2, 3)).min().item()
        for of in ("affinity", "norm"):
            explained[f"without {of}"] = task.r_squared(without_layout(student, of))
        return explained

    seeds = run.repeat(3, once)
    found = {name: [one[name] for one in seeds] for name in seeds[0]}
    above = [a - b for a, b in zip(found["depthwise"], found["bound"], strict=True)]
    shown = ["depthwise", *STUDENTS]
    return Finding(
        measured=(
            Measured("R^2 of depthwise", t_interval(found["depthwise"]), ""),
            Measured("R^2 of depthwise above the bound for one kernel", t_interval(above), "", between(-0.05, 0.05)),
            *(Measured(f"R^2 of {name}", t_interval(found[name]), "", at_least(0.99)) for name in STUDENTS),
            Measured(
                "least deviation of an affinity map", t_interval(found["deviation of affinity"]), "", at_least(0.01)
            ),
            Measured("R^2, m 16, with flat affinity maps", t_interval(found["without affinity"])),
            Measured("R^2, m 16, with flat maps in the layer norms", t_interval(found["without norm"])),
        ),
        charts=(
            Bars(
                "A filter that depends on the place",
                "R^2 on unseen noise",
                {name: _bar(found[name]) for name in shown},
                points={name: found[name] for name in shown},
                limit=sum(found["bound"]) / len(seeds),
                limit_label="bound for one kernel",
                x_range=(0, 1.05),
            ),
            Pictures("One tap of the teacher, of the student, and an affinity map", drawn),
        ),
        remark="Affinity maps start as ones and learn, but the scales and shifts of the layer norms are maps too. The "
        "layout is held by those without which R^2 falls.",
    )


def _pictures(task: PlacedFilter, student: TVConv) -> dict[str, list[list[float]]]:
    learnt = student.kernels()[0].detach()
    maps = {"teacher": task.kernels[0, 1, 1], "student": learnt[0, 1, 1], "affinity": student.affinity.detach()[0, 0]}
    # Pictures begin at 0.
    return {name: (values - values.min()).tolist() for name, values in maps.items()}


def _bar(values: list[float]) -> tuple[float, float, float]:
    interval = t_interval(values)
    return interval.value, interval.low, interval.high


@dataclass(frozen=True)
class CentralStroke:
    """Short strokes of four kinds on a picture; the one in the middle is asked for, the others only distract."""

    side: int = 18
    middle: int = 6
    distractors: int = 5
    kinds: int = 4

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pictures (B, 1, side, side) and the kind of the stroke in the middle."""
        images = torch.zeros(size, self.side, self.side)
        labels = torch.randint(self.kinds, (size,), generator=generator)
        low = (self.side - self.middle) // 2
        center = low + 1 + torch.randint(self.middle - 2, (size, 2), generator=generator)
        self._draw(images, labels, center)
        for _ in range(self.distractors):
            kinds = torch.randint(self.kinds, (size,), generator=generator)
            self._draw(images, kinds, self._outside(size, generator))
        return images[:, None].clamp(max=1).contiguous(memory_format=torch.channels_last), labels

    def _outside(self, size: int, generator: torch.Generator) -> Tensor:
        """Places whose strokes do not reach into the middle: a margin, along one of the four sides."""
        margin = (self.side - self.middle) // 2 - 2
        near = 1 + torch.randint(margin, (size,), generator=generator)
        along = 1 + torch.randint(self.side - 2, (size,), generator=generator)
        opposite = torch.randint(2, (size,), generator=generator) == 1
        across = torch.where(opposite, self.side - 1 - near, near)
        swapped = torch.randint(2, (size, 1), generator=generator) == 1
        return torch.where(swapped, torch.stack([along, across], 1), torch.stack([across, along], 1))

    def _draw(self, images: Tensor, kinds: Tensor, places: Tensor) -> None:
        steps = torch.tensor([(0, 1), (1, 0), (1, 1), (1, -1)])[kinds]
        rows = torch.arange(len(images))
        for reach in (-1, 0, 1):
            points = places + reach * steps
            images[rows, points[:, 0], points[:, 1]] = 1

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def percent_right(self, model: nn.Module) -> float:
        """Of 2,000 unseen pictures."""
        images, labels = self.batch(2000, generator(1))
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


class StrokeNetwork(nn.Module):
    """A stem, two layers of a spatial operator and a 1x1 each, mean over positions, linear: (B, 1, H, W) -> (B, 4)."""

    def __init__(self, side: int, options: TVConvOptions | None, dim: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        for _ in range(2):
            spatial = (
                nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
                if options is None
                else TVConv(dim, (side, side), options=options)
            )
            layers += [spatial, nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(dim, 4)

    def forward(self, x: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch 4"]:
        return self.head(self.features(x).mean(dim=(2, 3)))


STROKE_SCHEDULE = Schedule(steps=160, batch_size=64, lr=1e-2, weight_decay=0.0)


def compare_layouts(run: Run) -> Finding:
    """Accuracy of two networks of equal width where the answer stands in the middle."""
    task = CentralStroke()
    kinds = {"depthwise": None, "TVConv": TVConvOptions(hidden=16, hidden_layers=1)}

    makes = {name: partial(StrokeNetwork, task.side, options) for name, options in kinds.items()}
    found = compare_accuracy(run, makes, task, STROKE_SCHEDULE, seeds=5)
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", interval, "%") for name, interval in found.intervals.items()),
            Measured(
                "gained by TVConv at equal width and MACs", found.gap("TVConv", "depthwise"), "points", at_least(5, 0)
            ),
        ),
        charts=(found.chart("Which stroke is in the middle?", "% right (chance: 25)", x_range=(0, 105)),),
    )


CLAIM = Claim(
    statement="Where images share a layout, depthwise kernels that differ from place to place and are shared by all "
    "images do better than one kernel for all places, and, made once and kept, cost the same.",
    source="Chen et al. 2022, abstract",
    published=(
        Published("computation in face recognition against depthwise, similar accuracy", "up to 3.1x less", "abstract"),
        Published("throughput, likewise", "up to 2.3x", "abstract"),
        Published("mean accuracy at equal computation", "up to +4.21 points", "abstract"),
    ),
    design="Fixed kernels are compared with those made in every call, over kernel sizes, strides and bias, and their "
    "cost counted and timed in the narrowest face network; students learn a filter whose 3x3 kernels change smoothly "
    f"over 12x12 positions, from white noise ({FILTER_SCHEDULE.steps} steps); and two otherwise equal networks learn "
    f"to name the stroke in the middle of a picture full of strokes ({STROKE_SCHEDULE.steps} steps).",
    limits="Both tasks are made so that the place matters; they show that TVConv can use it and depthwise kernels "
    "cannot, not how much faces or eye scans need it. The faces of the paper are out of reach, and it has published no "
    "weights. Its throughput was measured on a GPU; times here are a CPU's.",
    cautions=(
        "TVConv is for images that are aligned: crops and shifts in training undo what it learns; flips do not.",
        "Training makes kernels in each step, which costs hundreds of images' MACs at width 0.1: use large batches.",
        "Kept kernels are numbers for each place: 16 MB at width 0.1, 61 MB at width 1.0, for one size of image.",
        "The published segmentation code picks its best epoch on the test domain; compare last epochs.",
    ),
    budget_s=110,
    parts=(
        Part(
            "Kept kernels",
            "Fixed kernels against kernels made anew, over kernel sizes, strides and bias; one kernel for all places "
            "against a depthwise convolution; makings and MACs counted in the face network of width 0.1.",
            check_forms,
            seconds=6,
        ),
        Part(
            "Time",
            "The same network with kernels made in each call, with kept ones, and with plain convolutions, in turn.",
            time_forms,
            seconds=12,
        ),
        Part(
            "A filter that depends on the place",
            "R^2 of a depthwise convolution and of two TVConvs against a smooth random filter; three seeds, each with "
            "a filter of its own, and the most that one kernel could explain.",
            learn_filters,
            seconds=25,
        ),
        Part(
            "What stands in the middle",
            "Accuracy of two networks of equal width, depthwise and TVConv, over five seeds.",
            compare_layouts,
            seconds=55,
        ),
    ),
)
