"""Methods of the three kinds in a training run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.errors import UserError
from gatewise.methods import (
    LossTerm,
    StepProcedure,
    _base,
    register_loss_term,
    register_step_procedure,
    register_transform,
)
from gatewise.tasks import load_trained, train
from gatewise.tasks.logs import read_log
from tests.tasks.conftest import assert_same_checkpoint
from tests.tasks.test_resume import Crash

ONE_EPOCH = {"trainer.epochs": 1, "trainer.limit_train_batches": 4}


@pytest.fixture(autouse=True)
def _own_methods(monkeypatch):
    """Methods registered by a test are gone after it."""
    monkeypatch.setattr(_base, "_methods", dict(_base._methods))


def test_a_transform_changes_the_network_before_training_and_when_it_is_loaded_again(tiny_recipe):
    @register_transform
    def add_dropout(model: nn.Module, *, rate: float = 0.5) -> nn.Module:
        model.extra = nn.Linear(3, 3)
        model.drop = nn.Dropout(rate)
        return model

    result = train(tiny_recipe({**ONE_EPOCH, "methods": [{"name": "add_dropout", "rate": 0.25}]}))
    trained = load_trained(result.best)
    assert trained.model.drop.p == 0.25
    assert "model.extra.weight" in torch.load(result.best, weights_only=True)["state_dict"]


def test_a_loss_term_is_added_learns_and_weighs_the_tasks_loss(tiny_recipe):
    seen = []

    @register_loss_term("pull")
    class Pull(LossTerm):
        task_weight = 0.0

        def __init__(self, model: nn.Module, *, target: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.zeros(()))
            self.target = target

        def forward(self, step):
            seen.append((step.inputs.shape, step.targets.shape, step.outputs.shape, step.progress))
            return (self.value - self.target).square()

    fields = {**ONE_EPOCH, "methods": [{"name": "pull", "target": 3.0}], "optim.schedule": "constant"}
    result = train(tiny_recipe({**fields, "optim.lr": 0.1}))
    assert seen[0] == ((16, 3, 32, 32), (16,), (16, 10), 0.0)
    assert [step[3] for step in seen] == [0.0, 0.25, 0.5, 0.75]
    losses = [row["train/loss"] for row in read_log(result.folder / "metrics.csv") if "train/loss" in row]
    assert losses[0] == pytest.approx(9.0)
    assert losses == sorted(losses, reverse=True)
    content = torch.load(result.best, weights_only=True)
    assert content["state_dict_terms"]["loss_terms.0.value"] == pytest.approx(0.4, abs=0.05)
    assert all(name.startswith("model.") for name in content["state_dict"])


def test_a_step_procedure_updates_its_parameter_sets_in_its_own_order(tiny_recipe):
    @register_step_procedure("alternate")
    class Alternate(StepProcedure):
        def __init__(self, model: nn.Module, *, head_first: bool = False) -> None:
            self.order = (1, 0) if head_first else (0, 1)

        def parameter_sets(self, model):
            named = list(model.named_parameters())
            head = [pair for pair in named if pair[0].startswith("head")]
            return [[pair for pair in named if pair not in head], head]

        def step(self, engine, inputs, targets):
            for index in self.order:
                before = {name: value.clone() for name, value in engine.model.state_dict().items()}
                loss, outputs = engine.loss(inputs, targets)
                engine.update(index, loss)
                after = engine.model.state_dict()
                changed = {name for name in after if not torch.equal(before[name], after[name])}
                assert all(name.startswith("head") == (index == 1) for name in changed)
                assert changed or engine.progress == 0
            return loss.detach(), outputs

    fields = {"methods": [{"name": "alternate", "head_first": True}], "trainer.ema": 0.5, "trainer.clip_grad": 1.0}
    result = train(tiny_recipe({**ONE_EPOCH, **fields, "optim.schedule": "cosine"}))
    assert result.steps == 4
    rates = [row["train/lr"] for row in read_log(result.folder / "metrics.csv") if "train/lr" in row]
    assert len(rates) == 4
    assert rates == sorted(rates, reverse=True)
    assert len(torch.load(result.last, weights_only=True)["optimizer_states"]) == 2


def test_a_run_with_methods_that_have_state_resumes_exactly(tiny_recipe):
    @register_loss_term("drift")
    class Drift(LossTerm):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(2))

        def forward(self, step):
            return (self.value.sum() * step.progress - 1).square()

    @register_step_procedure("plain")
    class Plain(StepProcedure):
        def __init__(self, model: nn.Module) -> None:
            pass

        def step(self, engine, inputs, targets):
            loss, outputs = engine.loss(inputs, targets)
            engine.update(0, loss)
            return loss.detach(), outputs

    fields = {
        "methods": [{"name": "plain"}, {"name": "drift"}],
        "model.drop_path_rate": 0.3,
        "trainer.checkpoint_every": 2,
    }
    whole = train(tiny_recipe(fields, output="whole"))
    recipe = tiny_recipe(fields, output="parts")
    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, callbacks=[Crash(3)])
    assert_same_checkpoint(whole.last, train(recipe, resume=True).last)


def test_a_step_procedure_that_does_the_usual_is_the_usual(tiny_recipe):
    @register_step_procedure("usual")
    class Usual(StepProcedure):
        def __init__(self, model: nn.Module) -> None:
            pass

        def step(self, engine, inputs, targets):
            loss, outputs = engine.loss(inputs, targets)
            engine.update(0, loss)
            return loss.detach(), outputs

    fields = {**ONE_EPOCH, "trainer.clip_grad": 0.1, "optim.warmup_epochs": 0.5}
    left = train(tiny_recipe(fields, output="a"))
    right = train(tiny_recipe({**fields, "methods": [{"name": "usual"}]}, output="b"))
    states = [torch.load(run.last, weights_only=True)["state_dict"] for run in (left, right)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_two_step_procedures_or_one_with_accumulation_are_refused(tiny_recipe):
    @register_step_procedure("one")
    class One(StepProcedure):
        def __init__(self, model: nn.Module) -> None:
            pass

        def step(self, engine, inputs, targets):
            raise NotImplementedError

    with pytest.raises(UserError, match="more than one step procedure"):
        tiny_recipe({"methods": [{"name": "one"}, {"name": "one"}]})
    with pytest.raises(UserError, match=r"trainer\.accumulate must be 1"):
        tiny_recipe({"methods": [{"name": "one"}], "trainer.accumulate": 2})
