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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from gatewise.data._handover import Batch, Loaded, UnreadableImages
from gatewise.data._random import frozen_generator, preserved_streams, seed_global_streams
from gatewise.data.images import UnreadableImageError
from gatewise.data.sources import ImageSource
from gatewise.data.transforms import ImageTransform
from gatewise.errors import UserError

Order: TypeAlias = Callable[[NDArray[np.int64], np.random.RandomState], NDArray[np.int64]]
# Where a sample stands: its epoch and its index in the source.
Key: TypeAlias = tuple[int, int]

# So many unreadable files in a row are no few broken ones: the folder, or the disk, is damaged.
MAX_UNREADABLE_IN_A_ROW = 100


class Share(NamedTuple):
    """Which of how many data-parallel processes this is."""

    rank: int
    world_size: int


class TrainingSet(Dataset[Any]):
    """Augmented images; an unreadable one is stood in for by the next readable one in the source's order.

    A stand-in keeps the batch size constant, and which it is depends on the files alone: a resumed run and any number
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
        # Handed over as a value: raised in a worker it would reach the user as a page of traceback.
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
        raise UserError(f"{len(errors)} images in a row cannot be read, the first: {errors[0]}; mend the data set")


class EvaluationSet(Dataset[Any]):
    """Images as they are evaluated; an unreadable one is left out of its batch."""

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
    """This process's batches of an epoch, as keys; the incomplete last batch is left out.

    Global batch b of the epoch is `order[b * G : (b + 1) * G]` with G = batch_size * world_size, and this process
    takes the slice of it that belongs to its rank.

    Args:
        order: the epoch's indices, from the labels and a generator that depends on (seed, epoch) alone.
    Raises:
        UserError: if there are fewer images than one global batch takes.
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
        """What the order depends on, beside the epoch."""
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
        unreadable: takes note of the images that cannot be read.
    """

    def __init__(self, length: int, identity: dict[str, Any], unreadable: UnreadableImages) -> None:
        self.epoch = 0
        self._length = length
        self._identity = identity
        self._unreadable = unreadable
        self._place: Key = (0, 0)
        self._resume: Key | None = None
        self._has_run = False

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
        # After one epoch and its validation (almost) every image has been read: one warning can name them.
        if self._has_run:
            self._unreadable.warn()
        self._has_run = True
        for done, loaded in enumerate(self._loaded(epoch, start), start=start + 1):
            self._place = (epoch, done)
            yield self._unreadable.unwrap(loaded)

    @abstractmethod
    def _loaded(self, epoch: int, start: int) -> Iterator[Loaded | UserError]:
        """What was read for each of the epoch's batches from number `start` on."""

    def state_dict(self) -> dict[str, Any]:
        """The epoch, how many of its batches have been handed out, and what identifies the order."""
        batches = self._place[1] if self._place[0] == self.epoch else 0
        return {"epoch": self.epoch, "batches": batches, **self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last batch that was handed out when `state_dict` was taken.

        Raises:
            UserError: if the order was another one (seed, batch size, number of images, ...).
        """
        changed = [
            f"{name} was {state_dict.get(name)} and is {value}"
            for name, value in self._identity.items()
            if state_dict.get(name) != value
        ]
        if changed:
            raise UserError(
                f"cannot continue within an epoch with another order of the images: {'; '.join(changed)}; "
                "restore what changed, or start from weights alone"
            )
        self.epoch = state_dict["epoch"]
        self._place = self._resume = (state_dict["epoch"], state_dict["batches"])


class IndexedTrainLoader(TrainLoader):
    """Training batches of an `ImageSource`: (images float32 (B, C, H, W), labels int64 (B,))."""

    def __init__(self, workers: BatchWorkers, batches: EpochBatches, unreadable: UnreadableImages) -> None:
        super().__init__(len(batches), batches.identity, unreadable)
        self._workers = workers
        self._epoch_batches = batches

    def _loaded(self, epoch: int, start: int) -> Iterator[Loaded | UserError]:
        self._epoch_batches.epoch, self._epoch_batches.start = epoch, start
        return iter(self._workers)


class EvalLoader(ABC):
    """The batches of an evaluation on this process: (images float32 (B, C, H, W), labels int64 (B,)).

    Raises:
        UserError: in the iteration, if one of several processes can read no image of a batch.
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
                # Left out, it would leave the other processes waiting in their next forward pass.
                raise UserError(f"no image of a batch can be read, for example {loaded.unreadable[0]}")

    @abstractmethod
    def _loaded(self) -> Iterator[Loaded]:
        """What was read for each of `batches`."""


class IndexedEvalLoader(EvalLoader):
    """Evaluation batches of an `ImageSource`, in its order."""

    def __init__(self, workers: BatchWorkers, batches: list[range], share: Share, unreadable: UnreadableImages) -> None:
        super().__init__(batches, share, unreadable)
        self._workers = workers

    def _loaded(self) -> Iterator[Loaded]:
        return iter(self._workers)


def eval_batches(size: int, batch_size: int, share: Share) -> list[range]:
    """This process's batches of `size` images: every image once, as many batches on every process.

    All batches are full but the last one or two rounds, which are shared out evenly so that none is empty.

    Raises:
        UserError: if that is impossible (fewer images than processes, or batches of one that do not come out even).
    """
    if size == 0:
        return []
    rank, world_size = share
    rounds = -(-size // (batch_size * world_size))
    if size < rounds * world_size:
        raise UserError(
            f"{size} images cannot be shared by {world_size} processes in batches of at most {batch_size} so that "
            "each gets as many batches; use fewer processes or, above one image per process, larger batches"
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
