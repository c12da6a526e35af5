"""What all image data modules share: the contract with tasks, and the loaders.

A data module gives batches `(images, labels)`: normalised float32 (B, C, H, W) and int64 (B,). Its three loaders keep
the rules of `gatewise.data._loading`: a run can be stopped anywhere and continued as if it had not been.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gatewise.data._handover import UnreadableImages
from gatewise.data._loading import (
    BatchWorkers,
    EpochBatches,
    EvalLoader,
    EvaluationSet,
    IndexedEvalLoader,
    IndexedTrainLoader,
    Share,
    TrainingSet,
    TrainLoader,
    eval_batches,
)
from gatewise.data._random import class_balanced_order, stratified_split, uniform_order
from gatewise.data.images import to_rgb
from gatewise.data.sources import ImageSource, SubsetSource
from gatewise.data.transforms import Augmentation, Evaluation, ImageTransform, Prepare, eval_transform, train_transform
from gatewise.errors import MissingExtraError, UserError


class ImageData(L.LightningDataModule, ABC):
    """Labelled images in three parts: training, validation, test.

    Subclasses fill `class_names` in `setup`, and offer the three `*_dataloader` methods.

    Attributes:
        num_classes: how many classes there are; known after `setup`, like `class_names`.
        class_names: their names, by label.
        input_size: channels, height and width of an image in a batch.
        mean: per channel, what is subtracted from pixels in 0 to 1.
        std: per channel, what they are divided by then.

    Args:
        batch_size: images per training batch and process.
        eval_batch_size: images per validation or test batch and process, at most; `batch_size` where None.
        num_workers: processes that load each part; 0 loads in the training process.
        seed: what order, augmentation and splits are drawn from.
        augment: how training images vary.
        evaluation: how images are fitted to the image size when evaluated.
        prepare: brings any image into mode RGB, and into the frame of this data set's own images.
    Raises:
        UserError: if a number is out of its range.
    """

    class_names: list[str]

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
        augment: Augmentation,
        evaluation: Evaluation,
        prepare: Prepare = to_rgb,
    ) -> None:
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        require_at_least("image_size", 1, min(height, width))
        require_at_least("batch_size", 1, batch_size)
        require_at_least("eval_batch_size", 1, batch_size if eval_batch_size is None else eval_batch_size)
        require_at_least("num_workers", 0, num_workers)
        require_at_least("seed", 0, seed)
        if len(mean) not in (1, 3) or len(std) != len(mean) or min(std) <= 0:
            raise UserError(
                "mean and std take one number each (grey images) or three (colour), std above 0, "
                f"not {tuple(mean)} and {tuple(std)}"
            )
        self.input_size = (len(mean), height, width)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train_transform = train_transform(augment, (height, width), self.mean, self.std, prepare)
        self._eval_transform = eval_transform(evaluation, (height, width), self.mean, self.std, prepare)
        self._unreadable = UnreadableImages()
        # The loading processes of each part that has some; those of a loader that was replaced end with it.
        self._workers: dict[str, BatchWorkers] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def unreadable(self) -> list[str]:
        """The images that could not be read so far and were skipped, sorted by name."""
        return self._unreadable.names

    def transform_for_train(self) -> ImageTransform:
        """From an image of any mode and size to an augmented, normalised (C, H, W); draws from the global streams."""
        return self._train_transform

    def transform_for_eval(self) -> ImageTransform:
        """From an image of any mode and size to a normalised (C, H, W), as in validation; needs no `setup`."""
        return self._eval_transform

    def denormalize(self, images: Tensor) -> Tensor:
        """Normalised (..., C, H, W) as pixels between 0 and 1, for showing."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)

    @abstractmethod
    def train_dataloader(self) -> TrainLoader:
        """Resumable training batches; the number of the epoch decides order and augmentation."""

    @abstractmethod
    def val_dataloader(self) -> EvalLoader:
        """Validation batches; over all processes every image once."""

    @abstractmethod
    def test_dataloader(self) -> EvalLoader:
        """Test batches; over all processes every image once."""

    def teardown(self, stage: str) -> None:
        """End the loading processes; name the images that could not be read, if that has not happened; count them."""
        self._close_workers()
        self._unreadable.close()

    def on_exception(self, exception: BaseException) -> None:
        """End the loading processes; Lightning calls this in place of `teardown` when training fails."""
        self._close_workers()

    def _close_workers(self) -> None:
        for workers in self._workers.values():
            workers.close()

    def _share(self) -> Share:
        """Which part of the data this process trains on; for sharded models that is not the rank itself."""
        if self.trainer is None:
            return Share(0, 1)
        replicas: dict[str, Any] | None = self.trainer.distributed_sampler_kwargs
        return Share(0, 1) if replicas is None else Share(replicas["rank"], replicas["num_replicas"])


@dataclass(frozen=True)
class Parts:
    """The three parts of a data set, and the class names by label."""

    train: ImageSource
    val: ImageSource
    test: ImageSource
    class_names: list[str]


class IndexedImageData(ImageData):
    """A data module over images that can be asked for by index; subclasses say which, in `_load`.

    Attributes:
        class_balanced: whether an epoch draws every class equally often, instead of every image once.
    """

    class_balanced = False
    _parts: Parts | None = None

    @abstractmethod
    def _load(self) -> Parts:
        """Find the images and labels.

        Raises:
            UserError: if they are missing, or not as they must be.
        """

    def setup(self, stage: str | None = None) -> None:
        """Find the images; the first call does it for all stages."""
        if self._parts is None:
            self._parts = self._load()
            self.class_names = self._parts.class_names

    @property
    def parts(self) -> Parts:
        """The images themselves, without transforms.

        Raises:
            RuntimeError: before `setup`.
        """
        if self._parts is None:
            raise RuntimeError(f"call {type(self).__name__}.setup() before asking for its images")
        return self._parts

    def train_dataloader(self) -> TrainLoader:
        source = self.parts.train
        order = class_balanced_order if self.class_balanced else uniform_order
        batches = EpochBatches(source.labels, self.batch_size, self.seed, self._share(), order)
        workers = self._start("train", TrainingSet(source, self._train_transform, self.seed), batches)
        return IndexedTrainLoader(workers, batches, self._unreadable)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_dataloader("val", self.parts.val)

    def test_dataloader(self) -> EvalLoader:
        return self._eval_dataloader("test", self.parts.test)

    def _eval_dataloader(self, part: str, source: ImageSource) -> EvalLoader:
        share = self._share()
        batches = eval_batches(len(source), self.eval_batch_size, share)
        workers = self._start(part, EvaluationSet(source, self._eval_transform), batches)
        return IndexedEvalLoader(workers, batches, share, self._unreadable)

    def _start(self, part: str, dataset: Dataset[Any], batches: EpochBatches | list[range]) -> BatchWorkers:
        self._workers[part] = BatchWorkers(dataset, batches, self.num_workers)
        return self._workers[part]


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """The source in two parts, (kept, held out), with the same fraction of every class held out."""
    kept, held_out = stratified_split(source.labels, fraction, seed)
    return SubsetSource(source, kept), SubsetSource(source, held_out)


def require_at_least(field: str, smallest: int, value: int) -> None:
    """Raises `UserError` if a number of the user's is too small."""
    if value < smallest:
        raise UserError(f"{field} must be at least {smallest}, not {value}")


def require_fraction(field: str, value: float) -> None:
    """Raises `UserError` if a fraction of the user's is not one; 1 would leave nothing."""
    if not 0 <= value < 1:
        raise UserError(f"{field} must be at least 0 and below 1, not {value}")


def optional_module(name: str) -> Any:
    """A package that only some data modules need.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(f"{name} is not installed; pip install 'gatewise[data]' brings it") from error
