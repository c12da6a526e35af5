"""Checks of weights before they are loaded into a network: plain tensors, of the right kind, finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gatewise.errors import CheckpointError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip
_NAMED = 3
"""Number of keys that a message names before it counts the rest."""


def require_strided(state: Mapping[str, Any], origin: str) -> None:
    """Reject values that are not ordinary tensors.

    Args:
        state: values by key.
        origin: source of the values, for messages.
    Raises:
        CheckpointError: if a value is sparse, quantized, nested or not a tensor. The message names the keys.
    """
    odd = {key: kind for key, value in state.items() if (kind := _oddity(value)) is not None}
    if odd:
        kinds = ", ".join(sorted(set(odd.values())))
        raise CheckpointError(f"{origin} is refused: expected ordinary tensors, not {kinds} at {named(odd)}")


def require_kinds(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: str) -> None:
    """Reject tensors whose kind of dtype differs from the network's.

    Args:
        tensors: new values by the network's keys.
        wanted: the network's parameters and buffers by the same keys.
        origin: source of the values, for messages.
    Raises:
        CheckpointError: if a kind differs. The message names the first key, the expected and the actual kind.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta and not wanted[key].is_meta:
            raise CheckpointError(f"{origin} is refused: {key} is on the meta device, without data")
        kind, accepted = _kind(wanted[key].dtype)
        if tensor.dtype not in accepted:
            came = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{origin} is refused: {key} must be {kind}, not {came}")


def require_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Reject NaN and infinity.

    Raises:
        CheckpointError: if there are any. The message names the keys.
    """
    wrong = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        raise CheckpointError(
            f"{origin} is refused: NaN or infinity in {named(wrong)}; training has diverged, or the file is damaged. "
            "In Python, allow_nonfinite=True loads it all the same"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all of a tensor's elements are finite."""
    if (not tensor.is_floating_point() and not tensor.is_complex()) or tensor.is_meta:
        return True
    # A sum is the quickest check of all elements. It may overflow even if no element does.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def named(keys: Iterable[str]) -> str:
    """Return the first few keys, and how many more there are."""
    listed = list(keys)
    rest = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
    return ", ".join(key or "''" for key in listed[:_NAMED]) + rest


def _oddity(value: Any) -> str | None:
    """Return what is unusual about a value in a state dict; None for an ordinary tensor."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    if value.layout is not torch.strided:
        return "a sparse tensor"
    return "a quantized tensor" if value.is_quantized else None


def _kind(dtype: torch.dtype) -> tuple[str, tuple[torch.dtype, ...]]:
    if dtype.is_floating_point:
        return "float16, bfloat16, float32 or float64", _FLOATS
    if dtype in _INTEGERS:
        return "an integer", _INTEGERS
    return str(dtype).removeprefix("torch."), (dtype,)
