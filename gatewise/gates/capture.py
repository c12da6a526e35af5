"""Capture of gate values while a network runs.

A module with gates has a method `read_gates(x) -> dict[str, Tensor]`. For the first input of its `forward`, it returns
one map (B, H, W), vector (B, C) or sequence (B, T) per gate, by name. Modules stay stateless, as the maps are computed
separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewise.errors import UserError


@runtime_checkable
class Gated(Protocol):
    """A module whose gates can be read."""

    def read_gates(self, x: Tensor) -> dict[str, Tensor]:
        """Return the gate values for this input, by name."""


@dataclass(frozen=True)
class Reading:
    """Gates of one module for one batch: name -> map (B, H, W), vector (B, C) or sequence (B, T), on the CPU."""

    path: str
    maps: dict[str, Tensor]


@torch.no_grad()
def capture(
    model: nn.Module, batch: Float[Tensor, "batch channels height width"] | Int[Tensor, "batch time"]
) -> list[Reading]:
    """Run `model` once in eval mode and read every gated module, in the order in which they run.

    Args:
        batch: images or tokens, whichever the network expects.
    Raises:
        UserError: if no module of the network has gates that can be read.
    """
    gated = {path: module for path, module in model.named_modules() if isinstance(module, Gated)}
    if not gated:
        raise UserError(f"{type(model).__name__} has no gates to read")
    readings: list[Reading] = []
    handles = [model.get_submodule(path).register_forward_pre_hook(_reader(path, readings)) for path in gated]
    training = model.training
    try:
        model.eval()(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return readings


def _reader(path: str, readings: list[Reading]) -> Any:
    def read(module: Any, inputs: tuple[Any, ...]) -> None:
        maps = {name: gate.detach().float().cpu() for name, gate in module.read_gates(inputs[0]).items()}
        # A layer that supports gates may be built without one.
        if maps:
            readings.append(Reading(path, maps))

    return read
