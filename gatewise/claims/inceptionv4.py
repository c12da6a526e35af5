"""Inception-v4 and Inception-ResNet in miniature: what shortcuts do for training, and what the scale does for them.

Deep stacks of the same branches, with shortcuts at several scales and without any, are looked at as they are drawn, and
trained side by side on handwritten digits.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, randomise, relative_difference
from gatewise.claims.lab.digits import Digits
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, train_side_by_side
from gatewise.efficiency.acceleration.fold import fold
from gatewise.networks.image.inceptionv4 import Builder, Inception, InceptionConfig, ResidualBranches

BLOCK17 = ("1x1 192", "1x1 128, 1x7 160, 7x1 192")
PUBLISHED_PARAMETERS = {
    "A": 317_632,
    "reduction A": 2_306_112,
    "B": 2_936_256,
    "reduction B": 2_747_392,
    "C": 4_553_088,
}


def check_modules(run: Run) -> Finding:
    """Parameters of Inception-v4's modules, and a folded network against an unfolded one."""
    with torch.device("meta"):
        stages = list(Inception(InceptionConfig(depths=(1, 1, 1))).stages)[6:]
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in zip(PUBLISHED_PARAMETERS, stages, strict=True)
    }
    wrong = sum(counts[name] != published for name, published in PUBLISHED_PARAMETERS.items())
    config = InceptionConfig(architecture="resnet_v2", width=0.125, depths=(2, 2, 2), num_classes=10)
    network = randomise(build(run.seed, partial(Inception, config)), run.seed)
    images = torch.randn(2, 3, 107, 91, generator=generator(run.seed))
    with torch.no_grad():
        difference = relative_difference(fold(network)(images), network(images))
    return Finding(
        measured=(
            Measured("modules with another number of parameters than published", exact(wrong), "", between(0, 0)),
            Measured("relative difference of folded norms and scales", exact(difference), "", at_most(1e-4)),
        ),
    )


def block_stack(dim: int, depth: int, scale: float, width: float, shortcut: bool = True) -> nn.Sequential:
    """Blocks 17 of the published code, one behind the other."""
    builder = Builder(InceptionConfig(width=width))
    builder.dim = dim
    blocks: list[nn.Module] = [builder.residual(*BLOCK17, scale=scale) for _ in range(depth)]
    return nn.Sequential(*(block if shortcut else Plain(block) for block in blocks))


class Plain(nn.Module):
    """The branches and projection of a residual block, without its shortcut: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if not isinstance(block, ResidualBranches):
            raise TypeError(f"expected a residual block, not {type(block).__name__}")
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block.project(self.block.branches(x)))


SCALES = (1.0, 0.3, 0.1)


def compare_scales(run: Run) -> Finding:
    """How the spread of activations changes through twenty blocks as drawn, at the published width."""

    def once(seed: int) -> dict[float, float]:
        x = F.relu(torch.randn(4, 1088, 6, 6, generator=generator(seed)))
        growth = {}
        for scale in SCALES:
            stack = build(seed, partial(block_stack, 1088, 20, scale, 1.0)).train()
            with torch.no_grad():
                growth[scale] = (stack(x).std() / x.std()).item()
            run.check_time()
        return growth

    seeds = run.repeat(3, once)
    found = {scale: t_interval([one[scale] for one in seeds]) for scale in SCALES}
    return Finding(
        measured=(
            Measured("spread behind 20 blocks over before, scale 1", found[1.0], "x", at_least(1.5)),
            Measured("the same, scale 0.3", found[0.3], "x", between(0.8, 1.3)),
            Measured("the same, scale 0.1", found[0.1], "x", between(0.8, 1.2)),
        ),
        charts=(
            Bars(
                "Spread of activations behind 20 blocks over before",
                "times",
                {f"scale {scale:g}": (one.value, one.low, one.high) for scale, one in found.items()},
                limit=1.0,
                limit_label="unchanged",
            ),
        ),
    )


WIDTH, DIM, DEPTH = 1 / 16, 24, 16
SCHEDULE = Schedule(steps=150, batch_size=32, lr=2e-3)


class DigitNetwork(nn.Module):
    """A stem, a stack of blocks at one resolution, mean over positions, linear classifier: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, scale: float, shortcut: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, DIM, 3, padding=1)
        self.blocks = block_stack(DIM, DEPTH, scale, WIDTH, shortcut)
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean(dim=(2, 3)))


KINDS = {"shortcuts, scale 0.2": (0.2, True), "shortcuts, scale 1": (1.0, True), "no shortcuts": (1.0, False)}


def compare_training(run: Run) -> Finding:
    """Training loss and test accuracy after equal steps, with and without shortcuts."""
    task = Digits()

    def once(seed: int) -> dict[str, tuple[float, float]]:
        networks = {kind: build(seed, partial(DigitNetwork, *options)) for kind, options in KINDS.items()}
        losses = train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
        return {kind: (losses[kind], task.percent_right(network)) for kind, network in networks.items()}

    seeds = run.repeat(3, once)
    losses = {kind: [one[kind][0] for one in seeds] for kind in KINDS}
    right = {kind: t_interval([one[kind][1] for one in seeds]) for kind in KINDS}
    intervals = {kind: t_interval(values) for kind, values in losses.items()}
    gained = [a - b for a, b in zip(losses["no shortcuts"], losses["shortcuts, scale 0.2"], strict=True)]
    return Finding(
        measured=(
            *(Measured(f"training loss at the end, {kind}", interval) for kind, interval in intervals.items()),
            *(Measured(f"test accuracy, {kind}", interval, "%") for kind, interval in right.items()),
            Measured("training loss, no shortcuts minus scale 0.2", t_interval(gained), "", at_least(0)),
        ),
        charts=(
            Bars(
                f"Training loss after {SCHEDULE.steps} steps",
                "cross-entropy",
                {kind: (one.value, one.low, one.high) for kind, one in intervals.items()},
                points=losses,
            ),
        ),
    )


CLAIM = Claim(
    statement="Shortcuts speed up the training of Inception networks, and wide residual branches are kept stable by "
    "scaling them down.",
    source="Szegedy et al. 2016, abstract and section 3.3",
    published=(
        Published("top-1 / top-5 error, single crop: Inception-v4", "20.0 / 5.0 %", "results table, recalled"),
        Published("the same, Inception-ResNet-v2", "19.9 / 4.9 %", "results table, recalled"),
        Published("scales that keep wide networks alive", "0.1 to 0.3", "section 3.3"),
    ),
    design="Parameters of the modules are counted, and a network is folded. Twenty blocks of the published width are "
    "drawn at three scales, and the spread of activations is measured behind them. Then stacks of "
    f"{DEPTH} narrow blocks learn handwritten digits for {SCHEDULE.steps} equal steps: with shortcuts at two scales, "
    "and without.",
    limits="The stacks are a sixteenth as wide as published, on 8x8 images. That unscaled networks die after tens of "
    "thousands of steps at more than a thousand channels cannot be shown in minutes; what shows is how the unscaled "
    "sum grows.",
    cautions=("Batch norm within the branches keeps narrow unscaled networks trainable; the scale matters when wide.",),
    budget_s=150,
    parts=(
        Part("Modules", "Parameters against the published code; folding.", check_modules, 6),
        Part("Scale", "Spread of activations behind 20 blocks of 1,088 channels, three seeds.", compare_scales, 30),
        Part("Shortcuts", "Digits, equal steps, differences within a seed.", compare_training, 90),
    ),
)
