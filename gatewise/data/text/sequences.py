"""Base classes of token data modules.

Batches are pairs of int64 (B, T): tokens, and the token to predict at each position, or `IGNORED`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gatewise.data.loading import Batch, BatchWorkers, EvalLoader, Share, TrainLoader, eval_batches
from gatewise.data.module import DataModule
from gatewise.data.randomness import frozen_generator
from gatewise.errors import UserError

IGNORED = -100
"""Target of a position that is excluded from the loss."""


class SequenceSource(ABC):
    """Sequences that are accessible by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """Return tokens and targets of these sequences.

        Raises:
            UserError: if they cannot be read.
        """


class Plan(Protocol):
    """Order of an epoch: indices (batches, global batch) that depend only on the generator."""

    def __call__(self, global_batch: int, generator: np.random.RandomState, /) -> NDArray[np.int64]: ...


class SequenceData(DataModule):
    """Data module over sequences that are accessible by index. Subclasses provide them in `_load`.

    Attributes:
        vocab_size: size of the vocabulary; tokens are below it; known after `setup`.
    """

    vocab_size: int
    _parts: dict[str, SequenceSource] | None = None

    def boundaries(self, tokens: Tensor) -> Tensor | None:
        """Return the sequence starts in tokens (B, T) flattened to one row, then B * T; None if each row is one."""
        return None

    @abstractmethod
    def _load(self) -> dict[str, SequenceSource]:
        """Return the parts "train", "val" and "test".

        Raises:
            UserError: if they are missing or invalid.
        """

    def setup(self, stage: str | None = None) -> None:
        """Find the sequences. The first call does so for all stages."""
        if self._parts is None:
            self._parts = self._load()

    @property
    def parts(self) -> dict[str, SequenceSource]:
        """Return the sequences by part.

        Raises:
            RuntimeError: before `setup`.
        """
        if self._parts is None:
            raise RuntimeError(f"call {type(self).__name__}.setup() before asking for its sequences")
        return self._parts

    @property
    def model_fields(self) -> dict[str, int]:
        return {"vocab_size": self.vocab_size}

    def describe(self) -> dict[str, Any]:
        return {"input_size": list(self.input_size)}

    def train_dataloader(self) -> TrainLoader:
        source = self.parts["train"]
        batches = EpochPlan(self._plan(source), len(source), self.batch_size, self.seed, self._share())
        return SequenceTrainLoader(self._start("train", SequenceSet(source), batches), batches)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> EvalLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, part: str) -> EvalLoader:
        source = self.parts[part]
        batches = self._eval_batches(source, self._share())
        return SequenceEvalLoader(self._start(part, SequenceSet(source), batches), len(batches))

    def _plan(self, source: SequenceSource) -> Plan:
        return lambda global_batch, generator: in_batches(generator.permutation(len(source)), global_batch)

    def _eval_batches(self, source: SequenceSource, share: Share) -> list[range]:
        return eval_batches(len(source), self.eval_batch_size, share)


class SequenceSet(Dataset[Any]):
    """Data set that makes batches in a worker. It returns a `UserError`, as raising it prints a page of traceback."""

    def __init__(self, source: SequenceSource) -> None:
        self._source = source

    def __getitems__(self, indices: Sequence[int]) -> Batch | UserError:
        try:
            return self._source.batch(indices)
        except UserError as error:
            return error


class EpochPlan(Sampler[list[int]]):
    """Batches of this process in an epoch, as indices: its columns of the plan's rows.

    Args:
        size: number of sequences.
    Raises:
        UserError: if the sequences do not fill one global batch.
    """

    def __init__(self, plan: Plan, size: int, batch_size: int, seed: int, share: Share) -> None:
        self.global_batch = batch_size * share.world_size
        self._plan = plan
        self._size = size
        self._seed = seed
        self._columns = slice(share.rank * batch_size, (share.rank + 1) * batch_size)
        self._length = len(self._order(0))
        self.epoch = 0
        self.start = 0
        if self._length == 0:
            raise UserError(
                f"{size} training sequences do not fill one batch of {self.global_batch} ({batch_size} on each of "
                f"{share.world_size} processes); lower batch_size"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Values besides the epoch that determine the order."""
        return {
            "seed": self._seed,
            "number of sequences": self._size,
            "batches per epoch": self._length,
            "batch size over all processes": self.global_batch,
        }

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for row in self._order(self.epoch)[self.start :]:
            yield row[self._columns].tolist()

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return self._plan(self.global_batch, frozen_generator("order", self._seed, epoch))


class SequenceTrainLoader(TrainLoader):
    """Training batches of a `SequenceSource`."""

    def __init__(self, workers: BatchWorkers, plan: EpochPlan) -> None:
        super().__init__(len(plan), plan.identity)
        self._workers = workers
        self._plan = plan

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._plan.epoch, self._plan.start = epoch, start
        return _raised(self._workers)


class SequenceEvalLoader(EvalLoader):
    """Evaluation batches of a `SequenceSource`, in order."""

    def __init__(self, workers: BatchWorkers, length: int) -> None:
        self._workers = workers
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return _raised(self._workers)


def in_batches(order: NDArray[np.int64], global_batch: int) -> NDArray[np.int64]:
    """Reshape indices (N,) to (batches, global_batch), without the incomplete last batch."""
    batches = len(order) // global_batch
    return order[: batches * global_batch].reshape(batches, global_batch)


def _raised(loaded: BatchWorkers) -> Iterator[Batch]:
    for batch in loaded:
        if isinstance(batch, UserError):
            raise batch
        yield batch
