"""InceptionNeXt in miniature: four cheap branches against one large depthwise kernel.

The experiment asks at dots for a symbol that stands 1 to 5 cells away, in any direction, so that the answer shows how
far a mixer of positions reaches. Identity, 3x3, 7x7 and Inception mixers learn it in otherwise equal networks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.claims._base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims._checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims._intervals import exact, t_interval
from gatewise.claims._plot import Bars, Lines, Pictures
from gatewise.claims._run import Run
from gatewise.claims._training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.count import count
from gatewise.efficiency.fold import fold
from gatewise.networks.image.inception_next import InceptionDepthwise, InceptionNeXt, InceptionNeXtConfig, depthwise

BAND, SQUARE = 11, 3
ARM = BAND // 2
FORMATS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}


def dense_kernel(mixer: InceptionDepthwise) -> nn.Conv2d:
    """One depthwise 11x11 convolution that computes what the four branches compute."""
    dense = depthwise(sum(mixer.split), (BAND, BAND))
    with torch.no_grad():
        nn.init.zeros_(dense.weight)
        nn.init.zeros_(dense.bias)  # type: ignore[arg-type]
        dense.weight[: mixer.split[0], 0, ARM, ARM] = 1
        for channels, conv in zip(branch_channels(mixer)[1:], mixer.convs.values(), strict=True):
            top, left = (ARM - size // 2 for size in conv.kernel_size)
            dense.weight[channels, :, top : BAND - top, left : BAND - left] = conv.weight
            dense.bias[channels] = conv.bias  # type: ignore[index]
    return dense


def branch_channels(mixer: InceptionDepthwise) -> list[slice]:
    """The channels of the identity and of each convolution, in order."""
    bounds = [0]
    for width in mixer.split:
        bounds.append(bounds[-1] + width)
    return [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False)]


def seen_positions(mixer: nn.Module, dim: int, channels: slice) -> Int[Tensor, "height width"]:
    """1 where the input has a say in these channels' output at the middle of a map, 0 elsewhere."""
    side = 2 * BAND + 1
    x = torch.randn(1, dim, side, side, generator=generator(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x)[0, channels, side // 2, side // 2].sum(), x)
    return gradient[0].abs().sum(0).gt(0).int()


def cross() -> Int[Tensor, "height width"]:
    """What should be seen: the two bands and the square around the middle, 21 + 4 positions."""
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
    with torch.no_grad():
        difference = relative_difference(dense_kernel(mixer)(x), mixer(x))
    names = ("untouched", "square", "row", "column")
    fields = {name: seen_positions(mixer, dim, own) for name, own in zip(names, branch_channels(mixer), strict=True)}
    whole = seen_positions(mixer, dim, slice(None))
    return Finding(
        measured=(
            Measured("difference from one dense 11x11 kernel", exact(difference), "", at_most(1e-5)),
            Measured("positions that the mixer sees", exact(whole.sum().item()), "", between(25, 25)),
            Measured("of these, off the cross and square", exact((whole > cross()).sum().item()), "", between(0, 0)),
            Measured("positions that untouched channels see", exact(fields["untouched"].sum().item()), "", between(1, 1)),
        ),
        charts=(Pictures("What one output position sees", {k: v.tolist() for k, v in ({"all": whole} | fields).items()}),),
    )


def measure_cost(run: Run) -> Finding:
    """MACs per position and one-thread time of three mixers, in both memory formats."""
    dim, side, batch = 96, 56, 8
    mixers = {
        "Inception": build(run.seed, lambda: InceptionDepthwise(dim)),
        "7x7": build(run.seed, lambda: depthwise(dim, (7, 7))),
        "3x3": build(run.seed, lambda: depthwise(dim, (3, 3))),
    }
    macs = {name: count(mixer, torch.zeros(1, dim, side, side)).macs / side**2 for name, mixer in mixers.items()}
    run.say("timing three mixers in two memory formats")
    x = torch.randn(batch, dim, side, side, generator=generator(run.seed))
    calls = {}
    for memory, layout in FORMATS.items():
        laid_out = x.contiguous(memory_format=layout)
        for name, mixer in mixers.items():
            calls[f"{name}, {memory}"] = lambda mixer=mixer, laid_out=laid_out: mixer(laid_out)
    with torch.no_grad():
        times = time_by_turns(calls, run, seconds=15)
    milliseconds = {name: median_ms(samples) for name, samples in times.items()}

    def faster(slow: str, memory: str | None = None) -> Measured:
        """Inception against another mixer: in one format, or each in its better one."""
        better = {name: memory or min(FORMATS, key=lambda m: milliseconds[f"{name}, {m}"]) for name in mixers}
        interval = times_faster(*(times[f"{name}, {better[name]}"] for name in (slow, "Inception")))
        where = f"both {memory}" if memory else "each in its better format"
        return Measured(f"{slow} over Inception, time, {where}", interval, "x", None if memory else at_least(1))

    return Finding(
        measured=(
            Measured(
                "MACs per position and channel, Inception", exact(macs["Inception"] / dim), "", between(3.875, 3.875)
            ),
            Measured("MACs, 7x7 over Inception", exact(macs["7x7"] / macs["Inception"]), "x", at_least(12.6)),
            faster("7x7"),
            faster("7x7", "NCHW"),
            faster("7x7", "channels-last"),
            faster("3x3", "NCHW"),
            faster("3x3", "channels-last"),
        ),
        charts=(
            Bars("Time of a mixer, 96 x 56 x 56, batch 8", "ms, one thread", {k: (v,) * 3 for k, v in milliseconds.items()}),
        ),
        remark="How a depthwise kernel fares depends on the library behind it: in channels-last the CPU library has a fast "
        "one for 3x3 and 7x7, and the split and join of Inception cost more than its convolutions.",
    )


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


class SymbolNearby:
    """At each of four dots, name the one of ten symbols that stands 1 to 5 cells away, in any direction.

    The picture has 24x24 cells, one plane per symbol and one for the dots. Each dot is the middle of a neighbourhood of
    11x11 cells of its own with one symbol in it, so that no other symbol is within 5 cells; all four are shifted
    together by up to two cells.
    """

    symbols, reach, across, shift = 10, ARM, 2, 2
    planes = symbols + 1
    width = 2 * reach + 1
    side = across * width + shift

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Pictures (B, 11, 24, 24), the cells that ask (B, 4), what they should be told (B, 4), and its distance."""
        first = torch.arange(self.across) * self.width + self.reach
        dots = torch.cartesian_prod(first, first)
        dots = dots + torch.randint(self.shift + 1, (size, 1, 2), generator=generator)
        draw = (size, len(first) ** 2)
        distance = torch.randint(1, self.reach + 1, draw, generator=generator)
        steps = torch.arange(-self.reach, self.reach + 1)
        offsets = torch.cartesian_prod(steps, steps)
        at_distance = (offsets.abs().amax(-1) == distance.reshape(-1, 1)).float()
        offset = offsets[torch.multinomial(at_distance, 1, generator=generator).reshape(draw)]
        symbol = torch.randint(self.symbols, draw, generator=generator)
        picture = torch.zeros(size, self.planes, self.side**2)
        sample = torch.arange(size)[:, None]
        cells = self._cell(dots)
        picture[sample, symbol, self._cell(dots + offset)] = 1
        picture[sample, self.symbols, cells] = 1
        return self._as_images(picture), cells, symbol, distance

    def _as_images(self, planes: Float[Tensor, "batch planes cells"]) -> Float[Tensor, "batch planes height width"]:
        return planes.unflatten(2, (self.side, self.side)).contiguous(memory_format=torch.channels_last)

    def _cell(self, row_and_column: Int[Tensor, "... 2"]) -> Int[Tensor, "..."]:
        return row_and_column[..., 0] * self.side + row_and_column[..., 1]

    def logits(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch dots symbols"]:
        """What the network says at each dot."""
        pictures, cells = batch[:2]
        features = model.forward_features(pictures).flatten(2).transpose(1, 2)
        return model.head(features[torch.arange(len(pictures))[:, None], cells])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.logits(model, batch).flatten(0, 1), batch[2].flatten())

    @torch.no_grad()
    def accuracy(self, model: nn.Module, batch: Batch) -> list[float]:
        """Percent right at each distance from 1 up."""
        right = (self.logits(model, batch).argmax(-1) == batch[2]).float()
        return [100 * right[batch[3] == distance].mean().item() for distance in range(1, self.reach + 1)]


WIDTH = 32
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "3x3": lambda: depthwise(WIDTH, (3, 3)),
    "7x7": lambda: depthwise(WIDTH, (7, 7)),
    "Inception": lambda: InceptionDepthwise(WIDTH),
}
SCHEDULE = Schedule(steps=280, batch_size=32, lr=5e-3)


def make_network(mixer: Callable[[], nn.Module]) -> InceptionNeXt:
    """Two blocks at one resolution, with this mixer in both."""
    config = InceptionNeXtConfig(
        in_chans=SymbolNearby.planes,
        num_classes=SymbolNearby.symbols,
        patch_size=1,
        depths=(2,),
        embed_dims=(WIDTH,),
        mlp_ratios=(2,),
        layer_scale_init=None,
        out_indices=(0,),
    )
    network = InceptionNeXt(config)
    for block in network.stages[0].blocks:
        block.mixer = mixer()
    return init_by_fan_in(network)


def compare_mixers(run: Run) -> Finding:
    """Accuracy of each mixer by distance, over several seeds, and the time of a training step."""
    task = SymbolNearby()

    def once(seed: int) -> dict[str, list[float]]:
        networks = {name: build(seed, lambda mixer=mixer: make_network(mixer)) for name, mixer in MIXERS.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(500, generator(seed + 500))
        return {name: task.accuracy(network, unseen) for name, network in networks.items()}

    seeds = run.repeat(4, once)
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
                list(range(1, task.reach + 1)),
                {
                    name: [sum(values) / len(seeds) for values in zip(*(one[name] for one in seeds), strict=True)]
                    for name in MIXERS
                },
            ),
            Bars(
                "Accuracy over all distances",
                "% right",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points=overall,
            ),
        ),
    )


def time_training(run: Run) -> Finding:
    """Time of a training step of the experiment's networks, by turns on one thread."""
    task = SymbolNearby()
    batch = task.batch(SCHEDULE.batch_size, generator(run.seed))
    networks = {name: build(run.seed, lambda mixer=mixer: make_network(mixer)) for name, mixer in MIXERS.items()}
    calls = {name: lambda network=network: task.loss(network, batch).backward() for name, network in networks.items()}
    times = time_by_turns(calls, run, seconds=6)
    return Finding(
        measured=(
            Measured("7x7 over Inception", times_faster(times["7x7"], times["Inception"]), "x", at_least(1)),
            Measured("3x3 over Inception", times_faster(times["3x3"], times["Inception"]), "x", at_least(0.9)),
        ),
        charts=(
            Bars("Forward and backward of the miniature", "ms, one thread", {k: (median_ms(v),) * 3 for k, v in times.items()}),
        ),
    )
