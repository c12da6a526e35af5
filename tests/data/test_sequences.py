"""Order, sharing and resuming of sequences, without a trainer."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.data.loading import Share
from gatewise.data.text.sequences import EpochPlan, SequenceData, SequenceSource, in_batches
from gatewise.errors import UserError


class Numbers(SequenceSource):
    """Sequences that say which they are; some cannot be read."""

    def __init__(self, size: int, unreadable: tuple[int, ...] = ()) -> None:
        self._size = size
        self._unreadable = unreadable

    def __len__(self) -> int:
        return self._size

    def batch(self, indices):
        if set(indices) & set(self._unreadable):
            raise UserError("torn")
        tokens = torch.tensor(indices)[:, None].expand(-1, 3)
        return tokens, tokens + 1


class NumberData(SequenceData):
    input_size = (3,)
    vocab_size = 100

    def __init__(self, size: int, batch_size: int = 4, workers: int = 0, seed: int = 0, unreadable=()) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=None, num_workers=workers, seed=seed)
        self._made = Numbers(size, unreadable)

    def _load(self):
        return dict.fromkeys(("train", "val", "test"), self._made)


def data(*args, **fields) -> NumberData:
    module = NumberData(*args, **fields)
    module.setup()
    return module


def epoch(loader, number: int) -> list[list[int]]:
    loader.set_epoch(number)
    return [tokens[:, 0].tolist() for tokens, _ in loader]


def test_an_epoch_has_every_sequence_once_but_for_the_incomplete_batch():
    loader = data(11).train_dataloader()
    seen = [index for batch in epoch(loader, 0) for index in batch]
    assert len(seen) == len(set(seen)) == 8
    assert len(loader) == 2


def test_epochs_and_seeds_differ_in_order_and_nothing_else_matters():
    loader = data(12).train_dataloader()
    first = epoch(loader, 0)
    assert first != epoch(loader, 1)
    assert first != epoch(data(12, seed=1).train_dataloader(), 0)
    assert first == epoch(data(12, workers=2).train_dataloader(), 0)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(12, 30))
def test_several_processes_see_the_batches_of_one(world_size, batch_size, size):
    def plan(batch: int, share: Share) -> list[list[int]]:
        def order(global_batch, generator):
            return in_batches(generator.permutation(size), global_batch)

        return list(EpochPlan(order, size, batch, 0, share))

    whole = plan(batch_size * world_size, Share(0, 1))
    shares = [plan(batch_size, Share(rank, world_size)) for rank in range(world_size)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_resuming_continues_with_the_next_batch(workers, done):
    whole = epoch(data(12).train_dataloader(), 5)
    loader = data(12, workers=workers).train_dataloader()
    loader.set_epoch(5)
    batches = iter(loader)
    for _ in range(done):
        next(batches)
    resumed = data(12, workers=workers).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert epoch(resumed, 5) == whole[done:]
    assert epoch(resumed, 6) == epoch(data(12).train_dataloader(), 6)


def test_resuming_with_another_order_is_refused():
    state = data(12).train_dataloader().state_dict()
    with pytest.raises(UserError, match="batch size over all processes was 4 and is 3"):
        data(12, batch_size=3).train_dataloader().load_state_dict(state)


def test_evaluation_has_every_sequence_once_in_order():
    module = data(11)
    for loader in (module.val_dataloader(), module.test_dataloader()):
        assert [index for tokens, _ in loader for index in tokens[:, 0].tolist()] == list(range(11))
        assert len(loader) == 3


def test_too_few_sequences_for_a_batch_are_an_error():
    with pytest.raises(UserError, match="3 training sequences do not fill one batch of 4"):
        data(3).train_dataloader()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_users_error(workers):
    with pytest.raises(UserError, match="torn"):
        list(data(8, workers=workers, unreadable=(5,)).train_dataloader())


def test_parts_are_known_after_setup_only():
    with pytest.raises(RuntimeError, match=r"NumberData\.setup\(\)"):
        NumberData(3).parts  # noqa: B018


def test_batches_of_indices_leave_the_rest_out():
    assert in_batches(np.arange(7), 3).tolist() == [[0, 1, 2], [3, 4, 5]]
