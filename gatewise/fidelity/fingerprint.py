"""Deterministic weights, inputs and output digests, to compare two implementations of one network.

No weights are stored. Both sides fill every parameter and running statistic from its *reference key* (the name in the
published checkpoint) by the same rule, feed the same input, and compare digests of the outputs. The rule uses NumPy's
legacy `RandomState`, whose stream is frozen.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLES = 64


def fill(key: str, shape: Sequence[int]) -> Tensor:
    """Return the value of the parameter or running statistic with this reference key."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)).astype(np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        value = 0.1 * noise
    elif leaf == "running_var":
        value = 1.0 + 0.1 * np.abs(noise)
    elif len(shape) >= 2:
        value = noise / np.sqrt(max(1, int(np.prod(shape[1:]))))
    elif leaf in ("bias", "beta"):
        value = 0.05 * noise
    else:
        value = 1.0 + 0.1 * noise
    return torch.from_numpy(np.asarray(value, dtype=np.float32)).reshape(tuple(shape))


def make_input(name: str, shape: Sequence[int], kind: str = "normal", high: int = 0) -> Tensor:
    """Return an input of a kind: "normal" (float32), "uniform" in [0, 1) or "int" in [0, high)."""
    rng = np.random.RandomState(zlib.crc32(f"input:{name}".encode()))
    if kind == "normal":
        return torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32))
    if kind == "uniform":
        return torch.from_numpy(rng.random_sample(tuple(shape)).astype(np.float32))
    if kind == "int":
        return torch.from_numpy(rng.randint(0, high, size=tuple(shape)).astype(np.int64))
    raise ValueError(f"kind must be 'normal', 'uniform' or 'int', not {kind!r}")


def digest(tensor: Tensor) -> dict[str, Any]:
    """Return the shape, the moments and evenly spaced values of an output."""
    flat = tensor.detach().double().flatten()
    return {
        "shape": list(tensor.shape),
        "mean": flat.mean().item(),
        "std": flat.std(unbiased=False).item(),
        "sample": [float(f"{value:.7g}") for value in _sample(flat).tolist()],
    }


def relative_error(tensor: Tensor, stored: Mapping[str, Any]) -> float:
    """Return the largest difference from a digest's samples and moments, over the digest's standard deviation.

    Infinite if shapes differ or a value is not finite.
    """
    if list(tensor.shape) != stored["shape"]:
        return float("inf")
    ours = digest(tensor)
    samples = np.abs(np.asarray(ours["sample"]) - np.asarray(stored["sample"]))
    largest = max(samples.max(), abs(ours["mean"] - stored["mean"]), abs(ours["std"] - stored["std"]))
    return float(largest / max(stored["std"], 1e-12)) if np.isfinite(largest) else float("inf")


def _sample(flat: Tensor) -> Tensor:
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index]
