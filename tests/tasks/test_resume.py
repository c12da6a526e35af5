from __future__ import annotations

import lightning as L
import pytest

from gatewise.errors import UserError
from gatewise.tasks import train
from gatewise.tasks.logs import read_log
from tests.tasks.conftest import assert_same_checkpoint

EVERYTHING_RANDOM = {
    "model.drop_path_rate": 0.3,
    "task.mixing": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "data.augment": {"random_erasing": 0.5, "hflip": 0.5},
    "trainer.ema": 0.9,
    "trainer.checkpoint_every": 2,
    "optim.warmup_epochs": 1,
}


class Crash(L.Callback):
    """Dies like a power cut, as far as a callback can: right after update `at`, nothing is cleaned up."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.updates == self.at:
            raise RuntimeError("power cut")


# Updates 1 to 5 are epoch 0; last.ckpt is written after 2 and 4, after each epoch's validation, and after 6 and 8.
@pytest.mark.parametrize(
    ("at", "fields"),
    [
        pytest.param(3, {}, id="mid-epoch"),
        pytest.param(5, {}, id="between-epochs"),
        pytest.param(7, {}, id="mid-second-epoch"),
        pytest.param(4, {"trainer.accumulate": 2, "trainer.checkpoint_every": 1}, id="accumulating"),
        pytest.param(6, {"trainer.validate_every": 2, "trainer.checkpoint_every": None}, id="unvalidated-epoch"),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_recipe, at, fields):
    fields = EVERYTHING_RANDOM | fields
    whole = train(tiny_recipe(fields, output="whole"))
    recipe = tiny_recipe(fields, output="parts")
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(at)])
    parts = train(recipe, resume=True)
    assert_same_checkpoint(whole.last, parts.last)
    assert_same_checkpoint(whole.best, parts.best)
    assert parts.metrics == whole.metrics
    assert parts.steps == whole.steps
    assert read_log(parts.folder / "metrics.csv") == read_log(whole.folder / "metrics.csv")


def test_a_run_repeats_itself_and_another_seed_does_not(tiny_recipe):
    fields = EVERYTHING_RANDOM | {"trainer.epochs": 1, "trainer.limit_train_batches": 2, "optim.warmup_epochs": 0}
    first = train(tiny_recipe(fields, output="first"))
    again = train(tiny_recipe(fields, output="again"))
    other = train(tiny_recipe({**fields, "seed": 1}, output="other"))
    assert_same_checkpoint(first.last, again.last)
    with pytest.raises(AssertionError):
        assert_same_checkpoint(first.last, other.last)


def test_a_finished_run_resumes_to_itself(tiny_recipe):
    recipe = tiny_recipe({"trainer.epochs": 1})
    first = train(recipe)
    before = first.last.read_bytes()
    again = train(recipe, resume=True)
    assert (again.metrics, again.steps) == (first.metrics, first.steps)
    assert first.last.read_bytes() == before


def test_resuming_needs_a_checkpoint(tiny_recipe):
    with pytest.raises(UserError, match="nothing to resume"):
        train(tiny_recipe(), resume=True)


def test_resuming_with_another_recipe_is_refused_and_what_changed_is_named(tiny_recipe):
    train(tiny_recipe({"trainer.epochs": 1}))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001 and is 0\.5; trainer\.epochs was 1 and is 2"):
        train(tiny_recipe({"optim.lr": 0.5}), resume=True)


def test_sharded_and_whole_optimizer_states_are_not_taken_for_each_other(tiny_recipe):
    train(tiny_recipe({"trainer.epochs": 1}))
    with pytest.raises(UserError, match=r"trainer\.strategy was 'auto' and is 'fsdp'"):
        train(tiny_recipe({"trainer.epochs": 1, "trainer.strategy": "fsdp"}), resume=True)


def test_what_only_says_where_and_how_fast_may_change_on_resuming(tiny_recipe):
    recipe = tiny_recipe({"trainer.checkpoint_every": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(3)])
    assert train(tiny_recipe({"trainer.checkpoint_every": 3, "trainer.log_every": 5}), resume=True).steps == 10
