"""FocalNet in miniature: linear cost, exact identities, and what the gates and the global level are for.

The experiment gives a two-block FocalNet a picture of symbols and asks at several dots at once: dots of one kind want
the symbol beside them, dots of the other kind the symbol at the far end of the picture. No single range serves both,
and only the dot's own content tells which range it needs, which is what focal modulation claims to be good at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.checkpoint import load_state
from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, median_ms, randomise, relative_difference, time_by_turns
from gatewise.claims.lab.intervals import Interval, bootstrap, exact, t_interval
from gatewise.claims.lab.plot import Bars, Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.symbols import NearOrFar
from gatewise.claims.lab.training import Batch, Schedule, build, init_by_fan_in, train_side_by_side
from gatewise.efficiency.cost.count import count
from gatewise.gates.capture import capture
from gatewise.networks.image.focalnet import FocalModulation, FocalNet, FocalNetConfig

SIDES = (28, 56, 112)
PaddingMode = Literal["circular", "zeros"]
MODES: tuple[PaddingMode, ...] = ("circular", "zeros")


class Attention(nn.Module):
    """Softmax self-attention between all positions, for contrast: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project_in = nn.Linear(dim, 3 * dim)
        self.project_out = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "batch height width channels"]) -> Float[Tensor, "batch height width channels"]:
        height, width = x.shape[1:3]
        heads = "b h w (three heads c) -> three b heads (h w) c"
        query, key, value = rearrange(self.project_in(x), heads, three=3, heads=self.num_heads)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.project_out(rearrange(y, "b heads (h w) c -> b h w (heads c)", h=height, w=width))


def macs_by_side(make: Callable[[], nn.Module], dim: int, sides: Sequence[int]) -> list[int]:
    """Multiply-accumulates of one map of each side length; nothing is computed."""
    with torch.device("meta"):
        module = make()
        return [count(module, torch.empty(1, side, side, dim)).macs for side in sides]


def measure_cost(run: Run) -> Finding:
    """MACs and one-thread time of focal modulation and of attention, at three sizes."""
    dim = 96
    makes: dict[str, Callable[[], nn.Module]] = {
        "focal modulation": lambda: FocalModulation(dim, focal_level=3, focal_window=3),
        "attention": lambda: Attention(dim, num_heads=3),
    }
    macs = {name: macs_by_side(make, dim, SIDES) for name, make in makes.items()}
    modules = {name: build(run.seed, make).eval() for name, make in makes.items()}
    maps = {side: torch.randn(1, side, side, dim, generator=generator(run.seed)) for side in SIDES}
    calls = {
        f"{name}, side {side}": lambda module=module, x=maps[side]: module(x)
        for name, module in modules.items()
        for side in SIDES
    }
    run.say("timing both at three sizes")
    with torch.no_grad():
        times = time_by_turns(calls, run, seconds=15)
    samples = {name: [times[f"{name}, side {side}"] for side in SIDES] for name in modules}
    growth = {name: bootstrap([_slope(times) for times in zip(*samples[name], strict=True)]) for name in modules}
    pixels = [side * side for side in SIDES]
    milliseconds = {name: [median_ms(one) for one in samples[name]] for name in modules}
    start = milliseconds["focal modulation"][0]
    return Finding(
        measured=(
            Measured(
                "MACs of focal modulation when the side doubles",
                exact(macs["focal modulation"][2] / macs["focal modulation"][1]),
                "times",
                between(4, 4),
                Published("cost of focal modulation", "linear in pixels", "paper, by its definition"),
            ),
            Measured(
                "MACs of attention when the side doubles",
                exact(macs["attention"][2] / macs["attention"][1]),
                "times",
                between(14, 16),
            ),
            Measured("time of focal modulation ~ pixels to the power", growth["focal modulation"], "", at_most(1.3)),
            Measured("time of attention ~ pixels to the power", growth["attention"], "", at_least(1.5)),
        ),
        charts=(
            Lines(
                "Cost against size",
                "pixels",
                "ms per map, one thread",
                pixels,
                milliseconds,
                published={"linear in pixels, as published": [(one, start * one / pixels[0]) for one in pixels]},
                log="xy",
            ),
        ),
        remark="Time can grow faster than MACs where a larger map leaves the processor's caches.",
    )


def _slope(times: Sequence[float]) -> float:
    """Exponent of the power law through the first and the last size."""
    return math.log(times[-1] / times[0]) / math.log((SIDES[-1] / SIDES[0]) ** 2)


def kernel_growth_error(seed: int) -> float:
    """Largest relative difference between a network with kernels 3, 5 and the same grown to 9, 11."""
    small, grown = (build(seed, partial(FocalNet, _small_config(window))) for window in (3, 9))
    randomise(small, seed)
    load_state(grown.eval(), small.state_dict(), adapt=True)
    images = torch.randn(2, 3, 96, 64, generator=generator(seed))
    with torch.no_grad():
        return relative_difference(grown(images), small(images))


def _small_config(window: int) -> FocalNetConfig:
    return FocalNetConfig(embed_dim=32, depths=(1, 1, 2, 1), focal_windows=(window,) * 4, num_classes=10)


def translation_error(seed: int, padding_mode: PaddingMode) -> float:
    """Largest relative difference between shifting the input and shifting the output of a focal modulation."""
    modulation = build(seed, lambda: FocalModulation(32, focal_level=3, focal_window=3)).eval()
    for level in modulation.modules():
        if isinstance(level, nn.Conv2d):
            level.padding_mode = padding_mode
    x = torch.randn(2, 20, 16, 32, generator=generator(seed))
    with torch.no_grad():
        return relative_difference(modulation(x.roll((5, 7), (1, 2))), modulation(x).roll((5, 7), (1, 2)))


def check_identities(run: Run) -> Finding:
    """Two equalities that follow from the definition."""
    growth = exact(kernel_growth_error(run.seed))
    circular, zeros = (exact(translation_error(run.seed, mode)) for mode in MODES)
    return Finding(
        measured=(
            Measured("kernels 3, 5 grown to 9, 11: relative difference of the logits", growth, "", at_most(1e-5)),
            Measured("shifted map, circular padding: relative difference", circular, "", at_most(1e-5)),
            Measured("shifted map, the usual zero padding", zeros),
        ),
        charts=(
            Bars(
                "Identities in float32",
                "relative difference",
                {
                    "grown kernels": (growth.value,) * 3,
                    "shifted map, circular padding": (circular.value,) * 3,
                    "shifted map, zero padding": (zeros.value,) * 3,
                },
                limit=1e-5,
                limit_label="equal up to rounding",
                log=True,
                x_range=(1e-9, 1),
            ),
        ),
        remark="With zero padding the border is told from the middle: the difference there is meant to be large.",
    )


class EditedGates(nn.Module):
    """In the place of a modulation's `project_in`: the same map, its gates put through `edit`."""

    def __init__(self, modulation: FocalModulation, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.project = modulation.project_in
        self.gates = len(modulation.levels) + 1
        self.edit = edit

    def forward(self, x: Float[Tensor, "... channels"]) -> Float[Tensor, "... projected"]:
        projected = self.project(x)
        kept = projected.shape[-1] - self.gates
        return torch.cat([projected[..., :kept], self.edit(projected[..., kept:])], dim=-1)


def fixed_gates(gates: Float[Tensor, "... gates"]) -> Float[Tensor, "... gates"]:
    """Every level, the global one included, weighs the same everywhere."""
    return torch.full_like(gates, 1 / gates.shape[-1])


def no_global_level(gates: Float[Tensor, "... gates"]) -> Float[Tensor, "... gates"]:
    """The last gate, that of the global level, is shut."""
    return torch.cat([gates[..., :-1], torch.zeros_like(gates[..., -1:])], dim=-1)


ABLATIONS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "full": None,
    "gates fixed": fixed_gates,
    "no global level": no_global_level,
}
SCHEDULE = Schedule(steps=240, batch_size=16, lr=1e-2)


def make_network(edit: Callable[[Tensor], Tensor] | None = None) -> FocalNet:
    """The isotropic FocalNet of the experiment, with edited gates in all its blocks."""
    config = FocalNetConfig(
        in_chans=NearOrFar.planes,
        num_classes=NearOrFar.symbols,
        patch_size=1,
        embed_dim=16,
        depths=(2,),
        focal_levels=(2,),
        focal_windows=(3,),
        mlp_ratio=2.0,
    )
    network = init_by_fan_in(FocalNet(config))
    if edit is not None:
        for module in network.modules():
            if isinstance(module, FocalModulation):
                module.register_module("project_in", EditedGates(module, edit))
    return network


def compare_ablations(run: Run) -> Finding:
    """Accuracy of the full network and of both ablations on new pictures, and the full one's gates, over seeds."""
    task = NearOrFar()

    def once(seed: int) -> dict[str, float]:
        networks = {name: build(seed, partial(make_network, edit)) for name, edit in ABLATIONS.items()}
        train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        unseen = task.batch(500, generator(seed + 500))
        asks_far = unseen[3] == 1
        measured = gate_sizes(networks["full"], unseen)
        for name, network in networks.items():
            measured[name] = task.percent_right(network, unseen)
            measured[f"{name}: near dots"] = task.percent_right(network, unseen, of=~asks_far)
            measured[f"{name}: far dots"] = task.percent_right(network, unseen, of=asks_far)
        return measured

    repetitions = run.repeat(8, once)
    figures = {name: [measured[name] for measured in repetitions] for name in repetitions[0]}
    intervals = {name: t_interval(values) for name, values in figures.items()}

    def difference(more: str, less: str) -> Interval:
        return t_interval([a - b for a, b in zip(figures[more], figures[less], strict=True)])

    def bars(title: str, x_label: str, groups: Collection[str], x_range: tuple[float, float] | None) -> Bars:
        labels = [f"{group}: {dots} dots" for group in groups for dots in ("near", "far")]
        shown = {label: (intervals[label].value, intervals[label].low, intervals[label].high) for label in labels}
        return Bars(title, x_label, shown, {label: figures[label] for label in labels}, x_range=x_range)

    return Finding(
        measured=(
            Measured("accuracy of the full network", intervals["full"], "%"),
            Measured(
                "accuracy lost without the global level",
                difference("full", "no global level"),
                "points",
                at_least(10, contrary_below=0),
            ),
            Measured(
                "accuracy lost with fixed gates",
                difference("full", "gates fixed"),
                "points",
                at_least(0),
            ),
            Measured(
                "size of the global gate, far minus near dots",
                difference(f"{GLOBAL}: far dots", f"{GLOBAL}: near dots"),
            ),
        ),
        charts=(
            bars("Accuracy by what a dot asks for", "% right (chance: 10)", list(ABLATIONS), (0, 105)),
            bars("Gates of the full network", "mean size", list(GATES.values()), None),
        ),
    )


GATES = {"level 0": "gate of the 3x3 level", "level 1": "gate of the 5x5 level", "global": "gate of the global level"}
GLOBAL = GATES["global"]


def gate_sizes(network: FocalNet, batch: Batch) -> dict[str, float]:
    """Mean size of each gate at dots that ask near and at dots that ask far, over all blocks."""
    pictures, cells, _, asks_far = batch
    readings = capture(network, pictures)
    sizes = {}
    for name, title in GATES.items():
        size = torch.stack([reading.maps[name].abs().flatten(1).gather(1, cells) for reading in readings]).mean(0)
        sizes[f"{title}: near dots"] = size[asks_far == 0].mean().item()
        sizes[f"{title}: far dots"] = size[asks_far == 1].mean().item()
    return sizes


CLAIM = Claim(
    statement="Context gathered at several ranges, the whole map included, and gated by each position's own content, "
    "can stand in for self-attention at a cost that grows linearly with the pixels.",
    source="Yang et al. 2022, abstract",
    published=(
        Published("ImageNet-1K top-1 of tiny, small, base (large receptive field)", "82.3, 83.5, 83.9 %", "model zoo"),
        Published("ImageNet-1K top-1 of large, pre-trained on ImageNet-22K, 224 pixels", "86.5 %", "abstract"),
    ),
    design="Cost is counted and timed at three sizes against attention of the same width; two identities that follow "
    "from the definition are checked on random weights; and a network of two focal blocks (width 16, levels 3 and 5, "
    "one cell per token: the paper's isotropic form) learns to name, at six dots per picture, either the symbol beside "
    f"the dot or one 5 to 10 cells away, as the dot's kind asks. It is compared, over {SCHEDULE.steps} equal steps, "
    "with itself under gates fixed at 1/3 and without its global level, which leaves a reach of 6 cells.",
    limits="The task is made of nothing but the need for two ranges, so it shows what gates and global level can do, "
    "not how much natural images need them; the paper's accuracies are out of reach of minutes. What fixed gates lose "
    "depends on the width: with 32 channels instead of 16 some are spared for each range, and the loss shrinks to a "
    "few points. All variants keep their parameters: unused gates are ignored, not removed.",
    cautions=(
        "Accuracies after so few steps compare how readily the variants learn, not where they would end.",
        "Initial weights are scaled to the small width, alike in all variants; the published 0.02 learns nothing here.",
    ),
    budget_s=170,
    parts=(
        Part(
            "Linear cost",
            "Focal modulation (width 96, 3 levels) against self-attention with 3 heads, at 28, 56 and 112 pixels a "
            "side: MACs counted, time measured on one thread, interleaved.",
            measure_cost,
            seconds=20,
        ),
        Part(
            "Identities",
            "Growing kernels by zeros changes no output; with circular padding a shifted map gives shifted outputs, "
            "because the global level does not care where things are.",
            check_identities,
            seconds=3,
        ),
        Part(
            "Gates and the global level",
            "Accuracy on 500 new pictures after equal training: full, gates fixed, no global level; eight seeds, "
            "differences taken within a seed.",
            compare_ablations,
            seconds=70,
        ),
    ),
)
