from __future__ import annotations

import copy

import lightning as L
import pytest
import torch

from gatewise.errors import CheckpointError
from gatewise.tasks import load_trained, train
from gatewise.tasks.ema import WeightAverage


class Follow(L.Callback):
    """Averages by hand what `WeightAverage` averages, and looks at what validation uses."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average = None
        self.validated = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        current = copy.deepcopy(pl_module.model.state_dict())
        if self.average is None:
            self.average = current
            return
        for name, value in current.items():
            self.average[name] = self.decay * self.average[name] + (1 - self.decay) * value

    def on_validation_end(self, trainer, pl_module):
        self.validated = copy.deepcopy(pl_module.evaluated().state_dict())


def test_the_average_is_what_it_says_and_is_validated_saved_and_shipped(tiny_recipe):
    follow = Follow(0.7)
    result = train(tiny_recipe({"trainer.epochs": 1, "trainer.ema": 0.7}), callbacks=[follow])
    content = torch.load(result.best, weights_only=True)
    shipped = load_trained(result.best).model.state_dict()
    for name, expected in follow.average.items():
        torch.testing.assert_close(content["state_dict_ema"][f"model.{name}"], expected)
        assert torch.equal(follow.validated[name], content["state_dict_ema"][f"model.{name}"])
        assert torch.equal(shipped[name], content["state_dict_ema"][f"model.{name}"])
    assert any(not torch.equal(content["state_dict"][f"model.{name}"], shipped[name]) for name in shipped)


def test_batches_that_make_no_update_leave_the_average_alone(tiny_recipe, monkeypatch):
    steps = []
    original = WeightAverage.on_train_batch_end

    def watch(self, trainer, task, *rest):
        before = copy.deepcopy(self.average.module.state_dict())
        original(self, trainer, task, *rest)
        after = self.average.module.state_dict()
        steps.append(any(not torch.equal(before[name], after[name]) for name in after))

    monkeypatch.setattr(WeightAverage, "on_train_batch_end", watch)
    # Four batches, two to an update.
    fields = {"trainer.epochs": 1, "trainer.limit_train_batches": 4, "trainer.accumulate": 2, "trainer.ema": 0.5}
    train(tiny_recipe({**fields, "optim.schedule": "constant"}))
    assert steps == [False, True, False, True]


def test_a_checkpoint_without_averages_is_refused(tiny_recipe):
    average = WeightAverage(0.9)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        average.on_load_checkpoint(None, None, {"state_dict": {}})
