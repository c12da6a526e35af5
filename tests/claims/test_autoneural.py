"""The checks, layers and rounding of AutoNeural's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import autoneural
from gatewise.claims.lab.run import Run
from gatewise.networks.image.mobilenetv5 import MultiQueryAttention


def test_the_encoder_costs_what_is_stated():
    assert all(one.verdict == "shown" for one in autoneural.check_cost(Run(0, 100)).measured)


def test_many_equal_heads_are_one():
    many, one = autoneural.ManyHeads(16, 3, 4).eval(), MultiQueryAttention(16, 3, 4).eval()
    with torch.no_grad():
        for name in ("query", "output"):
            getattr(one, name).weight.copy_(getattr(many, name).weight)
        many.key_all.weight.copy_(one.key.proj.weight.repeat(3, 1, 1, 1))
        many.value_all.weight.copy_(one.value.proj.weight.repeat(3, 1, 1, 1))
        nn.init.ones_(many.gamma)
        nn.init.ones_(one.gamma)
    x = torch.randn(2, 16, 5, 6)
    torch.testing.assert_close(many(x), one(x))


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_rounding_is_symmetric(bits, levels):
    x = torch.linspace(-3, 3, 1001)
    rounded = autoneural.quantize(x, bits, torch.tensor(2.0))
    assert rounded.unique().numel() == 2 * levels + 1
    assert rounded.abs().max() == 2.0
    inside = x.abs() <= 2
    assert (rounded - x)[inside].abs().max() <= 1 / levels + 1e-6
    assert torch.equal(rounded, -autoneural.quantize(-x, bits, torch.tensor(2.0)))


@pytest.mark.parametrize("name", autoneural.MAKES)
def test_more_bits_are_less_noise_and_weights_come_back(name):
    network = autoneural.MAKES[name]().eval()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    x = torch.randn(8, 1, 32, 32)
    coarse = autoneural.signal_to_noise(network, x, x, 4, 4)
    fine = autoneural.signal_to_noise(network, x, x, 8, 8)
    finest = autoneural.signal_to_noise(network, x, x, 8, 16)
    assert coarse + 10 < fine <= finest + 1
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
