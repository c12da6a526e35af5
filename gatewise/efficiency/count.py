"""Parameters, multiply-accumulates and activation bytes of a network, whole and by stage.

MACs are those of convolutions, matrix products and attention; norms, activations and sums are left out, as in the
papers' tables. Activation bytes are the outputs of all leaf modules in float32: what training keeps, roughly, and what
inference writes to memory without fusion. Nothing else is kept: on the `meta` device counting allocates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gatewise.efficiency.inputs import check_example, eval_mode, run, without_gradients
from gatewise.layers.tvconv import TVConv

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class StageCost:
    """Cost of one part of a network; `output_shape` is None for a part that did not run."""

    name: str
    parameters: int
    macs: int
    activation_bytes: int
    output_shape: tuple[int, ...] | None

    @property
    def is_empty(self) -> bool:
        """Whether it neither holds nor does anything (dropout, an empty list)."""
        return self.parameters == self.macs == self.activation_bytes == 0


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass over the whole example batch, and of each part of the network.

    The parts add up to the whole but for what is computed between them, outside any module; parts that hold and do
    nothing are left out.
    """

    parameters: int
    macs: int
    activation_bytes: int
    stages: tuple[StageCost, ...]


def count(model: nn.Module, example: Tensor) -> Cost:
    """The cost of `model(example)`.

    The parts are the network's children; where it has `stages`, the members of `stages` are parts of their own. A
    module that serves twice counts its parameters once, in the part that names it first. What is made once and kept
    for inference (the kernels of TVConvs) is not counted. The network is run once in eval mode and left as it was.

    Raises:
        TypeError: if `example` is no tensor.
        ValueError: if `example` has the wrong dtype or device, or the network cannot run on its shape.
    """
    check_example(model, example)
    counter = FlopCounterMode(display=False)
    parts = [_Part(name, module, counter) for name, module in _parts(model)]
    leaves = _Leaves()
    handles = [hook for part in parts for hook in part.attach()] + leaves.attach(model)
    try:
        with eval_mode(model), without_gradients(model):
            _make_ahead(model, example)
            with counter:
                run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    seen: set[nn.Parameter] = set()
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=counter.get_total_flops() // 2,
        activation_bytes=sum(leaves.bytes.values()),
        stages=tuple(cost for cost in (part.cost(leaves, seen) for part in parts) if not cost.is_empty),
    )


def _make_ahead(model: nn.Module, example: Tensor) -> None:
    """Have what a network makes once for inference and keeps, before anything is counted."""
    for module in model.modules():
        if isinstance(module, TVConv):
            module.cache(example.dtype)


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if name == "stages" and isinstance(child, nn.ModuleList | nn.Sequential):
            parts += [(f"stages.{key}", stage) for key, stage in child.named_children()]
        else:
            parts.append((name, child))
    return parts


class _Part:
    """Counts between entering and leaving a module or, where only its members are called, the outermost of those."""

    def __init__(self, name: str, module: nn.Module, counter: FlopCounterMode) -> None:
        self.name, self.module, self.counter = name, module, counter
        self.depth = self.flops = self.entered = 0
        self.output_shape: tuple[int, ...] | None = None

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for module in self.module.modules():
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        return handles

    def _enter(self, module: nn.Module, inputs: object) -> None:
        if self.depth == 0:
            self.entered = self.counter.get_total_flops()
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.flops += self.counter.get_total_flops() - self.entered
            self.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None

    def cost(self, leaves: _Leaves, seen: set[nn.Parameter]) -> StageCost:
        fresh = [parameter for parameter in self.module.parameters() if parameter not in seen]
        seen.update(fresh)
        return StageCost(
            name=self.name,
            parameters=sum(parameter.numel() for parameter in fresh),
            macs=self.flops // 2,
            activation_bytes=sum(leaves.bytes.get(module, 0) for module in self.module.modules()),
            output_shape=self.output_shape,
        )


class _Leaves:
    """Output bytes of the modules without children."""

    def __init__(self) -> None:
        self.bytes: dict[nn.Module, int] = {}

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        leaves = [module for module in model.modules() if not any(module.children())]
        return [leaf.register_forward_hook(self._note) for leaf in leaves]

    def _note(self, module: nn.Module, inputs: object, output: object) -> None:
        # An identity (dropout at inference too) hands its input on and writes nothing.
        same = isinstance(inputs, tuple) and any(output is item for item in inputs)
        if isinstance(output, Tensor) and not same:
            self.bytes[module] = self.bytes.get(module, 0) + output.numel() * FLOAT32_BYTES
