"""Handwritten digits, classified by networks that train in seconds."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.training import Batch


class Digits:
    """Scikit-learn's handwritten digits, 8x8 pixels; a fifth is kept for testing."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        images, labels = digits()[0]
        chosen = torch.randint(len(labels), (size,), generator=generator)
        return images[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def percent_right(self, model: nn.Module) -> float:
        images, labels = digits()[1]
        return 100 * (model(images).argmax(-1) == labels).float().mean().item()


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images, normalized, with labels."""
    from sklearn.datasets import load_digits

    content = load_digits()
    images = torch.tensor(content.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(content.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=generator(0))
    cut = len(labels) * 4 // 5
    train, test = order[:cut], order[cut:]
    return (images[train], labels[train]), (images[test], labels[test])
