"""The gate of an attention layer: where it acts, at what granularity, and how its scores are applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Position = Literal["G1", "G2", "G3", "G4", "G5"]
Granularity = Literal["elementwise", "headwise"]
Combination = Literal["multiply", "add"]
Activation = Literal["sigmoid", "ns_sigmoid", "silu", "identity"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    # Not sparse: it never falls below one half.
    "ns_sigmoid": lambda logits: 0.5 + 0.5 * torch.sigmoid(logits),
    "silu": F.silu,
    "identity": lambda logits: logits,
}


@dataclass(frozen=True)
class Gate:
    """One gate of an attention layer, in the paper's terms (arXiv:2505.06708, section 2.2).

    Args:
        position: where the gate acts. G1 is after attention, before the output projection. G2 is on values, G3 on keys
            and G4 on queries, each after its projection and before norm and rotary embedding. G5 is on the layer's
            output.
        granularity: one score per channel or one per head.
        shared: whether to average the scores over heads and use the mean for each head. The number of parameters stays
            the same.
        combine: whether to multiply by the scores or to add them.
        activation: function from logits to scores.
        input_dependent: whether the logits are computed from the layer's input; otherwise they are parameters.
        init: whether the gate's weights start like every other projection or at zero.
        bias_init: initial value of the gate's bias (or of the logits if they are parameters). None adds a bias, at
            zero, only where the other projections have one. With zero weights, 4 starts the layer as if it had no gate.
    """

    position: Position = "G1"
    granularity: Granularity = "elementwise"
    shared: bool = False
    combine: Combination = "multiply"
    activation: Activation = "sigmoid"
    input_dependent: bool = True
    init: Literal["normal", "zeros"] = "normal"
    bias_init: float | None = None

    def __post_init__(self) -> None:
        for name, legal in (
            ("position", get_args(Position)),
            ("granularity", get_args(Granularity)),
            ("combine", get_args(Combination)),
            ("activation", get_args(Activation)),
            ("init", ("normal", "zeros")),
        ):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} of a gate must be one of {', '.join(legal)}, not {getattr(self, name)!r}")
        if self.shared and self.granularity == "headwise":
            raise ValueError("a head-shared gate averages scores of channels: it is elementwise, not headwise")
        if self.position == "G5" and (self.shared or self.granularity == "headwise"):
            raise ValueError("G5 acts on the layer's output, which has no heads: it is elementwise and not shared")

    def scores(self, logits: Float[Tensor, "*batch width"], heads: int) -> Float[Tensor, "*batch heads channels"]:
        """Return the scores to apply, for each of `heads` heads (1 if shared) and each channel (1 if headwise)."""
        scores = torch.unflatten(ACTIVATIONS[self.activation](logits), -1, (heads, -1))
        return scores.mean(dim=-2, keepdim=True) if self.shared else scores

    def apply(
        self, y: Float[Tensor, "batch time heads width"], scores: Tensor
    ) -> Float[Tensor, "batch time heads width"]:
        """Return `y` multiplied by the scores or with the scores added."""
        return y * scores if self.combine == "multiply" else y + scores

    def score_at(self, logit: float) -> float:
        """Return the score of one logit."""
        return float(ACTIVATIONS[self.activation](torch.tensor(logit, dtype=torch.float64)))

    @property
    def resting_score(self) -> float:
        """Score of a gate with zero weights."""
        return self.score_at(self.bias_init or 0.0)

    @property
    def starts_neutral(self) -> bool:
        """Whether a gate with zero weights changes nothing or almost nothing (a factor above 0.98)."""
        if self.combine == "add":
            return self.resting_score == 0.0
        return math.isclose(self.resting_score, 1.0, abs_tol=0.02)
