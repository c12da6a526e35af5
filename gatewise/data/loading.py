"""Loaders whose order and augmentation are functions of (seed, epoch, index), and that resume where they stopped.

Three properties are held by construction, and tested:

- *Resume is exact.* A train loader counts the batches that it has handed out, not those that its workers have
  fetched ahead; started again from `state_dict()` it continues with the next one, augmented as it would have been.
- *Processes share one order.* The batch of all processes together is a slice of one permutation, and each process
  takes a contiguous part of it: two processes with batch B see the samples of one process with batch 2 B.
- *Evaluation counts every image once*, with as many batches on every process. Equal counts matter: the forward pass
  of DDP broadcasts buffers and that of FSDP gathers weights, so that a process with a batch more would wait forever.

Lightning puts its own sampler into every `DataLoader` that it gets in a distributed run
(`Trainer(use_distributed_sampler=True)`, the default). What is handed to it here are iterables that own a
`DataLoader`: those it leaves alone, whatever the flag says. It calls `loader.sampler.set_epoch(epoch)` before each
epoch, and `state_dict` and `load_state_dict` with its checkpoints.
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
    """Which of how many data-parallel processes this is."""

    rank: int
    world_size: int


class BatchWorkers:
    """A `DataLoader` over whole batches, whose workers stay from one iteration to the next until `close`.

    Args:
        dataset: makes a batch of what `batches` gives, in `__getitems__`.
        batches: iterated anew for every iteration.
        num_workers: 0 loads in this process.
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
                # Its own, because a loader draws from the global stream otherwise.
                generator=torch.Generator(),
            )
        return iter(self._loader)

    def close(self) -> None:
        """End the workers; a further iteration starts new ones."""
        self._loader = None


class TrainLoader(ABC):
    """The batches of one epoch after another, resumable within an epoch.

    Args:
        length: batches per epoch on this process.
        identity: what has to be the same for a saved place to mean anything, in the user's words.
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
        """Itself: Lightning announces an epoch by `loader.sampler.set_epoch(epoch)`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the iteration that starts next (or that was created, but has handed out nothing)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing below happens before the first batch is asked for. Lightning creates an iterator
        # before it announces the epoch, and a second one only to see whether it can.
        epoch = self.epoch
        start = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        self._resume = None
        self._place = (epoch, start)
        for done, batch in enumerate(self._batches(epoch, start), start=start + 1):
            self._place = (epoch, done)
            yield batch

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The epoch's batches from number `start` on."""

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches have been handed out, and what identifies the order."""
        batches = self._place[1] if self._place[0] == self.epoch else 0
        return {"epoch": self.epoch, "batches": batches, **self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out when `state_dict` was taken.

        Raises:
            UserError: if the order was another one (seed, batch size, number of samples, ...).
        """
        changed = [
            f"{name} was {state_dict.get(name)} and is {value}"
            for name, value in self._identity.items()
            if state_dict.get(name) != value
        ]
        if changed:
            raise UserError(
                f"cannot continue within an epoch with another order of the data: {'; '.join(changed)}; "
                "restore what changed, or start from weights alone"
            )
        self.epoch = state_dict["epoch"]
        self._place = self._resume = (state_dict["epoch"], state_dict["batches"])


class EvalLoader(ABC):
    """The batches of an evaluation on this process."""

    @abstractmethod
    def __len__(self) -> int:
        """How many there are; as many on every process."""

    @abstractmethod
    def __iter__(self) -> Iterator[Batch]:
        """All of them, in order."""


def eval_batches(size: int, batch_size: int, share: Share) -> list[range]:
    """This process's batches of `size` samples: every sample once, as many batches on every process.

    All batches are full but the last one or two rounds, which are shared out evenly so that none is empty.

    Raises:
        UserError: if that is impossible (fewer samples than processes, or batches of one that do not come out even).
    """
    if size == 0:
        return []
    rank, world_size = share
    rounds = -(-size // (batch_size * world_size))
    if size < rounds * world_size:
        raise UserError(
            f"{size} samples cannot be shared by {world_size} processes in batches of at most {batch_size} so that "
            "each gets as many batches; use fewer processes or, above one sample per process, larger batches"
        )
    full = batch_size * world_size
    uneven = 1 if size - (rounds - 1) * full >= world_size else 2
    even = [range(start, start + batch_size) for start in range(0, (rounds - uneven) * full, batch_size)]
    rest = np.array_split(np.arange(len(even) * batch_size, size), uneven * world_size)
    batches = even + [range(int(part[0]), int(part[-1]) + 1) for part in rest]
    return batches[rank::world_size]


def as_it_is(loaded: Any) -> Any:
    """For loaders whose data set makes whole batches."""
    return loaded
