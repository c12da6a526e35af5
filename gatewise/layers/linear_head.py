"""Classifier at the end of most networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def linear_head(
    width: int, num_classes: int, init: Callable[[nn.Module], object] | None = None, scale: float = 1.0
) -> nn.Module:
    """Return a linear classifier of `width` features, or an identity if there are no classes.

    Args:
        init: function that initializes the classifier; None keeps PyTorch's initialization.
        scale: factor on the initial weights and biases.
    """
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(width, num_classes)
    if init is not None:
        init(head)
    if scale != 1.0:
        with torch.no_grad():
            head.weight.mul_(scale)
            head.bias.mul_(scale)
    return head
