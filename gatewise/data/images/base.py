"""Base classes of image data modules: the contract with tasks, and the loaders.

An image data module produces batches `(images, labels)`: normalized float32 (B, C, H, W) and int64 (B,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewise.data.images.handover import UnreadableImages
from gatewise.data.images.loading import EpochBatches, EvaluationSet, IndexedEvalLoader, IndexedTrainLoader, TrainingSet
from gatewise.data.images.reading import to_rgb
from gatewise.data.images.sources import ImageSource, SubsetSource
from gatewise.data.images.transforms import (
    Augmentation,
    Evaluation,
    ImageTransform,
    Prepare,
    eval_transform,
    train_transform,
)
from gatewise.data.loading import EvalLoader, TrainLoader, eval_batches
from gatewise.data.module import DataModule, require_at_least
from gatewise.data.randomness import class_balanced_order, stratified_split, uniform_order
from gatewise.errors import UserError


class ImageData(DataModule, ABC):
    """Labeled images in three parts: training, validation and test.

    Subclasses set `class_names` in `setup` and define the three `*_dataloader` methods.

    Attributes:
        num_classes: number of classes; known after `setup`, like `class_names`.
        class_names: class names by label.
        input_size: channels, height and width of an image in a batch.
        mean: mean per channel, subtracted from pixels in [0, 1].
        std: standard deviation per channel, by which pixels are then divided.

    Args:
        batch_size: number of images per training batch and process.
        eval_batch_size: maximum number of images per validation or test batch and process; None: `batch_size`.
        num_workers: number of loading processes per part; 0 loads in the training process.
        seed: random seed of order, augmentation and splits.
        augment: augmentation of training images.
        evaluation: resizing of images in validation, test and prediction.
        prepare: function that converts any image to RGB and frames it like the images of this data set.
    Raises:
        UserError: if a number is out of range.
    """

    class_names: list[str]
    input_size: tuple[int, int, int]

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
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        require_at_least("image_size", 1, min(height, width))
        finite = all(math.isfinite(value) for value in (*mean, *std))
        if len(mean) not in (1, 3) or len(std) != len(mean) or not finite or min(std) <= 0:
            raise UserError(
                "mean and std take one number each (gray images) or three (color), all finite and std above 0, "
                f"not {tuple(mean)} and {tuple(std)}"
            )
        self.input_size = (len(mean), height, width)
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self._train_transform = train_transform(augment, (height, width), self.mean, self.std, prepare)
        self._eval_transform = eval_transform(evaluation, (height, width), self.mean, self.std, prepare)
        self._unreadable = UnreadableImages()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def model_fields(self) -> dict[str, int]:
        return {"num_classes": self.num_classes, "in_chans": self.input_size[0]}

    def describe(self) -> dict[str, Any]:
        return {
            "class_names": [str(name) for name in self.class_names],
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that were skipped so far because they could not be read, sorted."""
        return self._unreadable.names

    def transform_for_train(self) -> ImageTransform:
        """Return the transform from any image to an augmented, normalized (C, H, W). It uses the global streams."""
        return self._train_transform

    def transform_for_eval(self) -> ImageTransform:
        """Return the validation transform from any image to a normalized (C, H, W). It needs no `setup`."""
        return self._eval_transform

    def denormalize(self, images: Tensor) -> Tensor:
        """Convert normalized images (..., C, H, W) back to pixels in [0, 1] for display."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)

    def teardown(self, stage: str) -> None:
        """End the loading processes and report the images that could not be read, with their count."""
        super().teardown(stage)
        self._unreadable.close()


@dataclass(frozen=True)
class Parts:
    """Three parts of a data set, and its class names by label."""

    train: ImageSource
    val: ImageSource
    test: ImageSource
    class_names: list[str]


class IndexedImageData(ImageData):
    """Data module over images that are accessible by index. Subclasses provide them in `_load`.

    Attributes:
        class_balanced: whether an epoch draws every class equally often, instead of every image once.
    """

    class_balanced = False
    _parts: Parts | None = None

    @abstractmethod
    def _load(self) -> Parts:
        """Find the images and labels.

        Raises:
            UserError: if they are missing or invalid.
        """

    def setup(self, stage: str | None = None) -> None:
        """Find the images. The first call does so for all stages."""
        if self._parts is None:
            self._parts = self._load()
            self.class_names = self._parts.class_names

    @property
    def parts(self) -> Parts:
        """Return the images without transforms.

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


def hold_out(source: ImageSource, fraction: float, seed: int) -> tuple[ImageSource, ImageSource]:
    """Split a source into (kept, held out), with the same fraction of every class held out."""
    kept, held_out = stratified_split(source.labels, fraction, seed)
    return SubsetSource(source, kept), SubsetSource(source, held_out)
