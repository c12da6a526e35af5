"""Reproducible randomness.

Every order, split and augmentation is a function of a purpose and a key such as (seed, epoch, index). They are drawn
from NumPy's legacy `RandomState` because its streams are frozen: the same key gives the same split in every version.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


def frozen_generator(purpose: str, *key: int) -> np.random.RandomState:
    """Return a generator whose stream depends only on the purpose and the key of non-negative integers."""
    return np.random.RandomState(np.random.MT19937(_entropy(purpose, key)))


def seed_global_streams(purpose: str, *key: int) -> None:
    """Seed `random`, `numpy.random` and torch's CPU stream, the three streams that image transforms use."""
    words = _entropy(purpose, key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    # Not torch.manual_seed, which also reseeds the accelerators' streams. Those belong to the training step.
    torch.default_generator.manual_seed(int(words[2]))


def _entropy(purpose: str, key: tuple[int, ...]) -> np.random.SeedSequence:
    # The purpose separates streams with the same key; without it, (seed, epoch) and (seed, epoch, 0) would be equal.
    return np.random.SeedSequence((zlib.crc32(purpose.encode()), *key))


@contextmanager
def preserved_streams() -> Iterator[None]:
    """Restore the three global streams on exit, whatever is seeded or drawn inside."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)


def uniform_order(labels: NDArray[np.int64], generator: np.random.RandomState) -> NDArray[np.int64]:
    """Return every index once, in random order."""
    return generator.permutation(len(labels))


def class_balanced_order(labels: NDArray[np.int64], generator: np.random.RandomState) -> NDArray[np.int64]:
    """Return as many indices as there are labels, every class equally often (within one), in random order.

    A rare class is repeated, each time in a new order. Of a frequent class, a random part is used.
    """
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    quotas = np.full(len(members), len(labels) // len(members))
    quotas[generator.permutation(len(members))[: len(labels) % len(members)]] += 1
    drawn = []
    for indices, quota in zip(members, quotas, strict=True):
        passes = -(-int(quota) // len(indices))
        drawn.append(np.concatenate([generator.permutation(indices) for _ in range(passes)])[:quota])
    return generator.permutation(np.concatenate(drawn))


def stratified_split(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ascending indices (kept, held out), with the same fraction of every class held out.

    Of a class with two or more images, at least one is held out and at least one is kept. A single image is kept.
    """
    generator = frozen_generator("split", seed)
    held_out = []
    for label in np.unique(labels):
        indices = generator.permutation(np.flatnonzero(labels == label))
        count = min(max(round(len(indices) * fraction), 1), len(indices) - 1) if fraction > 0 else 0
        held_out.append(indices[:count])
    held = np.sort(np.concatenate(held_out)) if held_out else np.zeros(0, dtype=np.int64)
    return np.setdiff1d(np.arange(len(labels)), held), held
