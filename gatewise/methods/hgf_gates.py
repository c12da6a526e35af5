"""The schedule of HGF's gates (a loss term).

The correction of a ternary layer fades in, is then kept small by a penalty on its gate, and finally the gate is frozen:

    0      .. warmup    gamma is multiplied with progress / warmup
    warmup .. freeze    weight * mean(gamma^2) over all gates is added to the loss
    freeze .. 1         the raw gates are no longer trained

Source: Trejo Pizzo 2026, arXiv:2602.05269, reports the three phases; their lengths are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gatewise.layers.ternary import HybridGatedLinear
from gatewise.methods._base import LossTerm, Step, register_loss_term


@register_loss_term("hgf_gates")
class HGFGates(LossTerm):
    """Warm up, penalize and freeze the gates of all `HybridGatedLinear` layers of a network.

    Frozen gates take no part in the backward pass. DDP then needs the strategy that looks for unused parameters.

    Args:
        warmup: fraction of training in which the gates fade in.
        freeze: fraction of training after which they are frozen.
        weight: weight of the penalty.
    Raises:
        ValueError: if the phases are out of order, or the network has no such layer.
    """

    progress: Tensor

    def __init__(self, model: nn.Module, warmup: float = 0.1, freeze: float = 0.6, weight: float = 1e-2) -> None:
        super().__init__()
        if not 0 <= warmup <= freeze <= 1:
            raise ValueError(f"phases must be in order, 0 <= warmup <= freeze <= 1, not {warmup} and {freeze}")
        if weight < 0:
            raise ValueError(f"the penalty's weight must be 0 or positive, not {weight}")
        # Stored in a tuple, so that the network's parameters are not registered as this term's.
        self._maps = tuple(module for module in model.modules() if isinstance(module, HybridGatedLinear))
        if not self._maps:
            raise ValueError(f"{type(model).__name__} has no gated ternary layer: build it with weights='hybrid'")
        self.warmup, self.freeze, self.weight = warmup, freeze, weight
        # Saved with the run, so that a resumed run starts its first step with the gates as they were.
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        model.register_forward_pre_hook(self._set_gates)

    def forward(self, step: Step) -> Tensor:
        self.progress.fill_(step.progress)
        gammas = torch.stack([ternary.gamma for ternary in self._maps])
        if not self.warmup <= step.progress < self.freeze:
            return gammas.new_zeros(())
        return self.weight * gammas.square().mean()

    def _set_gates(self, model: nn.Module, inputs: Any) -> None:
        progress = self.progress.item()
        for ternary in self._maps:
            ternary.ramp = 1.0 if progress >= self.warmup else progress / self.warmup
            ternary.frozen = progress >= self.freeze
