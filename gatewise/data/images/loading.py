"""Loading images by index, and handling images that cannot be read.

Order, resuming and sharing between processes follow `gatewise.data.loading`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, Sampler, default_collate

from gatewise.data.images.handover import Loaded, UnreadableImages
from gatewise.data.images.reading import UnreadableImageError
from gatewise.data.images.sources import ImageSource
from gatewise.data.images.transforms import ImageTransform
from gatewise.data.loading import Batch, BatchWorkers, EvalLoader, Share, TrainLoader
from gatewise.data.randomness import frozen_generator, preserved_streams, seed_global_streams
from gatewise.errors import UserError

Order: TypeAlias = Callable[[NDArray[np.int64], np.random.RandomState], NDArray[np.int64]]
# Position of a sample: its epoch and its index in the source.
Key: TypeAlias = tuple[int, int]

# This many unreadable files in a row are not just a few broken files: the folder or the disk is damaged.
MAX_UNREADABLE_IN_A_ROW = 100


class TrainingSet(Dataset[Any]):
    """Augmented images. An unreadable one is replaced by the next readable one in the order of the source.

    A replacement keeps the batch size constant. Its choice depends only on the files, so a resumed run and any number
    of processes choose the same.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, seed: int) -> None:
        self._source = source
        self._transform = transform
        self._seed = seed

    def __getitems__(self, keys: list[Key]) -> Loaded | UserError:
        images, labels, unreadable = [], [], []
        try:
            with preserved_streams():
                for epoch, index in keys:
                    image, label, errors = self._readable(index)
                    seed_global_streams("augment", self._seed, epoch, index)
                    images.append(self._transform(image))
                    labels.append(label)
                    unreadable += errors
        # Returned, not raised: raised in a worker, it would reach the user as a page of traceback.
        except UserError as error:
            return error
        return Loaded(default_collate(images), torch.tensor(labels), unreadable)

    def _readable(self, index: int) -> tuple[Image.Image, int, list[UnreadableImageError]]:
        errors: list[UnreadableImageError] = []
        for step in range(min(MAX_UNREADABLE_IN_A_ROW, len(self._source))):
            candidate = (index + step) % len(self._source)
            try:
                return self._source.image(candidate), int(self._source.labels[candidate]), errors
            except UnreadableImageError as error:
                errors.append(error)
        raise UserError(f"{len(errors)} images in a row cannot be read, the first: {errors[0]}; repair the data set")


class EvaluationSet(Dataset[Any]):
    """Images for evaluation. An unreadable one is left out of its batch."""

    def __init__(self, source: ImageSource, transform: ImageTransform) -> None:
        self._source = source
        self._transform = transform

    def __getitems__(self, indices: Sequence[int]) -> Loaded:
        images, labels = [], []
        unreadable: list[UnreadableImageError] = []
        for index in indices:
            try:
                images.append(self._transform(self._source.image(index)))
                labels.append(int(self._source.labels[index]))
            except UnreadableImageError as error:
                unreadable.append(error)
        return Loaded(default_collate(images) if images else torch.empty(0), torch.tensor(labels), unreadable)


class EpochBatches(Sampler[list[Key]]):
    """Batches of this process in an epoch, as keys. The incomplete last batch is left out.

    Global batch b of the epoch is `order[b * G : (b + 1) * G]` with G = batch_size * world_size, and this process
    takes the slice that belongs to its rank.

    Args:
        order: function from the labels and a generator, which depends only on (seed, epoch), to the indices of an
            epoch.
    Raises:
        UserError: if there are fewer images than in one global batch.
    """

    def __init__(self, labels: NDArray[np.int64], batch_size: int, seed: int, share: Share, order: Order) -> None:
        self.global_batch = batch_size * share.world_size
        if len(labels) < self.global_batch:
            raise UserError(
                f"{len(labels)} training images do not fill one batch of {self.global_batch} "
                f"({batch_size} on each of {share.world_size} processes); lower batch_size"
            )
        self._labels = labels
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self._order = order
        self.epoch = 0
        self.start = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Values besides the epoch that determine the order."""
        return {
            "seed": self._seed,
            "number of images": len(self._labels),
            "batch size over all processes": self.global_batch,
            "order": self._order.__name__,
        }

    def __len__(self) -> int:
        return len(self._labels) // self.global_batch

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = self._order(self._labels, frozen_generator("order", self._seed, epoch))
        first = self._share.rank * self._batch_size
        for batch in range(self.start, len(self)):
            start = batch * self.global_batch + first
            yield [(epoch, index) for index in order[start : start + self._batch_size].tolist()]


class ImageTrainLoader(TrainLoader):
    """Training batches (images float32 (B, C, H, W), labels int64 (B,)).

    Args:
        unreadable: collector of the images that cannot be read.
    """

    def __init__(self, length: int, identity: dict[str, Any], unreadable: UnreadableImages) -> None:
        super().__init__(length, identity)
        self._unreadable = unreadable
        self._has_run = False

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        # After one epoch and its validation, (almost) every image has been read, so one warning can name them all.
        if self._has_run:
            self._unreadable.warn()
        self._has_run = True
        for loaded in self._loaded(epoch, start):
            yield self._unreadable.unwrap(loaded)

    @abstractmethod
    def _loaded(self, epoch: int, start: int) -> Iterator[Loaded | UserError]:
        """Yield what was read for the batches of the epoch from number `start` on."""


class IndexedTrainLoader(ImageTrainLoader):
    """Training batches of an `ImageSource`: (images float32 (B, C, H, W), labels int64 (B,))."""

    def __init__(self, workers: BatchWorkers, batches: EpochBatches, unreadable: UnreadableImages) -> None:
        super().__init__(len(batches), batches.identity, unreadable)
        self._workers = workers
        self._epoch_batches = batches

    def _loaded(self, epoch: int, start: int) -> Iterator[Loaded | UserError]:
        self._epoch_batches.epoch, self._epoch_batches.start = epoch, start
        return iter(self._workers)


class ImageEvalLoader(EvalLoader):
    """Evaluation batches of this process: (images float32 (B, C, H, W), labels int64 (B,)).

    Raises:
        UserError: during iteration, if one of several processes can read no image of a batch.
    """

    def __init__(self, batches: list[range], share: Share, unreadable: UnreadableImages) -> None:
        self._batches = batches
        self._share = share
        self._unreadable = unreadable

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for loaded in self._loaded():
            images, labels = self._unreadable.unwrap(loaded)
            if len(labels):
                yield images, labels
            elif self._share.world_size > 1:
                # Leaving out the batch would make the other processes wait in their next forward pass.
                raise UserError(f"no image of a batch can be read, for example {loaded.unreadable[0]}")

    @abstractmethod
    def _loaded(self) -> Iterator[Loaded]:
        """Yield what was read for each of `batches`."""


class IndexedEvalLoader(ImageEvalLoader):
    """Evaluation batches of an `ImageSource`, in order."""

    def __init__(self, workers: BatchWorkers, batches: list[range], share: Share, unreadable: UnreadableImages) -> None:
        super().__init__(batches, share, unreadable)
        self._workers = workers

    def _loaded(self) -> Iterator[Loaded]:
        return iter(self._workers)
