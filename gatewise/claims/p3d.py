"""P3D in miniature: convolutions over time, in any of three wirings, let an image network see which way things move.

Three questions. Are the wirings what the paper writes, and is what is left without convolutions over time a ResNet of
images? What do the convolutions taken apart save, in weights and in time? And can a network tell motion to the left
from motion to the right, where each frame by itself shows neither?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.checkpoint import export_state
from gatewise.catalog.registry import family_of
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Batch, Schedule, build, train_side_by_side
from gatewise.layers.clip_conv import TemporalConv, channels_last
from gatewise.networks.video.p3d import P3D, P3DConfig, Pseudo3dConv


def middles(network: nn.Module) -> list[Pseudo3dConv]:
    """All pairs of convolutions over space and over time."""
    return [module for module in network.modules() if isinstance(module, Pseudo3dConv)]


def norm_of(unit: TemporalConv) -> nn.BatchNorm2d:
    """Its norm, which must not be folded yet."""
    if not isinstance(unit.norm, nn.BatchNorm2d):
        raise TypeError(f"expected a batch norm, not {type(unit.norm).__name__}")
    return unit.norm


@torch.no_grad()
def pass_through(temporal: TemporalConv) -> None:
    """Make a convolution over time give each frame as it came, but for what is negative."""
    norm, width = norm_of(temporal), temporal.conv.out_channels
    temporal.conv.weight.zero_()
    temporal.conv.weight[:, :, temporal.conv.kernel_size[0] // 2, 0] = torch.eye(width)
    neutral = {"weight": torch.ones(width), "bias": torch.zeros(width), "running_mean": torch.zeros(width)}
    norm.load_state_dict(neutral | {"running_var": torch.full((width,), 1 - norm.eps)}, strict=False)


@torch.no_grad()
def silence(temporal: TemporalConv) -> None:
    """Make a convolution over time give zeros."""
    norm, zeros = norm_of(temporal), torch.zeros(temporal.conv.out_channels)
    temporal.conv.weight.zero_()
    norm.load_state_dict({"bias": zeros, "running_mean": zeros}, strict=False)


def wiring_error(wiring: str, seed: int) -> float:
    """Relative difference from what the wiring comes to where T passes everything on: S, S + x and 2 S."""
    middle = randomise(build(seed, lambda: Pseudo3dConv(6, wiring)), seed)
    pass_through(middle.temporal)
    x = torch.rand(2, 6, 5, 7, 4, generator=generator(seed))
    spatial = middle.spatial(x)
    expected = {"A": spatial, "B": spatial + x, "C": 2 * spatial}[wiring]
    with torch.no_grad():
        return relative_difference(middle(x), expected)


def still_clip_error(seed: int) -> float:
    """Relative difference of the logits of a still clip, T silenced, from those of torchvision's ResNet."""
    network = randomise(build(seed, lambda: P3D(P3DConfig(depths=(2, 2, 1, 1), struc=("B", "C"), num_classes=9))), seed)
    for middle in middles(network):
        silence(middle.temporal)
    image = torch.randn(2, 3, 64, 96, generator=generator(seed))
    with torch.no_grad():
        return relative_difference(network(image[:, :, None].repeat(1, 1, 16, 1, 1)), image_network(network)(image))


def image_network(network: P3D) -> nn.Module:
    """torchvision's ResNet with the weights that a P3D has for single frames."""
    from torchvision.models.resnet import Bottleneck, ResNet

    config = network.config
    resnet = ResNet(Bottleneck, list(config.depths), num_classes=config.num_classes)
    for stage in (resnet.layer2, resnet.layer3, resnet.layer4):
        # Caffe's ResNets, and P3D after them, stride in the first convolution of a block.
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    resnet.load_state_dict(export_state(network, "resnet"))
    return resnet.eval()


def backwards_error(frames_alone: bool, seed: int) -> float:
    """Relative difference between the logits of clips played forwards and backwards."""
    network = randomise(build(seed, partial(make_network, ("A", "B", "C"), frames_alone)), seed)
    clips, _ = MovingSquare().batch(4, generator(seed))
    with torch.no_grad():
        return relative_difference(network(clips.flip(2)), network(clips))


def check_identities(run: Run) -> Finding:
    """The wirings, the network without time, and what can tell forwards from backwards."""
    worst = max(wiring_error(wiring, run.seed) for wiring in "ABC")
    return Finding(
        measured=(
            Measured("wirings against S, S + x and 2 S, T passing everything on", exact(worst), "", at_most(1e-5)),
            Measured(
                "a still clip, T silenced, against a ResNet of images",
                exact(still_clip_error(run.seed)),
                "",
                at_most(1e-4),
            ),
            Measured(
                "logits backwards against forwards, frames alone",
                exact(backwards_error(True, run.seed)),
                "",
                at_most(1e-5),
            ),
            Measured(
                "logits backwards against forwards, P3D", exact(backwards_error(False, run.seed)), "", at_least(1e-2)
            ),
        ),
        remark="Poolings over time see what is there, not in which order: without convolutions over time a clip and "
        "its mirror in time are the same, and half of all directions are guesses.",
    )


def parameters(name: str, **fields: object) -> int:
    """Parameters of a registered network with these fields of its configuration replaced."""
    return sum(parameter.numel() for parameter in _without_storage(name, **fields).parameters())


def _without_storage(name: str, **fields: object) -> nn.Module:
    family = family_of(name)
    with torch.device("meta"):
        network: nn.Module = family.network(replace(family.variants[name].config, **fields))
    return network


def with_full_kernels(name: str) -> int:
    """Parameters of a registered network if each pair of convolutions were one of 3x3x3 with one norm."""
    network = _without_storage(name)
    total = sum(parameter.numel() for parameter in network.parameters())
    for middle in middles(network):
        width = middle.spatial.conv.out_channels
        total += 27 * width**2 + 2 * width - sum(parameter.numel() for parameter in middle.parameters())
    return total


def count_parameters(run: Run) -> Finding:
    """Compare the numbers of weights."""
    ours, full = parameters("p3d199"), with_full_kernels("p3d199")
    wirings = {parameters("p3d199", struc=struc) for struc in (("A",), ("B",), ("C",), ("A", "B"))}
    return Finding(
        measured=(
            Measured("parameters of P3D-199", exact(ours / 1e6), "M", between(66.49224, 66.49224)),
            Measured("the same with 3x3x3 kernels", exact(full / 1e6), "M", at_least(1.5 * ours / 1e6)),
            Measured("numbers of parameters over the wirings", exact(len(wirings | {ours})), "", between(1, 1)),
            Measured("weights of 3x3x3 over 1x3x3 and 3x1x1", exact(27 / 12), "x"),
        ),
    )


class ClipForm(nn.Module):
    """A pair of convolutions in series as `conv3d`, norms and ReLUs between: what `Pseudo3dConv` computes for A."""

    def __init__(self, middle: Pseudo3dConv) -> None:
        super().__init__()
        units: list[nn.Module] = []
        for unit, axis in ((middle.spatial, 2), (middle.temporal, 4)):
            kernel = unit.conv.weight.detach().unsqueeze(axis)
            dim, in_dim, *size = kernel.shape
            time, height, width = size
            padding = (time // 2, height // 2, width // 2)
            conv = nn.Conv3d(in_dim, dim, (time, height, width), padding=padding, bias=False)
            norm = nn.BatchNorm3d(dim)
            conv.load_state_dict({"weight": kernel})
            norm.load_state_dict(unit.norm.state_dict())
            units += [conv, norm, nn.ReLU()]
        self.units = nn.Sequential(*units)

    def forward(self, x: Float[Tensor, "batch dim time height width"]) -> Float[Tensor, "batch dim time height width"]:
        return self.units(x)


SHAPES = {"stage 1": (64, 8, 40, 40), "stage 3": (256, 2, 10, 10)}
"""Channels, frames, height and width in two stages, for clips of 16x160x160."""


def forms(shape: tuple[int, ...], seed: int) -> dict[str, Callable[[], Tensor]]:
    """Calls of a 3x3x3 convolution and of a pair of P3D, as `conv3d` in two memory formats and as it is here.

    Every convolution has its norm and ReLU.
    """
    width = shape[0]
    middle = randomise(build(seed, lambda: Pseudo3dConv(width, "A")), seed)
    conv = build(seed, lambda: nn.Conv3d(width, width, 3, padding=1, bias=False))
    full = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU()).eval()
    x = torch.randn(2, *shape, generator=generator(seed))
    last = channels_last(x)
    clips = ClipForm(middle).eval()
    clips_last = deepcopy(clips).to(memory_format=torch.channels_last_3d)
    here = middle.to(memory_format=torch.channels_last)
    return {
        "3x3x3": lambda: full(x),
        "pair, conv3d": lambda: clips(x),
        "pair, conv3d, channels-last": lambda: clips_last(last),
        "pair, as here": lambda: here(last),
    }


def time_forms(run: Run) -> Finding:
    """One-thread times of the forms, interleaved, with their equality."""
    measured: list[Measured] = []
    bars: dict[str, tuple[float, float, float]] = {}
    for stage, shape in SHAPES.items():
        calls = forms(shape, run.seed)
        run.say(f"timing convolutions of {stage}")
        with torch.no_grad():
            difference = relative_difference(calls["pair, as here"](), calls["pair, conv3d"]())
            times = time_by_turns(calls, run, seconds=6)
        better = min(("pair, conv3d", "pair, conv3d, channels-last"), key=lambda name: median_ms(times[name]))
        here = times["pair, as here"]
        measured += [
            Measured(f"{stage}: relative difference of the forms", exact(difference), "", at_most(1e-4)),
            Measured(f"{stage}: over the better conv3d form", times_faster(times[better], here), "x", at_least(0.9)),
            Measured(f"{stage}: over 3x3x3", times_faster(times["3x3x3"], here), "x", at_least(1)),
        ]
        bars |= {f"{name}: {stage}": (median_ms(samples),) * 3 for name, samples in times.items()}
    return Finding(tuple(measured), charts=(Bars("A pair of convolutions", "ms, one thread, batch 2", bars),))


class MovingSquare:
    """Clips of a square of random color that moves in one of four directions and comes back on the other side."""

    frames, side, square, speed = 16, 48, 12, 2
    directions = ((0, 1), (0, -1), (1, 0), (-1, 0))
    """Right, left, down, up, in rows and columns."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Clips (B, 3, T, H, W) and directions (B,)."""
        answers = torch.randint(len(self.directions), (size,), generator=generator)
        start = torch.randint(self.side, (size, 1, 2), generator=generator)
        color = torch.rand(size, 3, generator=generator)
        step = self.speed * torch.tensor(self.directions)[answers]
        corner = start + step[:, None] * torch.arange(self.frames)[:, None]
        inside = ((torch.arange(self.side) - corner[..., None]) % self.side < self.square).float()
        squares = inside[:, :, 0, :, None] * inside[:, :, 1, None, :]
        return color[:, :, None, None, None] * squares[:, None], answers

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def confusion(self, model: nn.Module, batch: Batch) -> Tensor:
        """How often each direction (row) was taken for each (column): a share of all clips."""
        size = len(self.directions)
        pairs = batch[1] * size + model(batch[0]).argmax(-1)
        return torch.bincount(pairs, minlength=size**2).reshape(size, size) / len(pairs)


NETWORKS = {
    "A, B, C mixed": (("A", "B", "C"), False),
    "A": (("A",), False),
    "B": (("B",), False),
    "C": (("C",), False),
    "frames alone": (("A", "B", "C"), True),
}
SCHEDULE = Schedule(steps=150, batch_size=8, lr=4e-3)


def make_network(struc: tuple[str, ...], frames_alone: bool) -> P3D:
    """One block per stage, a quarter of the published width; or the same with nothing in the place of T."""
    network = P3D(P3DConfig(base_width=16, depths=(1, 1, 1, 1), struc=struc, num_classes=4, drop_rate=0.0))
    if frames_alone:
        for middle in middles(network):
            middle.register_module("temporal", nn.Identity())
    return network


def axis_right(confusion: Tensor) -> float:
    """Percent of clips whose direction is told up to its sign."""
    return 100 * (confusion[:2, :2].sum() + confusion[2:, 2:].sum()).item()


def learn_directions(run: Run) -> Finding:
    """Accuracy on new clips after equal training, over several seeds."""
    task = MovingSquare()

    def once(seed: int) -> dict[str, Tensor]:
        networks = {name: build(seed, partial(make_network, *options)) for name, options in NETWORKS.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(200, generator(seed + 500))
        return {name: task.confusion(network, unseen) for name, network in networks.items()}

    seeds = run.repeat(4, once)
    right = {name: [100 * one[name].trace().item() for one in seeds] for name in NETWORKS}
    intervals = {name: t_interval(values) for name, values in right.items()}
    axis = t_interval([axis_right(one["frames alone"]) for one in seeds])
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", intervals[name], "%", at_least(70, 50)) for name in list(NETWORKS)[:-1]),
            Measured("accuracy, frames alone", intervals["frames alone"], "%", at_most(60)),
            Measured("axis of motion right, frames alone", axis, "%", at_least(80)),
        ),
        charts=(
            Bars(
                "Direction of a moving square",
                "% right on new clips (chance: 25)",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=right,
                limit=50,
                limit_label="most without the order of frames",
                x_range=(0, 105),
            ),
            Pictures("Direction shown (rows), direction told (columns)", _mean_confusions(seeds)),
        ),
    )


def _mean_confusions(seeds: list[dict[str, Tensor]]) -> Mapping[str, list[list[float]]]:
    shown = ("A, B, C mixed", "frames alone")
    return {name: torch.stack([one[name] for one in seeds]).mean(dim=0).tolist() for name in shown}


CLAIM = Claim(
    statement="A 3x3x3 convolution can be taken apart into one over space and one over time, wired in three ways: an "
    "image network becomes a deep video network at nearly its size, and sees motion.",
    source="Qiu et al. 2017, abstract and section 3",
    published=(
        Published("Sports-1M video hit@1 over C3D, over frame-wise ResNet-152", "+5.3, +1.8 points", "abstract"),
        Published("Sports-1M video hit@1", "66.4 %", "Sports-1M table (recalled)"),
        Published(
            "UCF101 split 1, ResNet-50 base: frames, A, B, C, mixed", "80.8, 83.7, 82.8, 83.0, 84.2 %", "recalled"
        ),
    ),
    design="The wirings are compared with what they come to where the convolution over time passes everything on, and "
    "a still clip with torchvision's ResNet of one frame; weights are counted; a pair of convolutions is timed in "
    "three forms against the 3x3x3 that it stands for; and networks of a quarter of the width learn, over "
    f"{SCHEDULE.steps} equal steps, in which of four directions a square moves, with each wiring, with all of them, "
    "and with none.",
    limits="One square on black, whose single frames say nothing at all of the direction: it shows that convolutions "
    "over time carry motion, not how much of it real actions need beyond what a single frame gives away.",
    cautions=(
        "The task does not rank the wirings: all of them solve it. The paper's differences between them are within a "
        "point or two, on real actions.",
        "The port and the Caffe network differ in the first pooling, and in colors (RGB in 0 to 1, or BGR in 0 to 255 "
        "less a mean): weights of one with the input of the other give wrong labels.",
    ),
    budget_s=165,
    parts=(
        Part(
            "Identities",
            "Wirings with a convolution over time that passes everything on; a still clip with silenced ones against a "
            "ResNet of images; clips forwards and backwards.",
            check_identities,
            seconds=8,
        ),
        Part("Weights", "Parameters counted, with pairs and with 3x3x3 kernels.", count_parameters, seconds=2),
        Part(
            "Time of a pair",
            "A 3x3x3 convolution, and a pair as conv3d in two memory formats and as it is implemented, each with norms "
            "and ReLUs, one thread, interleaved.",
            time_forms,
            seconds=16,
        ),
        Part(
            "Motion",
            "Accuracy on 200 new clips of 16x48x48 after equal training; four seeds.",
            learn_directions,
            seconds=130,
        ),
    ),
)
