"""Order, augmentation and resuming, without a trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gatewise.data.images.handover import UnreadableImages
from gatewise.data.images.loading import EpochBatches, EvaluationSet, IndexedEvalLoader, IndexedTrainLoader, TrainingSet
from gatewise.data.images.reading import UnreadableImageError
from gatewise.data.images.sources import ArraySource, ImageSource
from gatewise.data.loading import BatchWorkers, Share, eval_batches
from gatewise.data.randomness import uniform_order
from gatewise.errors import UserError

ONE = Share(0, 1)


class NoisySource(ImageSource):
    """Images of one value each, some of which cannot be read."""

    def __init__(self, size: int, unreadable: frozenset[int] = frozenset()) -> None:
        self.labels = np.arange(size, dtype=np.int64)
        self._unreadable = unreadable

    def image(self, index: int) -> Image.Image:
        if index in self._unreadable:
            raise UnreadableImageError(self.name(index), "torn")
        return Image.new("L", (2, 2), index)

    def name(self, index: int) -> str:
        return f"image {index}"


def noisy(image: Image.Image) -> torch.Tensor:
    """Draws from all three global streams, as transforms do."""
    import random

    noise = torch.rand(1) + np.random.rand() + random.random()
    return torch.full((1, 2, 2), float(np.asarray(image)[0, 0])) + noise.float() / 10


def plain(image: Image.Image) -> torch.Tensor:
    return torch.full((1, 2, 2), float(np.asarray(image)[0, 0]))


def train_loader(
    source: ImageSource, batch_size: int, share: Share = ONE, workers: int = 0, seed: int = 0, log=None
) -> IndexedTrainLoader:
    batches = EpochBatches(source.labels, batch_size, seed, share, uniform_order)
    return IndexedTrainLoader(
        BatchWorkers(TrainingSet(source, noisy, seed), batches, workers), batches, log or UnreadableImages()
    )


def eval_loader(source: ImageSource, batch_size: int, share: Share = ONE, workers: int = 0, log=None):
    batches = eval_batches(len(source), batch_size, share)
    return IndexedEvalLoader(
        BatchWorkers(EvaluationSet(source, plain), batches, workers), batches, share, log or UnreadableImages()
    )


def epoch(loader: IndexedTrainLoader, number: int) -> list[tuple[list[float], list[int]]]:
    loader.set_epoch(number)
    return [(images.flatten().tolist(), labels.tolist()) for images, labels in loader]


def test_an_epoch_has_every_image_once_but_for_the_incomplete_batch():
    labels = [label for _, batch in epoch(train_loader(NoisySource(11), 4), 0) for label in batch]
    assert len(labels) == len(set(labels)) == 8


def test_epochs_and_seeds_differ_in_order_and_augmentation():
    loader = train_loader(NoisySource(12), 4)
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert first != second
    assert [labels for _, labels in first] != [labels for _, labels in second]
    assert first != epoch(train_loader(NoisySource(12), 4, seed=1), 0)
    assert first == epoch(loader, 0)


def test_workers_change_nothing():
    alone, helped = train_loader(NoisySource(12), 3), train_loader(NoisySource(12), 3, workers=2)
    for number in (0, 1):
        assert epoch(alone, number) == epoch(helped, number)


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    def by_label(batch_size: int) -> dict[int, list[float]]:
        found = {}
        for images, labels in epoch(train_loader(NoisySource(12), batch_size), 0):
            for place, label in enumerate(labels):
                found[label] = images[4 * place : 4 * place + 4]
        return found

    assert by_label(3) == by_label(6)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(12, 30))
def test_several_processes_see_the_batches_of_one(world_size, batch_size, size):
    whole = epoch(train_loader(NoisySource(size), batch_size * world_size), 2)
    shares = [
        epoch(train_loader(NoisySource(size), batch_size, Share(rank, world_size)), 2) for rank in range(world_size)
    ]
    joined = [
        ([value for images, _ in parts for value in images], [label for _, labels in parts for label in labels])
        for parts in zip(*shares, strict=True)
    ]
    assert joined == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_resuming_continues_after_the_last_batch_that_was_handed_out(workers, stop):
    whole = epoch(train_loader(NoisySource(13), 3, workers=workers), 5)
    interrupted = train_loader(NoisySource(13), 3, workers=workers)
    interrupted.set_epoch(5)
    batches = iter(interrupted)
    for _ in range(stop):
        next(batches)
    state = interrupted.state_dict()

    resumed = train_loader(NoisySource(13), 3, workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert epoch(resumed, 5) == whole[stop:]
    assert epoch(resumed, 5) == whole


def test_a_place_in_another_epoch_is_forgotten():
    loader = train_loader(NoisySource(12), 3)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "batches": 4})
    assert len(epoch(loader, 1)) == 4
    loader.set_epoch(2)
    assert loader.state_dict()["batches"] == 0


def test_an_iterator_takes_the_epoch_that_is_set_before_its_first_batch():
    loader = train_loader(NoisySource(12), 3)
    early = iter(loader)
    loader.set_epoch(3)
    assert next(early)[1].tolist() == epoch(loader, 3)[0][1]


@pytest.mark.parametrize(
    ("other", "change"),
    [
        (train_loader(NoisySource(12), 3, seed=1), "seed was 0 and is 1"),
        (train_loader(NoisySource(15), 3), "number of images was 12 and is 15"),
        (train_loader(NoisySource(12), 4), "batch size over all processes was 3 and is 4"),
    ],
)
def test_resuming_in_another_order_is_refused(other, change):
    with pytest.raises(UserError, match=change):
        other.load_state_dict(train_loader(NoisySource(12), 3).state_dict())


def test_resuming_with_other_processes_is_allowed_for_the_same_global_batch():
    one = train_loader(NoisySource(12), 6)
    state = {**one.state_dict(), "batches": 1}
    two = train_loader(NoisySource(12), 3, Share(1, 2))
    two.load_state_dict(state)
    assert epoch(two, 0)[0][1] == epoch(one, 0)[1][1][3:]


def test_loading_leaves_the_global_streams_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    seen = [torch.rand(1)]
    epoch(train_loader(NoisySource(12), 3), 0)
    epoch(train_loader(NoisySource(12), 3, workers=1), 0)
    assert torch.equal(torch.cat([*seen, torch.rand(1)]), expected)


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(UserError, match=r"7 training images do not fill one batch of 8 \(4 on each of 2 processes\)"):
        train_loader(NoisySource(7), 4, Share(0, 2))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 60))
def test_evaluation_counts_every_image_once_in_equally_many_batches(world_size, batch_size, size):
    try:
        shares = [eval_batches(size, batch_size, Share(rank, world_size)) for rank in range(world_size)]
    except UserError:
        assert size < world_size or batch_size == 1
        return
    indices = [index for batches in shares for batch in batches for index in batch]
    assert sorted(indices) == list(range(size))
    assert len({len(batches) for batches in shares}) == 1
    assert {len(batch) for batches in shares for batch in batches} <= set(range(1, batch_size + 1))


def test_evaluation_on_one_process_has_full_batches_and_a_rest():
    assert [len(batch) for batch in eval_batches(10, 4, ONE)] == [4, 4, 2]
    assert eval_batches(0, 4, ONE) == []


def test_evaluation_that_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match="3 samples cannot be divided among 4 processes"):
        eval_batches(3, 8, Share(0, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_training_image_is_replaced_by_the_next(workers):
    log = UnreadableImages()
    source = NoisySource(8, unreadable=frozenset({2, 3, 7}))
    batches = epoch(train_loader(source, 4, workers=workers, log=log), 0)
    assert sorted(label for _, labels in batches for label in labels) == [0, 0, 1, 4, 4, 4, 5, 6]
    assert log.names == ["image 2", "image 3", "image 7"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_evaluation_image_is_left_out(workers):
    log = UnreadableImages()
    source = NoisySource(9, unreadable=frozenset({1, 8}))
    batches = [labels.tolist() for _, labels in eval_loader(source, 4, workers=workers, log=log)]
    # Image 8 was the last batch all by itself.
    assert batches == [[0, 2, 3], [4, 5, 6, 7]]
    assert log.names == ["image 1", "image 8"]


def test_a_batch_without_readable_images_stops_an_evaluation_on_several_processes():
    source = NoisySource(4, unreadable=frozenset({0, 1}))
    with pytest.raises(UserError, match="no image of a batch can be read, for example image 0"):
        list(eval_loader(source, 2, Share(0, 2)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_of_which_nothing_can_be_read_stops_training(workers):
    source = NoisySource(4, unreadable=frozenset(range(4)))
    with pytest.raises(UserError, match=r"^4 images in a row cannot be read, the first: image \d") as caught:
        epoch(train_loader(source, 2, workers=workers), 0)
    assert "Traceback" not in str(caught.value)


def test_closed_workers_start_again():
    source = ArraySource(np.zeros((6, 2, 2), np.uint8), np.arange(6), "test")
    workers = BatchWorkers(EvaluationSet(source, plain), [range(3), range(3, 6)], 1)
    for _ in range(2):
        assert [loaded.labels.tolist() for loaded in workers] == [[0, 1, 2], [3, 4, 5]]
        workers.close()
