"""The checks and networks of ConViT's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import convit
from gatewise.claims.lab.run import Run
from gatewise.layers.self_attention import SelfAttention


@pytest.mark.parametrize("check", [convit.check_convolution, convit.check_locality, convit.check_factors])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict == "shown" for one in check(Run(0, 100)).measured)


@pytest.mark.parametrize(("local", "attention_layers"), [(True, 1), (False, 4)])
def test_networks_differ_in_their_first_layers(local, attention_layers):
    network = convit.make_network(local)
    assert sum(isinstance(module, SelfAttention) for module in network.modules()) == attention_layers
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_few_images_are_a_part_of_all():
    few, many = convit.SomeClothes(50), convit.SomeClothes(200)
    assert len(few.train[1]) == 50
    assert torch.equal(few.train[0], many.train[0][::4])
    assert torch.equal(few.test[1], many.test[1])
    # Every kind is among them.
    assert len(few.train[1].unique()) == 10
