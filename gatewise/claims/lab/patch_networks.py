"""Small networks on patches, side by side on handwritten digits: two claims compare with the same baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.claims.lab.comparison import Comparison, compare_accuracy
from gatewise.claims.lab.digits import Digits
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import Schedule
from gatewise.networks.image.activator import Activator, ActivatorConfig
from gatewise.networks.image.ninformer import MixerBlock, Ninformer, NinformerConfig
from gatewise.networks.image.skeletons.patches import PatchConfig, PatchNetwork

SIZES: dict[str, Any] = {
    "in_chans": 1,
    "num_classes": 10,
    "patch_size": 2,
    "embed_dim": 64,
    "hidden_dim": 128,
    "depth": 2,
    "drop_rate": 0.1,
}
"""Of every network that is compared."""

TOKENS = 16
SCHEDULE = Schedule(steps=300, batch_size=64, lr=1e-3, weight_decay=0.0)


class VisionTransformer(PatchNetwork):
    """Attention and an MLP per block, with learned positions: (B, 1, 8, 8) -> (B, 10)."""

    def __init__(self, config: PatchConfig) -> None:
        def block(rate: float) -> nn.Module:
            return nn.TransformerEncoderLayer(
                config.embed_dim, 4, config.hidden_dim, config.drop_rate, "gelu", batch_first=True, norm_first=True
            )

        super().__init__(config, block)
        self.positions = nn.Parameter(0.02 * torch.randn(TOKENS, config.embed_dim))
        self.blocks.insert(0, Positions(self.positions))


class Positions(nn.Module):
    """Positions added to tokens."""

    def __init__(self, positions: nn.Parameter) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


def make_mixer(config: PatchConfig) -> PatchNetwork:
    """MLP-Mixer of the same sizes."""
    return PatchNetwork(config, lambda rate: MixerBlock(config.embed_dim, TOKENS, config.hidden_dim, config.drop_rate))


NETWORKS: Mapping[str, Callable[[], PatchNetwork]] = {
    "Activator": lambda: Activator(ActivatorConfig(**SIZES)),
    "Activator, units alone": lambda: Activator(ActivatorConfig(**SIZES, block="glu_only")),
    "NiNformer": lambda: Ninformer(NinformerConfig(**SIZES, num_tokens=TOKENS)),
    "MLP-Mixer": lambda: make_mixer(PatchConfig(**SIZES)),
    "ViT": lambda: VisionTransformer(PatchConfig(**SIZES)),
}


def compare_on_digits(run: Run, names: tuple[str, ...], seeds: int = 4) -> Comparison:
    """Train the named networks side by side for each seed."""
    return compare_accuracy(run, {name: NETWORKS[name] for name in names}, Digits(), SCHEDULE, seeds)
