from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from gatewise.errors import Failure, UserError
from gatewise.files.locking import LOCK_NAME
from gatewise.tasks import parse_recipe, train
from gatewise.tasks.logs import read_log

ONE_EPOCH = {"trainer.epochs": 1, "trainer.limit_train_batches": 3}


class At(L.Callback):
    """Does something before a given batch of the run."""

    def __init__(self, batch: int, action) -> None:
        self.batch = batch
        self.action = action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            self.action(pl_module, batch)


def test_a_run_leaves_recipe_checkpoints_logs_and_summary(tiny_recipe):
    recipe = tiny_recipe(ONE_EPOCH)
    result = train(recipe)
    names = {path.name for path in result.folder.iterdir()}
    assert names - {LOCK_NAME} == {
        "recipe.yaml",
        "best.ckpt",
        "last.ckpt",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    }
    assert list((result.folder / "tensorboard").glob("events*"))
    resolved = parse_recipe(yaml.safe_load((result.folder / "recipe.yaml").read_text()))
    assert resolved.model.fields["num_classes"] == 10
    assert json.loads((result.folder / "summary.json").read_text())["metrics"] == result.metrics
    log = read_log(result.folder / "metrics.csv")
    assert [row["step"] for row in log if "train/loss" in row] == [0, 1, 2]
    assert {"val/loss", "val/top1", "val/top5"} <= set(log[-1])


def test_training_learns(tiny_recipe):
    whole = {"trainer.epochs": 3, "trainer.limit_train_batches": None, "trainer.limit_val_batches": None}
    easy = {"data.augment.crop_padding": 0, "model.embed_dim": 16, "optim.lr": 5e-3}
    result = train(tiny_recipe({**whole, **easy}))
    assert result.metrics["val/top1"] > 0.7


def test_best_is_the_highest_score_not_the_latest(tiny_recipe, monkeypatch):
    from gatewise.tasks.classification import ImageClassification

    scores = iter([0.25, 0.75, 0.5])
    monkeypatch.setattr(ImageClassification, "monitor", "val/given")
    monkeypatch.setattr(
        ImageClassification, "on_validation_epoch_end", lambda self: self.log("val/given", next(scores))
    )
    result = train(tiny_recipe({**ONE_EPOCH, "trainer.epochs": 3}))
    assert result.metrics["val/given"] == 0.75
    assert result.metrics["epoch"] == 1
    assert torch.load(result.best, weights_only=True)["epoch"] == 1
    assert torch.load(result.last, weights_only=True)["epoch"] == 2


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(tiny_recipe):
    recipe = tiny_recipe(ONE_EPOCH)
    first = train(recipe)
    before = first.last.read_bytes()
    with pytest.raises(UserError, match="holds a run already.*--resume.*--overwrite.*--output"):
        train(recipe)
    assert first.last.read_bytes() == before
    (first.folder / "notes.txt").write_text("mine")
    train(recipe, overwrite=True)
    assert (first.folder / "notes.txt").read_text() == "mine"
    assert len(read_log(first.folder / "metrics.csv")) == 4


def test_an_earlier_run_survives_a_mistake_in_the_new_recipe(tiny_recipe):
    first = train(tiny_recipe(ONE_EPOCH))
    with pytest.raises(UserError, match="does not|no checkpoint|expected"):
        train(tiny_recipe({**ONE_EPOCH, "model.checkpoint": "none.pth"}), overwrite=True)
    assert first.last.exists()


def test_output_must_not_be_a_file(tiny_recipe):
    recipe = tiny_recipe()
    Path(recipe.output).write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        train(recipe)


@pytest.mark.parametrize("name", ["num_classes", "in_chans"])
def test_a_recipe_that_contradicts_its_data_is_refused_before_anything_is_written(tiny_recipe, name):
    recipe = tiny_recipe({f"model.{name}": 7})
    with pytest.raises(UserError, match=rf"model\.{name} is 7, but the data \(digits\) has"):
        train(recipe)
    assert not Path(recipe.output).exists()


def test_weights_to_start_from_are_loaded_and_another_head_is_replaced_when_asked(tiny_recipe):
    source = train(tiny_recipe(ONE_EPOCH, output="source"))
    start = {
        **ONE_EPOCH,
        "trainer.limit_train_batches": 1,
        "model.checkpoint": str(source.last),
        "optim.warmup_epochs": 1,
    }
    tuned = train(tiny_recipe(start, output="tuned"))
    # The only update has the rate at which warm-up begins, 0.
    left, right = (torch.load(run.last, weights_only=True)["state_dict"] for run in (source, tuned))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_batch(tiny_recipe):
    def poison(task, batch):
        batch[0][0, 0, 0, 0] = float("nan")

    recipe = tiny_recipe({"trainer.checkpoint_every": 2})
    with pytest.raises(Failure, match=r"the loss is nan at step 3 \(epoch 0, batch 3\).*nan_batch\.pt.*optim\.lr"):
        train(recipe, callbacks=[At(3, poison)])
    saved = torch.load(f"{recipe.output}/nan_batch.pt", weights_only=True)
    assert saved["inputs"].shape == (16, 3, 32, 32)
    assert saved["inputs"][0, 0, 0, 0].isnan()
    assert saved["targets"].shape == (16,)
    assert (saved["step"], saved["epoch"], saved["batch"]) == (3, 0, 3)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert torch.load(f"{recipe.output}/last.ckpt", weights_only=True)["global_step"] == 2


def test_an_interruption_waits_for_the_update_that_is_being_accumulated(tiny_recipe):
    recipe = tiny_recipe({"trainer.accumulate": 2})
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[At(2, lambda task, batch: os.kill(os.getpid(), signal.SIGINT))])
    # Batches 0 and 1 made the first update, 2 and 3 the second.
    content = torch.load(f"{recipe.output}/last.ckpt", weights_only=True)
    assert content["global_step"] == 2
    assert content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 4


def test_signals_are_given_back_after_a_run(tiny_recipe):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tiny_recipe(ONE_EPOCH))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_device_that_is_not_there_is_a_users_mistake(tiny_recipe):
    if torch.backends.mps.is_available():
        pytest.skip("this machine has the device that is meant to be missing")
    recipe = tiny_recipe({"trainer.accelerator": "mps"})
    with pytest.raises(UserError, match="the recipe's trainer section is refused"):
        train(recipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_the_step_in_work_and_says_how_to_go_on(tiny_recipe, capfd, number):
    recipe = tiny_recipe()
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[At(2, lambda task, batch: os.kill(os.getpid(), number))])
    assert signal.getsignal(number) == before
    assert torch.load(f"{recipe.output}/last.ckpt", weights_only=True)["global_step"] == 3
    assert f"gatewise train {recipe.output}/recipe.yaml --resume" in capfd.readouterr().err
    assert train(recipe, resume=True).steps == 10


def test_a_second_interruption_stops_at_once(tiny_recipe):
    def twice(task, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    recipe = tiny_recipe()
    with pytest.raises(KeyboardInterrupt):
        train(recipe, callbacks=[At(2, twice)])
    assert not Path(recipe.output, "last.ckpt").exists()


def test_without_validation_data_there_is_no_best(tiny_recipe):
    result = train(tiny_recipe({**ONE_EPOCH, "trainer.validate_every": 2}))
    assert result.best is None
    assert result.metrics == {}
    assert result.last.exists()
