"""What all data modules share, whatever a sample is: the contract with tasks, and what the loaders need.

Batches are pairs (inputs, targets). The three loaders keep the rules of `gatewise.data.loading`: a run can be stopped
anywhere and continued as if it had not been.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L

from gatewise.data.loading import BatchWorkers, EvalLoader, Share, TrainLoader
from gatewise.errors import MissingExtraError, UserError


class DataModule(L.LightningDataModule, ABC):
    """Samples in three parts: training, validation, test.

    Attributes:
        input_size: the shape of one sample in a batch.

    Args:
        batch_size: samples per training batch and process.
        eval_batch_size: samples per validation or test batch and process, at most; `batch_size` where None.
        num_workers: processes that load each part; 0 loads in the training process.
        seed: what everything random is drawn from.
    Raises:
        UserError: if a number is out of its range.
    """

    input_size: tuple[int, ...]

    def __init__(self, *, batch_size: int, eval_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        require_at_least("batch_size", 1, batch_size)
        require_at_least("eval_batch_size", 1, batch_size if eval_batch_size is None else eval_batch_size)
        require_at_least("num_workers", 0, num_workers)
        require_at_least("seed", 0, seed)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        # The loading processes of each part that has some; those of a loader that was replaced end with it.
        self._workers: dict[str, BatchWorkers] = {}

    @property
    @abstractmethod
    def model_fields(self) -> dict[str, int]:
        """Fields of a network's configuration that only the data can tell; known after `setup`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What using a trained network takes to know of the data: plain values, known after `setup`."""

    @abstractmethod
    def train_dataloader(self) -> TrainLoader:
        """Resumable training batches; the number of the epoch decides order and augmentation."""

    @abstractmethod
    def val_dataloader(self) -> EvalLoader:
        """Validation batches; over all processes every sample once."""

    @abstractmethod
    def test_dataloader(self) -> EvalLoader:
        """Test batches; over all processes every sample once."""

    def teardown(self, stage: str) -> None:
        """End the loading processes."""
        self._close_workers()

    def on_exception(self, exception: BaseException) -> None:
        """End the loading processes; Lightning calls this in place of `teardown` when training fails."""
        self._close_workers()

    def _close_workers(self) -> None:
        for workers in self._workers.values():
            workers.close()

    def _start(self, part: str, dataset: Any, batches: Any) -> BatchWorkers:
        self._workers[part] = BatchWorkers(dataset, batches, self.num_workers)
        return self._workers[part]

    def _share(self) -> Share:
        """Which part of the data this process trains on; for sharded models that is not the rank itself."""
        if self.trainer is None:
            return Share(0, 1)
        replicas: dict[str, Any] | None = self.trainer.distributed_sampler_kwargs
        return Share(0, 1) if replicas is None else Share(replicas["rank"], replicas["num_replicas"])


def require_at_least(field: str, smallest: int, value: int) -> None:
    """Raises `UserError` if a number of the user's is too small."""
    # Not `value < smallest`, which NaN is not either.
    if not value >= smallest:
        raise UserError(f"{field} must be at least {smallest}, not {value}")


def require_fraction(field: str, value: float) -> None:
    """Raises `UserError` if a fraction of the user's is not one; 1 would leave nothing."""
    if not 0 <= value < 1:
        raise UserError(f"{field} must be at least 0 and below 1, not {value}")


def expanded(path: str | Path) -> Path:
    """Return a path of the user's, with the home folder in place of `~`.

    Raises:
        UserError: if there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} names a home folder, and there is none here; write the path in full") from error


def optional_module(name: str) -> Any:
    """A package that only some data modules need.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{name.partition('.')[0]} is not installed; pip install 'gatewise[data]' brings it"
        ) from error
