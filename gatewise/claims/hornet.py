"""HorNet in miniature: interactions of a chosen order, at a cost that hardly grows with it.

What is identity is checked as such: the degree of gnConv as a polynomial, its multiply-accumulates, and the global
filter as a circular convolution. The experiment asks for products of cues, one at the position itself and the others
averaged over its surroundings: a gnConv of order n is to learn products of n + 1 cues, and of no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns, times_faster
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.layers.gnconv import GnConv, Grid
from gatewise.networks.image.hornet import HorNetBlock, HorNetConfig
from gatewise.ops.global_filter import global_filter, global_filter_reference

ORDERS = (1, 2, 3, 4, 5)


def without_biases(module: GnConv) -> GnConv:
    """The module with all biases zero, changed in place."""
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d) and inner.bias is not None:
            nn.init.zeros_(inner.bias)
    return module


def doubled(order: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the outputs of a gnConv of this order without biases for a map and for twice that map, in float64."""
    module = without_biases(randomise(build(seed, lambda: GnConv(32, order, scale=1 / 3)), seed)).double()
    x = torch.randn(2, 32, 12, 9, generator=generator(seed)).double()
    with torch.no_grad():
        return module(x), module(2 * x)


def check_degree(run: Run) -> Finding:
    """Degree of gnConv as a polynomial in its input, for orders 1 to 5."""
    pairs = {order: doubled(order, run.seed) for order in ORDERS}
    degrees = {order: math.log2((two.norm() / one.norm()).item()) for order, (one, two) in pairs.items()}
    errors = [relative_difference(two, 2 ** (order + 1) * one) for order, (one, two) in pairs.items()]
    return Finding(
        measured=(
            Measured("difference of gnConv(2x) from 2^(n+1) gnConv(x)", exact(max(errors)), "", at_most(1e-5)),
            *(
                Measured(f"degree at order {order}", exact(round(degrees[order], 9)), "", between(order + 1, order + 1))
                for order in ORDERS
            ),
        ),
        charts=(
            Lines(
                "Degree of gnConv in its input",
                "order n",
                "degree",
                list(ORDERS),
                {"measured": [degrees[order] for order in ORDERS]},
                published={"n + 1, by the definition": [(order, order + 1) for order in ORDERS]},
            ),
        ),
    )


def check_cost(run: Run) -> Finding:
    """Multiply-accumulates of gnConv per position, for orders 1 to 5."""
    x = torch.zeros(1, 64, 8, 8)
    macs = {order: count(build(run.seed, partial(GnConv, 64, order)), x).macs / 64 for order in ORDERS}
    last_step = 2 * 64**2 + 64**2
    return Finding(
        measured=(
            *(Measured(f"MACs per position, order {order}", exact(macs[order])) for order in ORDERS),
            Measured("order 5 over order 1", exact(macs[5] / macs[1]), "x", at_most(1.37)),
            Measured("projections in and out alone, over order 1", exact(last_step / macs[1]), "x"),
        ),
        charts=(
            Lines(
                "Cost of a gnConv of width 64",
                "order n",
                "MACs per position",
                list(ORDERS),
                {"measured": [macs[order] for order in ORDERS]},
                y_range=(0, 25_000),
            ),
        ),
    )


def filter_error(size: tuple[int, int], seed: int) -> float:
    """Largest relative difference between the filter through transforms and the convolution around the borders."""
    height, width = size
    x = torch.randn(2, 4, height, width, generator=generator(seed)).double()
    spectrum = torch.randn(4, height, width // 2 + 1, 2, generator=generator(seed + 1)).double()
    return relative_difference(global_filter(x, spectrum), global_filter_reference(x, spectrum))


def seen_positions(grid: Grid | None, side: int, seed: int) -> Int[Tensor, "height width"]:
    """1 where the input has a say in the output of a gnConv at the middle of a map, 0 elsewhere."""
    module = randomise(build(seed, lambda: GnConv(16, 3, grid=grid)), seed).double()
    x = torch.randn(1, 16, side, side, generator=generator(seed)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0, :, side // 2, side // 2].sum(), x)
    return gradient[0].abs().sum(0).gt(0).int()


def check_filter(run: Run) -> Finding:
    """The global filter against a circular convolution, and the fields of view of both kinds of gnConv."""
    side = 14
    fields = {
        "7x7": seen_positions(None, side, run.seed),
        "global filter": seen_positions((side, side // 2 + 1), side, run.seed),
    }
    errors = [filter_error(size, run.seed) for size in ((6, 5), (5, 8), (1, 3))]
    return Finding(
        measured=(
            Measured("difference from a circular convolution", exact(max(errors)), "", at_most(1e-10)),
            Measured("positions that 7x7 sees", exact(fields["7x7"].sum().item()), "", between(49, 49)),
            Measured(
                "positions that the global filter sees, of 14x14",
                exact(fields["global filter"].sum().item()),
                "",
                between(side**2, side**2),
            ),
        ),
        charts=(Pictures("What one output position sees", {name: seen.tolist() for name, seen in fields.items()}),),
    )


SIDES = (14, 28, 56)
Times = Mapping[str, Sequence[float]]


def time_filters(run: Run) -> Finding:
    """One-thread time of a gnConv with a 7x7 convolution and with a global filter, at three sizes."""
    dim, calls = 96, {}
    for side in SIDES:
        x = torch.randn(4, dim, side, side, generator=generator(run.seed)).contiguous(memory_format=torch.channels_last)
        for name, grid in {"7x7": None, "global filter": (side, side // 2 + 1)}.items():
            module = build(run.seed, partial(GnConv, dim, 3, scale=1 / 3, grid=grid)).eval()
            calls[f"{name}, {side}"] = partial(module, x)
    run.say("timing gnConv with both kinds of filter at three sizes")
    with torch.no_grad():
        times = time_by_turns(calls, run, seconds=14)
    return Finding(
        measured=tuple(
            Measured(
                f"time, global filter over 7x7, {side}x{side}",
                times_faster(times[f"global filter, {side}"], times[f"7x7, {side}"]),
                "x",
                at_least(1) if side == SIDES[-1] else None,
            )
            for side in SIDES
        ),
        charts=(
            Lines(
                "Time of a gnConv, 4 maps of 96 channels, order 3",
                "side of the map",
                "ms, one thread",
                list(SIDES),
                {name: [median_ms(times[f"{name}, {side}"]) for side in SIDES] for name in ("7x7", "global filter")},
                log="xy",
            ),
        ),
        remark="The published networks use global filters in their last two stages, where maps are small.",
    )


class ProductOfCues:
    """At every position, the product of one cue there and others that are averaged over the 3x3 positions around it.

    Cues are independent planes of noise, so that no product of fewer of them tells anything about the whole product:
    polynomials of a lower degree explain none of it.
    """

    side, window = 16, 3

    def __init__(self, cues: int) -> None:
        self.cues = cues

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Planes (B, cues, 16, 16) and the products (B, 1, 16, 16), whose variance is 1 away from the border."""
        planes = torch.randn(size, self.cues, self.side, self.side, generator=generator)
        around = F.avg_pool2d(planes[:, 1:], self.window, 1, self.window // 2) * self.window
        products = planes[:, :1] * around.prod(dim=1, keepdim=True)
        return planes.contiguous(memory_format=torch.channels_last), products

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(model(batch[0]), batch[1])

    @torch.no_grad()
    def explained(self, model: nn.Module, batch: Batch) -> float:
        """The share of the products' variance that the model explains; below 0 where it adds some."""
        return 1 - (self.loss(model, batch) / batch[1].var()).item()


DIM = 16
SCHEDULE = Schedule(steps=200, batch_size=16, lr=2e-2, weight_decay=0.0)


def make_layer(order: int, cues: int) -> nn.Module:
    """A gnConv alone."""
    return init_by_fan_in(GnConv(DIM, order, in_dim=cues, out_dim=1))


def make_block(order: int, cues: int) -> nn.Module:
    """A whole block, with norms and MLP, between two linear layers."""
    config = HorNetConfig(
        depths=(1,),
        embed_dims=(DIM,),
        orders=(order,),
        gate_scale=1.0,
        mlp_ratio=2,
        layer_scale_init=None,
        out_indices=(0,),
    )
    block = HorNetBlock(config, stage=0)
    return init_by_fan_in(nn.Sequential(nn.Conv2d(cues, DIM, 1), block, nn.Conv2d(DIM, 1, 1)))


def explained_by_order(
    run: Run, make: Callable[[int, int], nn.Module], orders: Sequence[int], cues: int, seed: int
) -> dict[int, float]:
    """Explained variance on new planes after equal training, for each order."""
    task = ProductOfCues(cues)
    models = {str(order): build(seed, partial(make, order, cues)) for order in orders}
    train_side_by_side(models, task, SCHEDULE, seed=seed, run=run)
    unseen = task.batch(100, generator(seed + 500))
    return {order: task.explained(models[str(order)], unseen) for order in orders}


def learn_with_layers(run: Run) -> Finding:
    """Compare how single gnConvs of order 1 and 2 learn products of two and three cues."""

    def once(seed: int) -> dict[tuple[int, int], float]:
        found = {cues: explained_by_order(run, make_layer, (1, 2), cues, seed) for cues in (2, 3)}
        return {(order, cues): found[cues][order] for cues in found for order in (1, 2)}

    seeds = run.repeat(5, once)
    shares = {key: [one[key] for one in seeds] for key in seeds[0]}
    intervals = {key: t_interval(values) for key, values in shares.items()}
    names = {key: f"order {key[0]}: {key[1]} cues" for key in shares}
    return Finding(
        measured=(
            Measured("order 1, product of 2 cues", intervals[1, 2], "explained", at_least(0.8, contrary_below=0.5)),
            Measured("order 1, product of 3 cues", intervals[1, 3], "explained", at_most(0.05, contrary_above=0.5)),
            Measured("order 2, product of 3 cues", intervals[2, 3], "explained", at_least(0.8, contrary_below=0.05)),
            Measured("order 2, product of 2 cues", intervals[2, 2], "explained"),
        ),
        charts=(
            Bars(
                "A gnConv alone",
                "share of variance explained",
                {names[key]: (one.value, one.low, one.high) for key, one in intervals.items()},
                points={names[key]: values for key, values in shares.items()},
                x_range=(-0.1, 1.1),
            ),
        ),
    )


def learn_with_blocks(run: Run) -> Finding:
    """The same of products of three cues with whole blocks of order 1, 2 and 3."""
    orders = (1, 2, 3)
    seeds = run.repeat(7, lambda seed: explained_by_order(run, make_block, orders, 3, seed))
    shares = {order: [one[order] for one in seeds] for order in orders}
    intervals = {f"order {order}": t_interval(values) for order, values in shares.items()}

    def gain(more: int) -> list[float]:
        return [a - b for a, b in zip(shares[more], shares[1], strict=True)]

    return Finding(
        measured=(
            Measured("order 1", intervals["order 1"], "explained"),
            Measured("order 2 minus order 1", t_interval(gain(2)), "explained", at_least(0.05, contrary_below=0)),
            Measured("order 3 minus order 1", t_interval(gain(3)), "explained"),
        ),
        charts=(
            Bars(
                "A whole block, products of 3 cues",
                "share of variance explained",
                {name: (one.value, one.low, one.high) for name, one in intervals.items()},
                points={f"order {order}": values for order, values in shares.items()},
                x_range=(-0.1, 1.1),
            ),
        ),
        remark="Order 3 makes products of four factors, one more than is asked for, and starts more slowly: higher is "
        "not better by itself.",
    )


CLAIM = Claim(
    statement="Gated 1x1 projections in a chain extend interactions between positions to any order; widths that "
    "double along the chain keep the cost near that of a single gate.",
    source="Rao et al. 2022, abstract and section 3.1",
    published=(
        Published("ImageNet-1K top-1 at 224, 7x7 filter: T, S, B", "82.8, 83.8, 84.2 %", "model zoo"),
        Published("the same with global filters", "83.0, 84.0, 84.3 %", "model zoo"),
    ),
    design="The degree of gnConv as a polynomial, its multiply-accumulates and the global filter are held to their "
    "definitions; both kinds of filter are timed; and gnConvs of width 16, alone and in a whole block with MLP, learn, "
    f"over {SCHEDULE.steps} equal steps, products of cues that only interactions of the right degree can make.",
    limits="The products are made for the claim: they show what an order can express and how readily it is found, not "
    "how much natural images need it. An MLP makes up for a low order if it is wide or trained enough: with a block of "
    "width 32 instead of 16, or a learning rate of 0.03 instead of 0.02, the gain of order 2 shrinks to little or "
    "nothing. Products of four cues are not learnt by any order in so few steps. The paper's accuracies are out of "
    "reach of minutes.",
    cautions=(
        "High orders multiply many factors: outputs and gradients grow or vanish with them. The published networks "
        "scale gates by 1/3, clip gradients, and train in float32.",
        "A global filter belongs to the image size of its grid; at another size it is interpolated, which is another "
        "function.",
        "Figures after so few steps compare how readily the variants learn, not where they would end.",
    ),
    budget_s=150,
    parts=(
        Part(
            "Degree",
            "A gnConv of width 32 without biases, random weights, float64, on a map and on twice that map.",
            check_degree,
            seconds=2,
        ),
        Part("Cost", "MACs of a gnConv of width 64 with 7x7 kernels, counted.", check_cost, seconds=2),
        Part(
            "Global filter",
            "The filter through Fourier transforms against the convolution around the borders, shift by shift, in "
            "float64; and the positions that have a say in one output.",
            check_filter,
            seconds=2,
        ),
        Part(
            "Time of the filters",
            "A gnConv of width 96 and order 3 with a 7x7 convolution and with a global filter on 4 maps of 14, 28 and "
            "56 a side, one thread, interleaved.",
            time_filters,
            seconds=16,
        ),
        Part(
            "Products, gnConv alone",
            "Variance of products of two and three cues that gnConvs of order 1 and 2 explain after equal training; "
            "five seeds.",
            learn_with_layers,
            seconds=35,
        ),
        Part(
            "Products, whole block",
            "The same of three cues for blocks of order 1, 2 and 3, norms and MLP included; seven seeds, differences "
            "taken within a seed.",
            learn_with_blocks,
            seconds=50,
        ),
    ),
)
