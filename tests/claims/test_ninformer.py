"""The checks of NiNformer's claim, and the networks it compares; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import ninformer
from gatewise.claims.lab import comparison as _comparison
from gatewise.claims.lab import patch_networks as _patch_networks
from gatewise.claims.lab.kept_bytes import kept_bytes
from gatewise.claims.lab.run import Run


@pytest.mark.parametrize("check", [ninformer.check_identities, ninformer.measure_memory])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict == "shown" for one in check(Run(0, 100)).measured)


def test_bytes_kept_are_counted_once_and_without_parameters():
    x = torch.randn(4, 8, requires_grad=True)
    # The input of the first layer, its output (kept by the activation), and the input of the last.
    layers = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    assert kept_bytes(layers, x) == 3 * 4 * 8 * 4


@pytest.mark.parametrize("name", _patch_networks.NETWORKS)
def test_every_network_reads_digits(name):
    network = _patch_networks.NETWORKS[name]()
    network(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_gaps_are_taken_within_a_seed():
    found = _comparison.Comparison({"a": [50.0, 60.0, 70.0], "b": [49.0, 59.0, 69.0]})
    assert found.gap("a", "b").value == 1.0
    assert found.gap("a", "b").low == found.gap("a", "b").high == 1.0
