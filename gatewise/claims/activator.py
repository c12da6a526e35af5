"""Activator in miniature: what gated units on their own can see, what they cost, and what they learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, randomise, relative_difference
from gatewise.claims.lab.intervals import exact
from gatewise.claims.lab.patch_networks import SCHEDULE, compare_on_digits
from gatewise.claims.lab.plot import Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.activator import Activator, ActivatorConfig
from gatewise.networks.image.ninformer import Ninformer, NinformerConfig

PATCH = 4


def permute_patches(images: Tensor, order: Tensor) -> Tensor:
    """Images (B, C, H, W) with their square patches in another order."""
    rows, columns = images.shape[2] // PATCH, images.shape[3] // PATCH
    cut = images.unflatten(2, (rows, PATCH)).unflatten(4, (columns, PATCH)).permute(2, 4, 0, 1, 3, 5)
    cut = cut.flatten(0, 1)[order].unflatten(0, (rows, columns))
    return cut.permute(2, 3, 0, 4, 1, 5).flatten(4).flatten(2, 3)


def check_order(run: Run) -> Finding:
    """How much the logits move when the patches of an image are put in another order."""
    draw = generator(run.seed)
    images = torch.randn(2, 3, 32, 32, generator=draw)
    permuted = permute_patches(images, torch.randperm(64, generator=draw))
    sizes: dict[str, Any] = {"num_classes": 10, "embed_dim": 48, "hidden_dim": 64, "depth": 3}
    networks = {
        "Activator": build(run.seed, lambda: Activator(ActivatorConfig(**sizes))),
        "NiNformer": build(run.seed, lambda: Ninformer(NinformerConfig(**sizes))),
    }
    with torch.no_grad():
        moved = {
            name: relative_difference(randomise(network, run.seed)(permuted), network(images))
            for name, network in networks.items()
        }
    return Finding(
        measured=(
            Measured("Activator's logits, patches permuted", exact(moved["Activator"]), "", at_most(1e-5)),
            Measured("NiNformer's logits, for comparison", exact(moved["NiNformer"]), "", at_least(1e-2)),
        ),
        remark="The published network is a bag of patches: no token learns of another.",
    )


SIDES = (8, 16, 32, 64)


def count_cost(run: Run) -> Finding:
    """Parameters and MACs of the published networks, and of a unit against attention as tokens grow."""
    costs = {}
    for block in ("full", "glu_only"):
        with torch.device("meta"):
            network = Activator(ActivatorConfig(num_classes=10, block=block)).eval()
            costs[block] = count(network, torch.empty(1, 3, 32, 32))
    dim, hidden = 256, 512
    tokens = [side**2 for side in SIDES]
    unit = [3 * dim * hidden / 1e3 for _ in tokens]
    attention = [(4 * dim**2 + 2 * n * dim) / 1e3 for n in tokens]
    break_even = (3 * hidden - 4 * dim) / 2
    return Finding(
        measured=(
            Measured("parameters, with perceptrons", exact(costs["full"].parameters), "", between(2650890, 2650890)),
            Measured("parameters, units alone", exact(costs["glu_only"].parameters), "", between(1599242, 1599242)),
            Measured(
                "MACs of units alone over both",
                exact(costs["glu_only"].macs / costs["full"].macs),
                "",
                between(0.59, 0.61),
            ),
            Measured("tokens from which a unit costs less than attention", exact(break_even), "", between(256, 256)),
        ),
        charts=(
            Lines(
                f"A unit ({dim}, {hidden}) against attention",
                "tokens",
                "thousand MACs per token",
                tokens,
                {"gated unit": unit, "attention": attention},
                log="xy",
            ),
        ),
        remark="At the 64 tokens of the published network a unit costs more than attention would.",
    )


NAMES = ("Activator", "Activator, units alone", "MLP-Mixer", "ViT")


def compare_networks(run: Run) -> Finding:
    """Test accuracy on digits after equal training."""
    found = compare_on_digits(run, NAMES)
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", found.intervals[name], "%") for name in NAMES),
            Measured("Activator minus MLP-Mixer", found.gap("Activator", "MLP-Mixer"), "points", at_least(0)),
            Measured("Activator minus ViT", found.gap("Activator", "ViT"), "points", at_least(0)),
        ),
        charts=(found.chart(f"Accuracy on digits after {SCHEDULE.steps} steps", "% of 360 test images"),),
        remark="Where something stands in an 8x8 digit matters, and a bag of patches does not know it.",
    )


CLAIM = Claim(
    statement="Gated linear units can take the place of attention, and of the perceptrons too, in a vision "
    "transformer, which then is more accurate at the same training budget.",
    source="Abdullah and Aydin 2024, abstract",
    published=(
        Published("CIFAR-10: Activator, MLP-Mixer, ViT", "73.2, 70.1, 65.7 %", "published summary"),
        Published("CIFAR-100: Activator, MLP-Mixer, ViT", "46.1, 39.2, 34.9 %", "published summary"),
    ),
    design="Patches of an image are put in another order, and the logits compared. Parameters and MACs of the "
    "published networks are counted, and a unit's cost is set against attention's. Then networks of equal sizes "
    f"(patch 2, width 64, two blocks) learn 8x8 digits for {SCHEDULE.steps} equal steps.",
    limits="The published order of accuracies is for 100 epochs of CIFAR, where textures tell much without their "
    "places. On digits, which are told by where strokes are, the published code itself stays behind its baselines.",
    cautions=(
        "The published network has no interaction between tokens: it does not substitute for what attention does.",
        "The paper's versions differ in which block their scores are for.",
        "Dropout of 0.5 makes outputs in training mode very different: call eval().",
    ),
    budget_s=170,
    parts=(
        Part("Order of patches", "Logits of an image and of its patches permuted.", check_order, 2),
        Part("Cost", "Parameters and MACs of the published networks; a unit against attention.", count_cost, 2),
        Part("Digits", "Equal steps, four seeds, differences within a seed.", compare_networks, 120),
    ),
)
