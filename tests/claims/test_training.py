"""The small training loop: fair, seeded, stoppable."""

from __future__ import annotations

import math
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn

from gatewise.claims.lab.run import OutOfTime, Run
from gatewise.claims.lab.training import Schedule, build, init_by_fan_in, one_thread_each, train_side_by_side


class Regression:
    """Learn a fixed linear map from 4 numbers to 2."""

    def __init__(self) -> None:
        self.seen: dict[str, list[torch.Tensor]] = {}

    def batch(self, size, generator):
        inputs = torch.randn(size, 4, generator=generator)
        return inputs, inputs[:, :2] - inputs[:, 2:]

    def loss(self, model, batch):
        self.seen.setdefault(model.name, []).append(batch[0])
        return (model(batch[0]) - batch[1]).square().mean()


def network(name):
    model = nn.Linear(4, 2)
    model.name = name
    return model


SCHEDULE = Schedule(steps=60, batch_size=16, lr=0.1)


def train(names=("a", "b"), seed=0, run=None):
    task = Regression()
    models = {name: build(seed, lambda name=name: network(name)) for name in names}
    losses = train_side_by_side(models, task, SCHEDULE, seed=seed, run=run or Run(0, 1e9))
    return models, losses, task


def test_it_learns_and_leaves_eval_mode():
    models, losses, _ = train()
    assert losses["a"] < 0.05
    assert not models["a"].training


def test_the_same_seed_gives_the_same_weights_alone_or_side_by_side():
    together, _, _ = train(("a", "b", "c"))
    alone, _, _ = train(("c",))
    assert torch.equal(together["c"].weight, alone["c"].weight)
    other, _, _ = train(("c",), seed=1)
    assert not torch.equal(other["c"].weight, alone["c"].weight)


def test_all_variants_see_the_same_batches():
    _, _, task = train()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(task.seen["a"], task.seen["b"], strict=True))


def test_no_time_stops_every_model():
    run = Run(0, 1e9)
    run.stop()
    with pytest.raises(OutOfTime):
        train(run=run)


def test_an_error_in_one_model_ends_the_others():
    class Broken(Regression):
        def loss(self, model, batch):
            if model.name == "b":
                raise ZeroDivisionError
            return super().loss(model, batch)

    models = {name: network(name) for name in ("a", "b")}
    endless = Schedule(steps=10**9, batch_size=1, lr=0.1)
    with pytest.raises(ZeroDivisionError):
        train_side_by_side({"b": models["b"], "a": models["a"]}, Broken(), endless, seed=0, run=Run(0, 1e9))
    assert threading.active_count() == 1 or all(not t.name.startswith("ThreadPool") for t in threading.enumerate())


def test_the_rate_rises_and_falls_to_zero():
    schedule = Schedule(steps=100, batch_size=1, lr=1.0)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[-1] < 1e-3


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = (build(5, lambda: nn.Linear(3, 3)) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.weight, second.weight)


def test_weights_have_the_variance_of_their_fan_in():
    model = init_by_fan_in(nn.Sequential(nn.Conv2d(8, 512, 5), nn.Linear(400, 300)))
    assert model[0].weight.std().item() == pytest.approx(1 / math.sqrt(200), rel=0.03)
    assert model[1].weight.std().item() == pytest.approx(1 / 20, rel=0.03)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with one_thread_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
