"""Pack ternary layers for inference (a transform).

Training keeps a full latent matrix for every ternary layer. Inference needs only two bits per weight, one scale, and
the low-rank correction with its gate folded in.

Source: Ma et al. 2024, arXiv:2402.17764; Trejo Pizzo 2026, arXiv:2602.05269.
"""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from gatewise.layers.ternary import TernaryLinear
from gatewise.methods._base import register_transform


@register_transform
def pack_ternary(model: nn.Module) -> nn.Module:
    """Return a copy of `model` in eval mode with two bits per ternary weight. It cannot be trained further.

    Raises:
        ValueError: if `model` has no ternary layer.
    """
    packed = deepcopy(model).eval()
    places = [
        (parent, name, child)
        for parent in packed.modules()
        for name, child in parent.named_children()
        if isinstance(child, TernaryLinear)
    ]
    if not places:
        raise ValueError(f"{type(model).__name__} has no ternary layer to pack")
    for parent, name, child in places:
        setattr(parent, name, child.packed())
    return packed
