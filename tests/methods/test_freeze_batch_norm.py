from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gatewise.methods import find_method, freeze_batch_norm


def _network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    network[1].running_mean.uniform_(-1, 1)
    network[1].running_var.uniform_(0.5, 2)
    return network


def test_statistics_stay_in_training_mode_and_scale_and_shift_learn():
    network = freeze_batch_norm(_network()).train()
    before = copy.deepcopy(network.state_dict())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(5, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    after = network.state_dict()
    assert all(torch.equal(after[f"1.{name}"], before[f"1.{name}"]) for name in ("running_mean", "running_var"))
    assert not torch.equal(after["1.weight"], before["1.weight"])
    assert network.training


def test_training_and_inference_compute_the_same():
    network = freeze_batch_norm(_network())
    images = torch.randn(5, 3, 4, 4)
    assert torch.equal(network.train()(images), network.eval()(images))


def test_affine_parameters_can_be_frozen_too():
    network = freeze_batch_norm(_network(), train_affine=False)
    assert not network[1].weight.requires_grad
    assert not network[1].bias.requires_grad
    assert network[0].weight.requires_grad


def test_keys_and_layer_type_are_kept():
    plain, frozen = _network(), freeze_batch_norm(_network())
    assert frozen.state_dict().keys() == plain.state_dict().keys()
    assert isinstance(frozen[1], nn.BatchNorm2d)


def test_copies_stay_frozen_and_freezing_twice_is_freezing_once():
    once = freeze_batch_norm(_network())
    twice = freeze_batch_norm(copy.deepcopy(once))
    assert type(twice[1]) is type(once[1])
    assert not twice.train()[1].training


def test_a_network_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="no batch-norm layer"):
        freeze_batch_norm(nn.Linear(2, 2))


def test_it_is_registered_as_a_transform():
    assert find_method("freeze_batch_norm").kind == "transform"
    assert find_method("freeze_batch_norm").build is freeze_batch_norm
