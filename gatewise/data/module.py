"""Base class of all data modules: the contract with tasks, and the loaders.

Batches are pairs (inputs, targets). The three loaders follow the rules of `gatewise.data.loading`, so a run can be
stopped anywhere and resumed with the same result.
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
    """Samples in three parts: training, validation and test.

    Attributes:
        input_size: shape of one sample in a batch.

    Args:
        batch_size: number of samples per training batch and process.
        eval_batch_size: maximum number of samples per validation or test batch and process; None: `batch_size`.
        num_workers: number of loading processes per part; 0 loads in the training process.
        seed: random seed of everything random.
    Raises:
        UserError: if a number is out of range.
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
        # Loading processes by part. When a loader is replaced, its processes end.
        self._workers: dict[str, BatchWorkers] = {}

    @property
    @abstractmethod
    def model_fields(self) -> dict[str, int]:
        """Fields of a network's configuration that depend on the data; known after `setup`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the facts about the data that a trained network needs in use, as plain values; call after `setup`."""

    @abstractmethod
    def train_dataloader(self) -> TrainLoader:
        """Return resumable training batches. The epoch number determines order and augmentation."""

    @abstractmethod
    def val_dataloader(self) -> EvalLoader:
        """Return validation batches that cover every sample once over all processes."""

    @abstractmethod
    def test_dataloader(self) -> EvalLoader:
        """Return test batches that cover every sample once over all processes."""

    def teardown(self, stage: str) -> None:
        """End the loading processes."""
        self._close_workers()

    def on_exception(self, exception: BaseException) -> None:
        """End the loading processes. Lightning calls this instead of `teardown` when training fails."""
        self._close_workers()

    def _close_workers(self) -> None:
        for workers in self._workers.values():
            workers.close()

    def _start(self, part: str, dataset: Any, batches: Any) -> BatchWorkers:
        self._workers[part] = BatchWorkers(dataset, batches, self.num_workers)
        return self._workers[part]

    def _share(self) -> Share:
        """Return this process's share of the data, which for sharded models is not given by the rank itself."""
        if self.trainer is None:
            return Share(0, 1)
        replicas: dict[str, Any] | None = self.trainer.distributed_sampler_kwargs
        return Share(0, 1) if replicas is None else Share(replicas["rank"], replicas["num_replicas"])


def require_at_least(field: str, smallest: int, value: int) -> None:
    """Raise `UserError` if a number that the user gave is too small."""
    # Not `value < smallest`, which is false for NaN.
    if not value >= smallest:
        raise UserError(f"{field} must be at least {smallest}, not {value}")


def require_fraction(field: str, value: float) -> None:
    """Raise `UserError` if a fraction that the user gave is not in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"{field} must be at least 0 and below 1, not {value}")


def expanded(path: str | Path) -> Path:
    """Return a user's path with `~` replaced by the home folder.

    Raises:
        UserError: if there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{str(path)!r} names a home folder, but there is none here; write the full path") from error


def optional_module(name: str) -> Any:
    """Import a package that only some data modules need.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{name.partition('.')[0]} is not installed; pip install 'gatewise[data]' installs it"
        ) from error
