"""NiNformer in miniature: what its gate contains, what it keeps in memory, and what it learns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from gatewise.claims.lab.base import Claim, Finding, Measured, Part, Published, at_least, at_most, between
from gatewise.claims.lab.checks import generator, relative_difference
from gatewise.claims.lab.intervals import exact
from gatewise.claims.lab.kept_bytes import kept_bytes
from gatewise.claims.lab.patch_networks import SCHEDULE, compare_on_digits
from gatewise.claims.lab.plot import Lines
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.networks.image.ninformer import NinformerBlock

PARAMETERS = {"ninformer_cifar10": 2_652_170, "ninformer_cifar100": 2_675_300, "ninformer_mnist": 2_582_478}


def make_block(tokens: int, seed: int) -> NinformerBlock:
    """A block of width 24 in float64."""
    return build(seed, partial(NinformerBlock, 24, tokens, 40)).double().eval()


def check_identities(run: Run) -> Finding:
    """Check what a block reduces to with a gate of ones, and with a projection of ones."""
    x = torch.randn(2, 10, 24, generator=generator(run.seed), dtype=torch.float64)
    mixed, gated = make_block(10, run.seed), make_block(10, run.seed)
    with torch.no_grad():
        nn.init.zeros_(mixed.gate.project.weight)
        nn.init.ones_(mixed.gate.project.bias)
        normed = mixed.norm(x)
        as_mixer = x + mixed.gate.mixer(normed)
        mixer_error = relative_difference(mixed(x), as_mixer + mixed.mlp(mixed.norm(as_mixer)))
        gated.gate.register_module("mixer", Ones())
        linear = x + gated.gate.project(gated.norm(x))
        linear_error = relative_difference(gated(x), linear + gated.mlp(gated.norm(linear)))
    with torch.device("meta"):
        wrong = sum(
            sum(p.numel() for p in registered(name).parameters()) != parameters
            for name, parameters in PARAMETERS.items()
        )
    return Finding(
        measured=(
            Measured("projection of ones: from a Mixer block", exact(mixer_error), "", at_most(1e-12)),
            Measured("gate of ones: from a linear block", exact(linear_error), "", at_most(1e-12)),
            Measured("networks with other numbers of parameters than published", exact(wrong), "", between(0, 0)),
        ),
    )


class Ones(nn.Module):
    """A gate that is open."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def registered(name: str) -> nn.Module:
    """The network of a registered name."""
    from gatewise.catalog.factory import create_model

    return create_model(name)


class AttentionMap(nn.Module):
    """Attention whose map is kept for the backward pass, and a perceptron, as NiNformer's blocks: (B, N, C)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.project(weights @ v)
        return x + self.mlp(self.norm(x))


TOKENS = (64, 256, 1024)


def measure_memory(run: Run) -> Finding:
    """Activations kept for training by a block of each kind as tokens grow, the hidden width held."""
    kept: dict[str, list[float]] = {"NiNformer": [], "attention, map kept": []}
    for tokens in TOKENS:
        x = torch.randn(1, tokens, 64, generator=generator(run.seed))
        kept["NiNformer"].append(kept_bytes(build(run.seed, partial(NinformerBlock, 64, tokens, 128)), x) / 2**20)
        kept["attention, map kept"].append(kept_bytes(build(run.seed, partial(AttentionMap, 64, 128)), x) / 2**20)
    growth = {name: values[-1] / values[0] for name, values in kept.items()}
    return Finding(
        measured=(
            Measured("NiNformer, 16 times the tokens", exact(growth["NiNformer"]), "x", at_most(16)),
            Measured("attention, 16 times the tokens", exact(growth["attention, map kept"]), "x", at_least(16)),
        ),
        charts=(Lines("Activations kept by a block", "tokens", "MiB", TOKENS, kept, log="xy"),),
        remark="Fused attention does not keep its map either; its time still grows with the square.",
    )


NAMES = ("NiNformer", "MLP-Mixer", "ViT")


def compare_networks(run: Run) -> Finding:
    """Test accuracy on digits after equal training."""
    found = compare_on_digits(run, NAMES)
    return Finding(
        measured=(
            *(Measured(f"accuracy, {name}", found.intervals[name], "%") for name in NAMES),
            Measured("NiNformer minus MLP-Mixer", found.gap("NiNformer", "MLP-Mixer"), "points", at_least(0)),
            Measured("MLP-Mixer minus ViT", found.gap("MLP-Mixer", "ViT"), "points", at_least(0)),
        ),
        charts=(found.chart(f"Accuracy on digits after {SCHEDULE.steps} steps", "% of 360 test images"),),
    )


CLAIM = Claim(
    statement="A gate that a whole MLP-Mixer block computes makes a better block than attention or the mixer alone, "
    "with memory linear in the tokens.",
    source="Abdullah and Aydin 2024, abstract",
    published=(
        Published(
            "MNIST, CIFAR-10, CIFAR-100 against ViT, MLP-Mixer, Local-ViT of the same size", "more accurate", "paper"
        ),
    ),
    design="Blocks are reduced to a Mixer block and to a linear one by setting weights, in float64. What the backward "
    "pass keeps is counted for 64 to 1,024 tokens, beside attention. Then networks of equal sizes (patch 2, width 64, "
    f"two blocks) learn 8x8 digits for {SCHEDULE.steps} equal steps.",
    limits="The published comparisons are on images of 28 and 32 pixels for 100 epochs; here it is 8x8 digits in "
    "seconds, with a training set that all three nearly learn by heart.",
    cautions=(
        "Widths are equal, parameters are not: a NiNformer block holds a Mixer block and more.",
        "Matrices over tokens fix the number of tokens: other image sizes are refused.",
        "The published script augments the test images as well; scores of such a run are not comparable.",
    ),
    budget_s=170,
    parts=(
        Part("Identities", "Blocks with gates and projections of ones; parameters.", check_identities, 2),
        Part("Memory", "Activations kept for training as tokens grow.", measure_memory, 2),
        Part("Digits", "Equal steps, four seeds, differences within a seed.", compare_networks, 120),
    ),
)
