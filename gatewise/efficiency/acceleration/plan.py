"""Plans, which are ways to run a network, and the context that they start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from gatewise.efficiency.acceleration.export import onnx_bytes
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.acceleration.runners import Runner
from gatewise.efficiency.quantization.quantize import quantize


class PlanContext:
    """The network that plans start from, and intermediate forms that several plans share."""

    def __init__(self, model: nn.Module, example: Tensor, calibration: Any = None) -> None:
        self.model = model
        self.example = example
        self.calibration = calibration

    @cached_property
    def folded(self) -> nn.Module:
        """The folded network; a plan that changes it makes a copy."""
        return fold(self.model)

    @cached_property
    def onnx(self) -> bytes:
        return onnx_bytes(self.folded, self.example)

    @cached_property
    def int8(self) -> bytes:
        """The network in integers, as `gatewise.efficiency.quantize` writes it."""
        return quantize(self.model, self.example if self.calibration is None else self.calibration).onnx


@dataclass(frozen=True)
class Plan:
    """A way to run a network. `build` may raise anything; the plan then counts as failed, with the error as reason.

    Args:
        name: label in reports.
        build: function that makes a runner from the context.
        needs: parts of the context that `build` uses and a saved plan therefore stores. The modules of a network cannot
            be stored in a file.
        key: name in saved files, which never changes; plans without one cannot be saved.
    """

    name: str
    build: Callable[[PlanContext], Runner]
    needs: Literal["folded", "onnx", "int8", "modules"] = "folded"
    key: str = ""
