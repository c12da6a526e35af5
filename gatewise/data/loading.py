"""Loaders whose order and augmentation are functions of (seed, epoch, index), and that can be resumed exactly.

Three properties hold by construction and are tested:

- *Resume is exact.* A train loader counts the batches that it has returned, not those that its workers have
  prefetched. Restored from `state_dict()`, it continues with the next batch and the same augmentation.
- *Processes share one order.* The global batch is a slice of one permutation, and each process takes a contiguous
  part of it. Two processes with batch size B see the same samples as one process with batch size 2 B.
- *Evaluation counts every image once*, with the same number of batches on every process. Equal counts matter because
  DDP broadcasts buffers and FSDP gathers weights in the forward pass: a process with one more batch would hang.

Lightning puts its own sampler into every `DataLoader` that it gets in a distributed run
(`Trainer(use_distributed_sampler=True)`, the default). The loaders here are iterables that own a `DataLoader`, which
Lightning leaves unchanged whatever the flag says. It calls `loader.sampler.set_epoch(epoch)` before each epoch, and
`state_dict` and `load_state_dict` with its checkpoints.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gatewise.errors import UserError

# Inputs and targets.
Batch: TypeAlias = tuple[Tensor, Tensor]


class Share(NamedTuple):
    """Index of this process among the data-parallel processes, and their number."""

    rank: int
    world_size: int


class BatchWorkers:
    """`DataLoader` over whole batches whose workers persist across iterations until `close`.

    Args:
        dataset: data set whose `__getitems__` makes a batch from an element of `batches`.
        batches: iterable of batch keys, restarted at every iteration.
        num_workers: number of worker processes; 0 loads in this process.
    """

    def __init__(self, dataset: Dataset[Any], batches: Any, num_workers: int) -> None:
        self._dataset = dataset
        self._batches = batches
        self._num_workers = num_workers
        self._loader: DataLoader[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._loader is None:
            self._loader = DataLoader(
                self._dataset,
                batch_sampler=self._batches,
                num_workers=self._num_workers,
                collate_fn=as_it_is,
                persistent_workers=self._num_workers > 0,
                pin_memory=torch.cuda.is_available(),
                # A separate generator, because a loader otherwise draws from the global stream.
                generator=torch.Generator(),
            )
        return iter(self._loader)

    def close(self) -> None:
        """End the workers. The next iteration starts new ones."""
        self._loader = None


class TrainLoader(ABC):
    """Training batches, epoch by epoch, resumable within an epoch.

    Args:
        length: number of batches per epoch on this process.
        identity: values that must be unchanged for a saved position to be valid, named as for the user.
    """

    def __init__(self, length: int, identity: dict[str, Any]) -> None:
        self.epoch = 0
        self._length = length
        self._identity = identity
        self._place = (0, 0)
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self._length

    @property
    def sampler(self) -> TrainLoader:
        """Return the loader itself, because Lightning announces an epoch by `loader.sampler.set_epoch(epoch)`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, or of one that was created but has returned nothing yet."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        # This is a generator, so nothing below runs before the first batch is requested. Lightning creates an iterator
        # before it announces the epoch, and a second one only to check that it can.
        epoch = self.epoch
        start = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume = None
        self._place = (epoch, start)
        for done, batch in enumerate(self._batches(epoch, start), start=start + 1):
            self._place = (epoch, done)
            yield batch

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of the epoch from number `start` on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the number of its batches returned so far, and the values that identify the order."""
        batches = self._place[1] if self._place[0] == self.epoch else 0
        return {"epoch": self.epoch, "batches": batches, **self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that had been returned when `state_dict` was saved.

        Raises:
            UserError: if the order differs (seed, batch size, number of samples, ...).
        """
        changed = [
            f"{name} was {state_dict.get(name)} and is {value}"
            for name, value in self._identity.items()
            if state_dict.get(name) != value
        ]
        if changed:
            raise UserError(
                f"cannot resume within an epoch with a different order of the data: {'; '.join(changed)}; "
                "restore what changed, or start from the weights only"
            )
        self.epoch = state_dict["epoch"]
        self._place = self._resume = (state_dict["epoch"], state_dict["batches"])


class EvalLoader(ABC):
    """Evaluation batches of this process."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches, which is the same on every process."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches in order."""


def eval_batches(size: int, batch_size: int, share: Share) -> list[range]:
    """Return this process's batches of `size` samples: every sample once, the same number of batches per process.

    All batches are full except in the last one or two rounds, which are divided evenly so that none is empty.

    Raises:
        UserError: if that is impossible (fewer samples than processes, or batches of one that do not divide evenly).
    """
    if size == 0:
        return []
    rank, world_size = share
    rounds = -(-size // (batch_size * world_size))
    if size < rounds * world_size:
        raise UserError(
            f"{size} samples cannot be divided among {world_size} processes in batches of at most {batch_size} so that "
            "each gets equally many; use fewer processes or, above one sample per process, larger batches"
        )
    full = batch_size * world_size
    uneven = 1 if size - (rounds - 1) * full >= world_size else 2
    even = [range(start, start + batch_size) for start in range(0, (rounds - uneven) * full, batch_size)]
    rest = np.array_split(np.arange(len(even) * batch_size, size), uneven * world_size)
    batches = even + [range(int(part[0]), int(part[-1]) + 1) for part in rest]
    return batches[rank::world_size]


def as_it_is(loaded: Any) -> Any:
    """Return the argument unchanged, as `collate_fn` of loaders whose data set makes whole batches."""
    return loaded
