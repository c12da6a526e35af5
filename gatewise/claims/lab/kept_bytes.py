"""Activation memory that a training step keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kept_bytes(block: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations kept for the backward pass, each storage counted once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
            # Storage that is freed could be counted again under the same address.
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x)
    return sum(kept.values())
