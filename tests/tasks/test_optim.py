from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gatewise.errors import UserError
from gatewise.tasks.optim import build_optimizer, build_scheduler, learning_rate_scale, parameter_groups
from gatewise.tasks.recipe import OptimRecipe


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _optimizer(recipe: OptimRecipe, network: nn.Module | None = None) -> torch.optim.Optimizer:
    network = network or _network()
    return build_optimizer(recipe, parameter_groups(network.named_parameters(), recipe))


def _rates(recipe: OptimRecipe, epochs: int, updates_per_epoch: int, scale: float = 1.0) -> list[float]:
    """The learning rate of each update of a run."""
    optimizer = build_optimizer(recipe, parameter_groups(_network().named_parameters(), recipe), scale)
    scheduler = build_scheduler(recipe, optimizer, epochs * updates_per_epoch, updates_per_epoch, scale)
    rates = []
    for update in range(epochs * updates_per_epoch):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(update + 1)
    return rates


def test_biases_and_one_dimensional_parameters_do_not_decay():
    network = _network()
    decayed, plain = parameter_groups(network.named_parameters(), OptimRecipe(weight_decay=0.05))
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[3].weight)}
    assert len(plain["params"]) == 4


def test_what_the_network_excludes_does_not_decay():
    decayed, _ = parameter_groups(_network().named_parameters(), OptimRecipe(), excluded={"0.weight"})
    assert len(decayed["params"]) == 1


def test_all_parameters_decay_when_asked():
    [group] = parameter_groups(_network().named_parameters(), OptimRecipe(weight_decay=0.05, decay_all=True))
    assert group["weight_decay"] == 0.05
    assert len(group["params"]) == 6


def test_frozen_parameters_are_in_no_group():
    network = _network()
    network[0].requires_grad_(False)
    groups = parameter_groups(network.named_parameters(), OptimRecipe(weight_decay=0.05))
    assert sum(len(group["params"]) for group in groups) == 4


def test_nothing_to_train_is_an_error():
    with pytest.raises(UserError, match="every parameter is frozen"):
        _optimizer(OptimRecipe(), _network().requires_grad_(False))


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "rmsproptf"])
def test_optimizers_come_from_timm_by_name(name):
    optimizer = _optimizer(OptimRecipe(name=name, lr=0.5))
    assert name.startswith(type(optimizer).__name__.lower())
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_options_reach_the_optimizer():
    assert _optimizer(OptimRecipe(options={"betas": [0.5, 0.6]})).param_groups[0]["betas"] == (0.5, 0.6)


def test_an_option_that_the_optimizer_refuses_is_a_users_mistake():
    with pytest.raises(UserError, match="betas"):
        _optimizer(OptimRecipe(options={"betas": [2.0, 0.6]}))


def test_cosine_falls_from_the_peak_to_the_minimum_after_linear_warm_up():
    recipe = OptimRecipe(lr=1.0, warmup_epochs=1, warmup_lr=0.2, min_lr=0.1)
    rates = _rates(recipe, epochs=4, updates_per_epoch=4)
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    expected = [0.1 + 0.45 * (1 + math.cos(math.pi * update / 16)) for update in range(4, 16)]
    assert rates[4:] == pytest.approx(expected)


def test_step_multiplies_after_each_interval_even_of_a_part_of_an_epoch():
    recipe = OptimRecipe(lr=1.0, schedule="step", decay_epochs=1.5, decay_rate=0.5)
    assert _rates(recipe, epochs=3, updates_per_epoch=2) == pytest.approx([1, 1, 1, 0.5, 0.5, 0.5])


def test_constant_stays():
    assert set(_rates(OptimRecipe(lr=0.3, schedule="constant"), 2, 3)) == {0.3}


def test_rates_scale_with_the_batch_that_they_are_stated_for():
    assert learning_rate_scale(OptimRecipe(reference_batch=512), 1024) == 2.0
    assert learning_rate_scale(OptimRecipe(), 1024) == 1.0
    recipe = OptimRecipe(lr=1.0, warmup_epochs=1, warmup_lr=0.5, min_lr=0.25)
    assert _rates(recipe, 3, 2, scale=2.0) == pytest.approx([2 * rate for rate in _rates(recipe, 3, 2)])


def test_a_warm_up_can_be_counted_in_updates():
    in_epochs = _rates(OptimRecipe(lr=1.0, warmup_epochs=0.5), 4, 10)
    assert _rates(OptimRecipe(lr=1.0, warmup_steps=5), 4, 10) == in_epochs
    assert in_epochs[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, in_epochs[5]])
