"""Activator: gated linear units in place of attention and almost everything else.

Every token is expanded twice, once through an activation. The two are normalized and multiplied, and the product is
contracted. A block is this unit only, or the unit and a plain MLP.

Nothing here passes information from token to token. Units, MLPs and norms act on each token separately, and tokens only
meet in the mean before the classifier. The network is a bag of patches, and the order of the patches does not matter.
This is how the published code works, although the paper presents the unit as a substitute for attention.

Paper: Abdullah and Aydin, "Activator: GLU Activation Function as the Core Component of a Vision Transformer", 2024,
arXiv:2405.15953. The published code uses GELU for the gate; SiLU and ReLU are from the paper's ablation.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewise.catalog.keys import KeyLayout
from gatewise.catalog.registry import Variant, register
from gatewise.layers.drop_path import DropPath
from gatewise.layers.mlp import Mlp
from gatewise.networks.image.skeletons.patches import PatchConfig, PatchNetwork

Activation = Literal["gelu", "silu", "relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}

Tokens = Float[Tensor, "*batch tokens dim"]


@dataclass(frozen=True)
class ActivatorConfig(PatchConfig):
    """Sizes and options of an Activator.

    Args:
        block: "full" for the unit and an MLP, or "glu_only" for only the unit, where `drop_rate` has no effect.
        act: activation of the gate.
    """

    block: Literal["full", "glu_only"] = "full"
    act: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block not in ("full", "glu_only"):
            raise ValueError(f"block must be full or glu_only, not {self.block!r}")
        _check_act(self.act)


def _check_act(act: str) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, not {act!r}")


class GatingUnit(nn.Module):
    """norm(act(W1 x)) * norm(W2 x), then contracted: (..., N, C) -> (..., N, C).

    Both factors share one norm with one set of weights.

    Args:
        hidden_dim: width of the two factors and their product.
    """

    def __init__(self, dim: int, hidden_dim: int, act: Activation = "gelu") -> None:
        super().__init__()
        _check_act(act)
        self.act = act
        self.gate = nn.Linear(dim, hidden_dim)
        self.value = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.project = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.project(self.gates(x) * self.norm(self.value(x)))

    def gates(self, x: Tokens) -> Float[Tensor, "*batch tokens hidden"]:
        """Return the factors of the values, which are neither bounded nor always positive."""
        return self.norm(ACTIVATIONS[self.act](self.gate(x)))

    def read_gates(self, x: Tokens) -> dict[str, Tensor]:
        """Return the root mean square of each token's gates: (..., N)."""
        return {"gate": self.gates(x).square().mean(dim=-1).sqrt()}

    def merged(self) -> nn.Module:
        """Return an equivalent unit for eval mode, with one matrix in place of two."""
        return MergedGatingUnit(self)


class MergedGatingUnit(nn.Module):
    """A `GatingUnit` for inference, with both expansions in one matrix: (..., N, C) -> (..., N, C)."""

    def __init__(self, unit: GatingUnit) -> None:
        super().__init__()
        self.act = unit.act
        with torch.no_grad(), torch.device(unit.gate.weight.device):
            self.expand = nn.Linear(unit.gate.in_features, 2 * unit.gate.out_features)
            self.expand.weight = nn.Parameter(torch.cat([unit.gate.weight, unit.value.weight]))
            self.expand.bias = nn.Parameter(torch.cat([unit.gate.bias, unit.value.bias]))
        self.norm, self.project = deepcopy(unit.norm), deepcopy(unit.project)

    def forward(self, x: Tokens) -> Tokens:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.project(self.norm(ACTIVATIONS[self.act](gate)) * self.norm(value))


class ActivatorBlock(nn.Module):
    """x + unit(norm(x)), then x + mlp(norm(x)) with the same norm: (B, N, C) -> (B, N, C).

    Args:
        mlp: whether the block has the MLP.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        act: Activation = "gelu",
        mlp: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path_rate)
        self.norm = nn.LayerNorm(dim)
        self.unit = GatingUnit(dim, hidden_dim, act)
        self.mlp = Mlp(dim, hidden_dim, drop_rate) if mlp else None

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.drop_path(self.unit(self.norm(x)))
        return x if self.mlp is None else x + self.drop_path(self.mlp(self.norm(x)))


class Activator(PatchNetwork):
    """Blocks of gated linear units on patches, for images whose sides are multiples of the patch size."""

    def __init__(self, config: ActivatorConfig) -> None:
        def block(rate: float) -> ActivatorBlock:
            return ActivatorBlock(
                config.embed_dim,
                config.hidden_dim,
                act=config.act,
                mlp=config.block == "full",
                drop_rate=config.drop_rate,
                drop_path_rate=rate,
            )

        super().__init__(config, block)


OFFICIAL = KeyLayout(
    "official",
    (
        ("^patcher", "stem"),
        ("^model", "blocks"),
        ("actgu", "unit"),
        ("proj_1", "gate"),
        ("proj_2", "value"),
        ("proj_3", "project"),
        ("ffn.net.0", "mlp.fc1"),
        ("ffn.net.3", "mlp.fc2"),
        ("^classifier", "head"),
    ),
)


def layouts(config: ActivatorConfig) -> list[KeyLayout]:
    """Return the layout of the published training scripts, which come without weights."""
    return [OFFICIAL]


register(
    Activator,
    paper="activator",
    layouts=layouts,
    fresh_with_head=("head.",),
    variants={
        "activator_cifar10": Variant(ActivatorConfig(num_classes=10), (3, 32, 32)),
        "activator_glu_cifar10": Variant(ActivatorConfig(num_classes=10, block="glu_only"), (3, 32, 32)),
        "activator_cifar100": Variant(ActivatorConfig(num_classes=100), (3, 32, 32)),
    },
)
