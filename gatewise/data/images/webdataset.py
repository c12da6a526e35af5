"""Images in shards (WebDataset): tar files, local or remote, for data larger than a disk.

A shard is a tar file of samples. A sample is a few files with one stem: `0001.jpg`, `0001.cls`. Shards are read from
front to back, so shuffling is limited to the order of the shards and to a buffer of samples that each stream draws
from. Every loading process of every training process has one stream, over its own part of the shards.

What is exact and what is not:

- The batches of an epoch are a function of the seed, the epoch, the number of processes, of workers and of images per
  batch. Resuming is bit-identical if these are unchanged, which is checked. The samples of batches that were already
  trained on are read again and discarded undecoded, which costs reading but no decoding.
- Other numbers of processes or workers give another order. Two processes are not equivalent to one with twice the
  batch size.
- An epoch is `train_samples` images long. A stream with fewer images than its share starts over, and one with more
  leaves some out. With shards of equal size and equally many per stream, every image occurs exactly once.
- Validation and test count every sample exactly once. Every process reads all of those shards but decodes only its
  own samples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from gatewise.data.images.base import ImageData
from gatewise.data.images.handover import Loaded, UnreadableImages
from gatewise.data.images.loading import MAX_UNREADABLE_IN_A_ROW, ImageEvalLoader, ImageTrainLoader
from gatewise.data.images.reading import UnreadableImageError
from gatewise.data.images.shards import (
    Lookahead,
    Sample,
    SampleReader,
    count_samples,
    expand_shards,
    is_local,
    shard_samples,
)
from gatewise.data.images.transforms import (
    CENTER_CROP,
    IMAGENET_MEAN,
    IMAGENET_STD,
    RANDOM_RESIZED,
    Augmentation,
    Evaluation,
    ImageTransform,
)
from gatewise.data.loading import EvalLoader, Share, TrainLoader, as_it_is, eval_batches
from gatewise.data.module import optional_module, require_at_least
from gatewise.data.randomness import frozen_generator, preserved_streams, seed_global_streams
from gatewise.errors import UserError


class WebDataset(ImageData):
    """Labeled images in shards.

    Args:
        train_shards: paths or URLs of the training shards, with braces ("imagenet-train-{0000..1023}.tar") or, for
            paths, "*". Schemes are http, https and those of the webdataset package (gs, hf, scp, ...) except "pipe:",
            because recipes run no shell commands. A shard may be compressed with gzip, bzip2 or xz. A damaged one is
            an error.
        val_shards: paths or URLs of the validation shards.
        test_shards: paths or URLs of the test shards; None: the validation shards.
        train_samples: number of images per epoch; None: count local shards by reading their headers.
        val_samples: exact number of samples in the validation shards; None: count local shards.
        test_samples: exact number of samples in the test shards; None: count local shards.
        num_classes: number of classes, if `class_names` is not given.
        class_names: class names by label.
        image_keys: extensions of the image file of a sample; the first one present is used.
        label_key: extension of the file with the label, a decimal integer.
        shuffle_buffer: number of undecoded samples that each stream draws from.
        image_size: size of the network input: side of a square, or (height, width).
        mean: mean per channel, subtracted from pixels in [0, 1]; a single number makes images gray.
        std: standard deviation per channel, by which pixels are then divided.
        batch_size: number of images per training batch and process.
        eval_batch_size: batch size for validation and test; None: `batch_size`.
        num_workers: number of loading processes in training and of threads in evaluation.
        seed: random seed of order and augmentation.
        augment: augmentation of training images.
        evaluation: resizing of images in validation, test and prediction.
    """

    def __init__(
        self,
        train_shards: str | list[str],
        val_shards: str | list[str],
        *,
        test_shards: str | list[str] | None = None,
        train_samples: int | None = None,
        val_samples: int | None = None,
        test_samples: int | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        image_keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp"),
        label_key: str = "cls",
        shuffle_buffer: int = 1000,
        image_size: int | tuple[int, int] = 224,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
        augment: Augmentation = RANDOM_RESIZED,
        evaluation: Evaluation = CENTER_CROP,
    ) -> None:
        super().__init__(
            image_size=image_size,
            mean=mean,
            std=std,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            augment=augment,
            evaluation=evaluation,
        )
        if num_classes is None and class_names is None:
            raise UserError("shards do not list their classes: give num_classes or class_names")
        if num_classes is not None and class_names is not None and num_classes != len(class_names):
            raise UserError(f"num_classes is {num_classes}, but class_names holds {len(class_names)} names")
        require_at_least("shuffle_buffer", 1, shuffle_buffer)
        self.class_names = class_names or [str(label) for label in range(num_classes or 0)]
        require_at_least("num_classes", 1, len(self.class_names))
        self.train_shards, self.train_samples = train_shards, train_samples
        self.val_shards, self.val_samples = val_shards, val_samples
        self.test_shards, self.test_samples = test_shards, test_samples
        self.shuffle_buffer = shuffle_buffer
        self._reader = SampleReader(image_keys, label_key, len(self.class_names))
        self._parts: dict[str, tuple[list[str], int]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Find the shards and count samples where no number is given. The first call does so for all stages."""
        if self._parts:
            return
        optional_module("webdataset")
        parts = {
            "train": _counted("train", self.train_shards, self.train_samples),
            "val": _counted("val", self.val_shards, self.val_samples),
        }
        test = self.test_shards
        parts["test"] = parts["val"] if test is None else _counted("test", test, self.test_samples)
        self._parts = parts

    def train_dataloader(self) -> TrainLoader:
        shards, samples = self._parts["train"]
        share = self._share()
        streams = share.world_size * max(1, self.num_workers)
        if len(shards) < streams:
            raise UserError(
                f"{len(shards)} training shards cannot feed {share.world_size} processes with {self.num_workers} "
                "workers, which take at least one each; lower num_workers or write more shards"
            )
        length = samples // (self.batch_size * share.world_size)
        if length == 0:
            raise UserError(f"{samples} training samples do not fill one batch of {self.batch_size} on each process")
        dataset = ShardBatches(
            shards, self._reader, self._train_transform, length, self.batch_size, self.shuffle_buffer, self.seed, share
        )
        identity = {
            "seed": self.seed,
            "number of shards": len(shards),
            "batches per epoch": length,
            "batch size": self.batch_size,
            "number of processes": share.world_size,
            "num_workers": self.num_workers,
            "shuffle_buffer": self.shuffle_buffer,
        }
        return ShardTrainLoader(dataset, length, identity, self.num_workers, self._unreadable)

    def val_dataloader(self) -> EvalLoader:
        return self._eval_dataloader(*self._parts["val"])

    def test_dataloader(self) -> EvalLoader:
        return self._eval_dataloader(*self._parts["test"])

    def _eval_dataloader(self, shards: list[str], samples: int) -> EvalLoader:
        return ShardEvalLoader(
            shards,
            samples,
            self._reader,
            self._eval_transform,
            self.eval_batch_size,
            max(1, self.num_workers),
            self._share(),
            self._unreadable,
        )


class ShardBatches(IterableDataset[Any]):
    """Training batches of one process, from one stream per worker.

    Batch b comes from stream b modulo the number of workers. An iteration begins at `epoch` and `start`.
    """

    def __init__(
        self,
        shards: list[str],
        reader: SampleReader,
        transform: ImageTransform,
        length: int,
        batch_size: int,
        shuffle_buffer: int,
        seed: int,
        share: Share,
    ) -> None:
        self._shards = shards
        self._reader = reader
        self._transform = transform
        self._length = length
        self._batch_size = batch_size
        self._shuffle_buffer = shuffle_buffer
        self._seed = seed
        self._share = share
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[Loaded | UserError]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        # The loader asks worker 0 first, so worker 0 takes the stream of the next batch.
        own = (self.start + worker) % workers
        first = -(-(self.start - own) // workers)
        last = -(-(self._length - own) // workers)
        stream = self._share.rank * workers + own
        try:
            samples = Lookahead(self._samples(stream, workers * self._share.world_size))
            samples.skip(first * self._batch_size)
            for batch in range(first, last):
                yield self._batch(samples, stream, batch * self._batch_size)
        # Returned, not raised: raised in a worker, it would reach the user as a page of traceback.
        except UserError as error:
            yield error

    def _samples(self, stream: int, streams: int) -> Iterator[Sample]:
        """Yield the samples of one stream forever, every sample once per pass."""
        dealt = frozen_generator("shards", self._seed, self.epoch).permutation(len(self._shards))[stream::streams]
        for turn in count():
            generator = frozen_generator("turn", self._seed, self.epoch, stream, turn)
            shards = [self._shards[index] for index in generator.permutation(dealt)]
            samples = (sample for shard in shards for sample in shard_samples(shard))
            draw = random.Random(int(generator.randint(2**31)))
            empty = True
            for sample in optional_module("webdataset").shuffle(self._shuffle_buffer, rng=draw)(samples):
                empty = False
                yield sample
            if empty:
                raise UserError(f"shards without samples: {', '.join(shards[:5])}")

    def _batch(self, samples: Lookahead, stream: int, first: int) -> Loaded:
        images, labels = [], []
        unreadable: list[UnreadableImageError] = []
        with preserved_streams():
            for number in range(first, first + self._batch_size):
                image, label = self._readable(samples, unreadable)
                seed_global_streams("augment", self._seed, self.epoch, stream, number)
                images.append(self._transform(image))
                labels.append(label)
        return Loaded(default_collate(images), torch.tensor(labels), unreadable)

    def _readable(self, samples: Lookahead, unreadable: list[UnreadableImageError]) -> tuple[Image.Image, int]:
        """Return the next sample. An unreadable one is replaced by the next readable one, which keeps its own turn.

        So every batch takes the same number of samples from the stream, and they can be skipped without decoding.
        """
        for step in range(MAX_UNREADABLE_IN_A_ROW):
            try:
                found = self._reader(samples.peek(step))
            except UnreadableImageError as error:
                unreadable.append(error)
            else:
                samples.skip(1)
                return found
        raise UserError(f"{MAX_UNREADABLE_IN_A_ROW} samples in a row cannot be read, the last: {unreadable[-1]}")


class ShardTrainLoader(ImageTrainLoader):
    """Training batches from shards: (images float32 (B, C, H, W), labels int64 (B,))."""

    def __init__(
        self,
        dataset: ShardBatches,
        length: int,
        identity: dict[str, Any],
        num_workers: int,
        unreadable: UnreadableImages,
    ) -> None:
        super().__init__(length, identity, unreadable)
        self._dataset = dataset
        # Persistent workers would keep the epoch with which they were started.
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def _loaded(self, epoch: int, start: int) -> Iterator[Loaded | UserError]:
        self._dataset.epoch, self._dataset.start = epoch, start
        return iter(self._loader)


class ShardEvalLoader(ImageEvalLoader):
    """Evaluation batches from shards, in order.

    One reader feeds a pool of threads (decoding and resizing release the GIL), because several reading processes would
    each have to read everything.

    Raises:
        UserError: during iteration, if the shards do not hold the expected number of samples.
    """

    def __init__(
        self,
        shards: list[str],
        samples: int,
        reader: SampleReader,
        transform: ImageTransform,
        batch_size: int,
        threads: int,
        share: Share,
        unreadable: UnreadableImages,
    ) -> None:
        super().__init__(eval_batches(samples, batch_size, share), share, unreadable)
        self._shards = shards
        self._samples = samples
        self._reader = reader
        self._transform = transform
        self._threads = threads

    def _loaded(self) -> Iterator[Loaded]:
        ahead: deque[list[Future[tuple[Tensor, int]]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for samples in self._own_samples():
                ahead.append([pool.submit(self._read, sample) for sample in samples])
                if len(ahead) == 2:
                    yield _gather(ahead.popleft())
            while ahead:
                yield _gather(ahead.popleft())

    def _own_samples(self) -> Iterator[list[Sample]]:
        everything = (sample for shard in self._shards for sample in shard_samples(shard))
        position = 0
        for batch in self._batches:
            samples = list(islice(everything, batch.start - position, batch.stop - position))
            if len(samples) < len(batch):
                raise UserError(f"the shards hold fewer than the expected {self._samples} samples")
            position = batch.stop
            yield samples
        if position == self._samples and next(everything, None) is not None:
            raise UserError(f"the shards hold more than the expected {self._samples} samples")

    def _read(self, sample: Sample) -> tuple[Tensor, int]:
        image, label = self._reader(sample)
        return self._transform(image), label


def _gather(results: list[Future[tuple[Tensor, int]]]) -> Loaded:
    images, labels = [], []
    unreadable: list[UnreadableImageError] = []
    for result in results:
        try:
            image, label = result.result()
        except UnreadableImageError as error:
            unreadable.append(error)
        else:
            images.append(image)
            labels.append(label)
    return Loaded(torch.stack(images) if images else torch.empty(0), torch.tensor(labels), unreadable)


def _counted(part: str, patterns: str | list[str], samples: int | None) -> tuple[list[str], int]:
    shards = expand_shards(patterns)
    if samples is None:
        if not all(is_local(shard) for shard in shards):
            raise UserError(f"{part}_samples is required for remote shards, which are not fetched to count them")
        samples = sum(count_samples(shard) for shard in shards)
    require_at_least(f"{part}_samples", 1, samples)
    return shards, samples
