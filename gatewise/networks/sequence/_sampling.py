"""Drawing the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; see `LanguageModel.generate`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature must be 0 (most likely token) or positive and finite, not {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be positive, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def draw(
        self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator | None = None
    ) -> Int[Tensor, " batch"]:
        """One token per row."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        scaled = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            smallest_kept = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < smallest_kept, float("-inf"))
        if self.top_p is not None:
            scaled = _keep_nucleus(scaled, self.top_p)
        return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator)[:, 0]


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with all but the fewest most likely tokens of total probability `top_p` at minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if those before it have not reached `top_p`; the first always does.
    before = probabilities.cumsum(dim=-1) - probabilities
    return torch.full_like(logits, float("-inf")).scatter(
        -1, order, ordered.masked_fill(before >= top_p, float("-inf"))
    )
