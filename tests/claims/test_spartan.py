"""The checks and networks of SpaRTAN's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import spartan
from gatewise.claims.lab.run import Run
from gatewise.networks.image.spartan import ChannelMixer, strongest_channel


@pytest.mark.parametrize("check", [spartan.check_size, spartan.check_mixers])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict == "shown" for one in check(Run(0, 100)).measured)


@pytest.mark.parametrize("name", spartan.VARIANTS)
def test_every_variant_classifies(name):
    network = spartan.make_network(spartan.VARIANTS[name])
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_variants_differ():
    x = torch.randn(2, 1, 28, 28)
    outputs = []
    for change in spartan.VARIANTS.values():
        torch.manual_seed(0)
        outputs.append(spartan.make_network(change).eval()(x))
    for i, one in enumerate(outputs):
        assert not any(torch.allclose(one, other) for other in outputs[:i])


def test_without_the_strongest_channel_the_product_stands_alone():
    mixer = ChannelMixer(8, 2, depthwise=True)
    x = torch.randn(1, 8, 3, 3)
    alone = mixer.key(x) * torch.nn.functional.gelu(mixer.theta(x))
    mixer.__class__ = spartan.NoStrongest
    torch.testing.assert_close(mixer.reinforced(x, strongest_channel(x)), alone)
