"""NiNformer: a whole MLP-Mixer block computes the gate of the tokens.

A block projects its tokens and multiplies them elementwise by the output of an inner network on the same tokens: an MLP
over tokens, then one over channels, each with its shortcut. The gate is not squashed, and no token-by-token map is
formed.

Paper: Abdullah and Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
2024, arXiv:2403.02411.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.drop_path import DropPath
from gatewise.layers.mlp import Mlp
from gatewise.networks.image.skeletons.patches import PatchConfig, PatchNetwork

Tokens = Float[Tensor, "batch tokens dim"]


@dataclass(frozen=True)
class NinformerConfig(PatchConfig):
    """Sizes of a NiNformer.

    Args:
        num_tokens: number of patches per image, which fixes the size of the matrices over tokens. The image may have
            any shape that gives this number.
    """

    num_tokens: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, not {self.num_tokens}")


class TokenMlp(Mlp):
    """An MLP over tokens, applied to each channel separately: (B, N, C) -> (B, N, C)."""

    def forward(self, x: Tokens) -> Tokens:
        # Multiplying weights from the left avoids a transpose.
        hidden = self.drop(F.gelu(self.fc1.weight @ x + self.fc1.bias[:, None]))
        return self.drop(self.fc2.weight @ hidden + self.fc2.bias[:, None])


class MixerBlock(nn.Module):
    """x + token_mlp(norm(x)), then x + channel_mlp(norm(x)): (B, N, C) -> (B, N, C).

    Source: Tolstikhin et al. 2021, arXiv:2105.01601, with one width for both MLPs.
    """

    def __init__(self, dim: int, num_tokens: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(dim)
        self.token_mlp = TokenMlp(num_tokens, hidden_dim, drop_rate)
        self.channel_norm = nn.LayerNorm(dim)
        self.channel_mlp = Mlp(dim, hidden_dim, drop_rate)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.token_mlp(self.token_norm(x))
        return x + self.channel_mlp(self.channel_norm(x))


class MixerGate(nn.Module):
    """(W x + b) * mixer(x): (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_tokens: int, hidden_dim: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.mixer = MixerBlock(dim, num_tokens, hidden_dim, drop_rate)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.project(x) * self.mixer(x)

    def read_gates(self, x: Tokens) -> dict[str, Tensor]:
        """Return the root mean square of each token's gate: (B, N)."""
        return {"gate": self.mixer(x).square().mean(dim=-1).sqrt()}


class NinformerBlock(nn.Module):
    """x + gate(norm(x)), then x + mlp(norm(x)) with the same norm: (B, N, C) -> (B, N, C)."""

    def __init__(
        self, dim: int, num_tokens: int, hidden_dim: int, drop_rate: float = 0.0, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path_rate)
        self.norm = nn.LayerNorm(dim)
        self.gate = MixerGate(dim, num_tokens, hidden_dim, drop_rate)
        self.mlp = Mlp(dim, hidden_dim, drop_rate)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.drop_path(self.gate(self.norm(x)))
        return x + self.drop_path(self.mlp(self.norm(x)))


class Ninformer(PatchNetwork):
    """Blocks gated by mixers on patches; for images of any shape that gives the configured number of patches."""

    def __init__(self, config: NinformerConfig) -> None:
        block = partial(NinformerBlock, config.embed_dim, config.num_tokens, config.hidden_dim, config.drop_rate)
        super().__init__(config, block)

    def check_input(self, x: Tensor, min_size: int | None = None) -> None:
        super().check_input(x, min_size)
        patch, expected = self.config.patch_size, self.config.num_tokens
        tokens = (x.shape[2] // patch) * (x.shape[3] // patch)
        if tokens != expected:
            raise ValueError(
                f"{x.shape[2]} x {x.shape[3]} pixels in patches of {patch} make {tokens} tokens; the matrices over "
                f"tokens were made for {expected}"
            )


OFFICIAL = KeyLayout(
    "official",
    (
        ("^patcher", "stem"),
        ("^model", "blocks"),
        ("mgu.Mixer.token_mix.0", "gate.mixer.token_norm"),
        ("mgu.Mixer.token_mix.2.net.0", "gate.mixer.token_mlp.fc1"),
        ("mgu.Mixer.token_mix.2.net.3", "gate.mixer.token_mlp.fc2"),
        ("mgu.Mixer.channel_mix.0", "gate.mixer.channel_norm"),
        ("mgu.Mixer.channel_mix.1.net.0", "gate.mixer.channel_mlp.fc1"),
        ("mgu.Mixer.channel_mix.1.net.3", "gate.mixer.channel_mlp.fc2"),
        ("mgu.proj", "gate.project"),
        ("ffn.net.0", "mlp.fc1"),
        ("ffn.net.3", "mlp.fc2"),
        ("^classifier", "head"),
    ),
)


def layouts(config: NinformerConfig) -> list[KeyLayout]:
    """Return the layout of the published training script, which comes without weights."""
    return [OFFICIAL]


register(
    Ninformer,
    paper="ninformer",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "ninformer_cifar10": Variant(NinformerConfig(num_classes=10), (3, 32, 32)),
        "ninformer_cifar100": Variant(NinformerConfig(num_classes=100), (3, 32, 32)),
        "ninformer_mnist": Variant(NinformerConfig(in_chans=1, num_classes=10, num_tokens=49), (1, 28, 28)),
    },
)
