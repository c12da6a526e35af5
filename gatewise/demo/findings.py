"""Results of a demo run, for its report."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gatewise.efficiency.acceleration.export import ExportReport
from gatewise.efficiency.acceleration.report import OptimizationReport
from gatewise.efficiency.cost.count import Cost
from gatewise.gates import Reading
from gatewise.tasks import Evaluation, Result, Trained


@dataclass(frozen=True)
class Pictures:
    """Held-out images as shown (0 to 1) and as network input, with labels and class probabilities."""

    shown: Tensor
    inputs: Tensor
    labels: Tensor
    probabilities: Tensor


@dataclass(frozen=True)
class Demo:
    """All results in the report."""

    result: Result
    trained: Trained
    log: list[dict[str, float]]
    evaluation: Evaluation
    cost: Cost
    optimizations: dict[int, OptimizationReport]
    export: ExportReport
    pictures: Pictures
    readings: list[Reading]
    seconds: float
    machine: str
