"""Sampling of the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Options for drawing a token from logits; see `LanguageModel.generate`."""

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
        """Draw one token per row."""
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
    """Set all logits outside the smallest set of most likely tokens with total probability `top_p` to -inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if the tokens before it have not reached `top_p`; the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    return torch.full_like(logits, float("-inf")).scatter(
        -1, order, ordered.masked_fill(before >= top_p, float("-inf"))
    )
