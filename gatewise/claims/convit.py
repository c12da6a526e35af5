"""ConViT in miniature: heads that start as the taps of a convolution, and what that is worth when images are few."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference
from gatewise.claims.lab.clothes import Clothes
from gatewise.claims.lab.intervals import exact, t_interval
from gatewise.claims.lab.plot import Bars, Pictures
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule, build, train_side_by_side
from gatewise.layers.self_attention import SelfAttention
from gatewise.networks.image.convit import Convit, ConvitConfig, GatedPositionalSelfAttention, non_locality
from gatewise.ops.gated_positional_attention import (
    gated_positional_attention,
    gated_positional_attention_reference,
    position_weights,
)

GRID = (14, 14)


def check_convolution(run: Run) -> Finding:
    """A layer as it starts, sharpened and with its gates open, against the shifts of a 3x3 convolution."""
    layer = build(run.seed, partial(GatedPositionalSelfAttention, 9, 9, locality_strength=20.0)).double()
    x = torch.randn(1, 12, 10, 9, generator=generator(run.seed), dtype=torch.float64)
    with torch.no_grad():
        layer.gating_param.fill_(50.0)
        layer.proj.weight.copy_(torch.eye(9))
        layer.proj.bias.zero_()
        y = layer(x)
    taps = [(head % 3 - 1, head // 3 - 1) for head in range(9)]
    errors = [
        (y[0, 1:-1, 1:-1, head] - x[0, 1 + row : 11 + row, 1 + column : 9 + column, head]).abs().max().item()
        for head, (row, column) in enumerate(taps)
    ]
    soft = position_weights(build(run.seed, partial(GatedPositionalSelfAttention, 9, 9)).pos_proj.weight, (7, 7))
    return Finding(
        measured=(Measured("error of nine heads against nine shifts", exact(max(errors)), "", at_most(1e-3)),),
        charts=(
            Pictures(
                "Where heads look at first, from the middle of a 7x7 grid",
                {f"head {head}": soft[head, 24].reshape(7, 7).tolist() for head in range(9)},
            ),
        ),
    )


def check_locality(run: Run) -> Finding:
    """How far a fresh network's heads look, and the gates it starts with."""
    layers = [build(run.seed + i, partial(GatedPositionalSelfAttention, 192, 4)) for i in range(10)]
    x = torch.randn(1, *GRID, 192, generator=generator(run.seed))
    with torch.no_grad():
        for layer in layers:
            nn.init.trunc_normal_(layer.qk.weight, std=0.02)
        distances = torch.stack([non_locality(layer.attention(x), GRID) for layer in layers])
    uniform = non_locality(torch.full((1, 1, 196, 196), 1 / 196), GRID).item()
    return Finding(
        measured=(
            Measured("mean attention distance at first", exact(distances.mean().item()), "patches", between(2.5, 2.9)),
            Measured("the same of attention that is even", exact(uniform), "patches", between(7.2, 7.4)),
            Measured(
                "share of position at first",
                exact(layers[0].gating_param.sigmoid().mean().item()),
                "",
                between(0.73, 0.732),
            ),
        ),
    )


def check_factors(run: Run) -> Finding:
    """Attention by position as two small products, against the map of all pairs, on a grid that is not square."""
    draw = generator(run.seed)
    q, k, v = (torch.randn(2, 9, 14, 4, 12, generator=draw) for _ in range(3))
    weights, gates = torch.randn(4, 3, generator=draw), torch.randn(4, generator=draw)
    found = gated_positional_attention(q, k, v, weights, gates)
    expected = gated_positional_attention_reference(*(x.double() for x in (q, k, v, weights, gates)))
    return Finding(
        measured=(
            Measured("relative difference", exact(relative_difference(found.double(), expected)), "", at_most(5e-6)),
        ),
    )


CONFIG = ConvitConfig(
    image_size=28,
    in_chans=1,
    num_classes=10,
    patch_size=4,
    embed_dim=48,
    num_heads=4,
    depth=4,
    mlp_ratio=2.0,
    local_up_to_layer=3,
)
FEW, MANY = 200, 2000
SCHEDULE = Schedule(steps=500, batch_size=32, lr=1e-3)


class SomeClothes(Clothes):
    """A part of the training images, taken evenly: they come sorted by kind."""

    def __init__(self, images: int) -> None:
        super().__init__()
        every = len(self.train[1]) // images
        self.train = (self.train[0][::every][:images], self.train[1][::every][:images])

    @torch.no_grad()
    def percent_learnt(self, model: nn.Module) -> float:
        """Of the training images, some 500."""
        every = max(1, len(self.train[1]) // 500)
        images, labels = self.train[0][::every], self.train[1][::every]
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


def make_network(local: bool) -> Convit:
    """The small network, with or without gated positional layers."""
    network = Convit(CONFIG)
    if not local:
        for block in network.blocks[: CONFIG.local_up_to_layer]:
            mixer = SelfAttention(CONFIG.embed_dim, CONFIG.num_heads, qkv_bias=False)
            nn.init.trunc_normal_(mixer.qkv.weight, std=0.02)
            nn.init.trunc_normal_(mixer.proj.weight, std=0.02)
            block.register_module("mixer", mixer)
    return network


KINDS = {"gated positional": True, "self-attention": False}


def compare_samples(run: Run) -> Finding:
    """Test accuracy with few and with more training images, local layers against self-attention."""

    def once(seed: int) -> dict[str, float]:
        found = {}
        for images in (FEW, MANY):
            task = SomeClothes(images)
            networks = {kind: build(seed, partial(make_network, local)) for kind, local in KINDS.items()}
            train_side_by_side(networks, task, SCHEDULE, seed=seed, run=run)
            for kind, network in networks.items():
                found[f"{kind}, {images}"] = task.percent_right(network)
                found[f"learnt: {kind}, {images}"] = task.percent_learnt(network)
        return found

    seeds = run.repeat(3, once)
    found = {name: [one[name] for one in seeds] for name in seeds[0]}
    intervals = {name: t_interval(values) for name, values in found.items()}
    gaps = {
        images: [
            a - b for a, b in zip(found[f"gated positional, {images}"], found[f"self-attention, {images}"], strict=True)
        ]
        for images in (FEW, MANY)
    }
    tested = {name: one for name, one in intervals.items() if not name.startswith("learnt")}
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name} images", one, "%") for name, one in tested.items()),
            Measured(f"ahead with {FEW} images", t_interval(gaps[FEW]), "points", at_least(0)),
            Measured(f"ahead with {MANY} images", t_interval(gaps[MANY]), "points", at_least(0)),
            Measured(
                "how much more with few",
                t_interval([a - b for a, b in zip(gaps[FEW], gaps[MANY], strict=True)]),
                "points",
                at_least(0),
            ),
        ),
        charts=(
            Bars(
                f"Accuracy on clothes after {SCHEDULE.steps} steps",
                "% of 2,000 test images",
                {name: (one.value, one.low, one.high) for name, one in tested.items()},
                points={name: found[name] for name in tested},
            ),
        ),
        remark="Training images told right: "
        + "; ".join(
            f"{name.removeprefix('learnt: ')} images {one.value:.1f} %"
            for name, one in intervals.items()
            if name.startswith("learnt")
        ),
    )


CLAIM = Claim(
    statement="Attention that starts as a soft convolution, and may leave it head by head, makes vision transformers "
    "learn from fewer images.",
    source="d'Ascoli et al. 2021, abstract",
    published=(
        Published("ImageNet-1K top-1 at 224: tiny, small, base", "73.1, 81.3, 82.4 %", "official README"),
        Published("with 5 % of the images: ConViT-S, DeiT-S", "47.8, 34.8 %", "recalled"),
        Published("with 10 % of the images: ConViT-S, DeiT-S", "59.6, 48.0 %", "recalled"),
        Published("with all images: ConViT-S, DeiT-S", "81.4, 79.9 %", "recalled"),
    ),
    design="A layer with sharp, open gates is held against a 3x3 convolution; the reach and the gates of fresh layers "
    "are measured; the factors of attention by position are held against its definition. Then networks of width 48 "
    f"(three gated positional layers and one of self-attention, or self-attention alone) learn {FEW} and {MANY} "
    f"pictures of clothes (Fashion-MNIST) for {SCHEDULE.steps} equal steps, without augmentation.",
    limits="Networks, images and training are thousands of times smaller than on ImageNet; the published gaps cannot "
    "be expected in size.",
    cautions=(
        "Epochs are not equal where the number of images differs: steps are.",
        "Very small networks trained briefly end as noise: see whether both have learnt their training images.",
        "No ImageNet accuracy is measured here.",
    ),
    budget_s=175,
    parts=(
        Part("A convolution at first", "Nine heads against nine shifts.", check_convolution, 1),
        Part("Locality at first", "Attention distance and gates of fresh layers on a 14x14 grid.", check_locality, 2),
        Part("Factors", "Two small products against the map of all pairs.", check_factors, 1),
        Part("Few images", "Clothes, equal steps, three seeds, differences within a seed.", compare_samples, 150),
    ),
)
