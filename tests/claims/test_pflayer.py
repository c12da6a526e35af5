"""The identities, the accounting and the variants of PfLayer's claim; no training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatewise.claims import pflayer
from gatewise.claims.lab import comparison as _comparison
from gatewise.claims.lab.run import Run
from gatewise.networks.image.pflayer import Bottleneck, SpatialMaxPool
from tests.networks.image.test_pflayer import CARDS
from tests.networks.image.test_pflayer_transformers import CARDS as TRANSFORMER_CARDS


def verdicts(finding):
    return [one.verdict for one in finding.measured if one.verdict is not None]


def test_sizes_are_those_published_and_others_would_be_noticed(monkeypatch):
    assert pflayer.PUBLISHED == CARDS | TRANSFORMER_CARDS
    cost = pflayer.cost_of("resnet50_max")
    assert (cost.parameters, cost.macs) == CARDS["resnet50_max"]
    monkeypatch.setattr(pflayer, "cost_of", lambda name: cost)
    wrong, *ratios = pflayer.check_sizes(Run(0, 100)).measured
    assert wrong.interval.value == 10
    assert wrong.verdict == "contrary"
    assert all(one.interval.value == 1 for one in ratios)


def test_the_identities_are_shown():
    found = verdicts(pflayer.check_identities(Run(0, 100)))
    assert len(found) == 6
    assert set(found) == {"shown"}


def test_zeros_around_the_map_would_be_noticed(monkeypatch):
    assert pflayer.definition_error(0) == 0

    def padded_by_zeros(self, x):
        return F.max_pool2d(F.pad(x - 1, (1, 1, 1, 1)), 3, 1) + 1

    monkeypatch.setattr(pflayer.LargestOfWindows, "forward", padded_by_zeros)
    assert pflayer.definition_error(0) > 1e-3


def test_indices_of_the_library_are_counted_and_the_input_is_not():
    assert pflayer.kept_bytes(lambda x: F.max_pool2d(x, 3, 2, 1)) == 8
    assert pflayer.kept_bytes(lambda x: x * x) == 0


@pytest.mark.parametrize("name", pflayer.VARIANTS)
def test_every_variant_classifies_clothes(name):
    network = pflayer.make_network(name).train()
    network(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_variants_differ_in_what_mixes_positions_alone():
    def rest(name):
        return {
            key: value.shape for key, value in pflayer.make_network(name).state_dict().items() if ".spatial." not in key
        }

    assert all(rest(name) == rest("conv") for name in pflayer.VARIANTS)
    pools = {
        name: sum(isinstance(module, SpatialMaxPool) for module in pflayer.make_network(name).modules())
        for name in pflayer.VARIANTS
    }
    assert pools == {"conv": 0, "hybrid": 3, "depthwise": 0, "max": 4, "average": 0, "none": 0}


@pytest.mark.parametrize(("name", "reach"), [("none", 0), ("max", 4), ("depthwise", 4)])
def test_blocks_without_mixing_see_nothing_around(name, reach):
    network = pflayer.make_network(name).eval()
    blocks = nn.Sequential(*(module for module in network if isinstance(module, Bottleneck))).double()
    x = torch.randn(4, 32, 25, 25, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(blocks(x)[:, :, 6, 6].sum(), x)
    rows, columns = torch.nonzero(gradient.abs().sum((0, 1)), as_tuple=True)
    # Two at full resolution, one on the way to the half, and one step of two pixels there.
    seen = (rows - 12).abs().max().item(), (columns - 12).abs().max().item()
    assert seen == (0, 0) if reach == 0 else min(seen) >= reach


def test_networks_are_timed_against_the_regular_one(monkeypatch):
    times = {"resnet50": (3.0,) * 3, "resnet50_max": (2.0,) * 3, "resnet50_hybrid": (6.0,) * 3}

    def by_turns(calls, run, seconds):
        # Folded networks can be run.
        assert calls["resnet50_hybrid"]().shape[1] == 1000
        return {name: times[name] for name in calls}

    monkeypatch.setattr(pflayer, "time_by_turns", by_turns)
    monkeypatch.setattr(pflayer, "PIXELS", 32)
    found = pflayer.time_networks(Run(0, 100)).measured
    assert [one.interval.value for one in found] == [1.5, 0.5, 1.5, 0.5]
    assert [one.verdict for one in found] == ["shown", "contrary"] * 2


def test_comparison_takes_differences_within_a_seed(monkeypatch):
    accuracy = {"conv": 80.0, "hybrid": 80.5, "depthwise": 79.0, "max": 78.0, "average": 76.0, "none": 67.0}
    drawn: dict[str, nn.Module] = {}
    seeds: list[int] = []

    def keep(networks, task, schedule, seed, run):
        drawn.update(networks)
        seeds.append(seed)

    def percent(task, network):
        name = next(name for name, one in drawn.items() if one is network)
        # Seeds shift all variants alike.
        return accuracy[name] + len(seeds)

    monkeypatch.setattr(_comparison, "train_side_by_side", keep)
    monkeypatch.setattr(pflayer.Clothes, "percent_right", percent)
    _, depthwise, none, average, hybrid, conv, *_ = pflayer.compare_operators(Run(0, 100)).measured
    figures = [one.interval.value for one in (depthwise, none, average, hybrid, conv)]
    assert figures == [-1.0, 11.0, 2.0, 0.5, -2.0]
    assert depthwise.interval.low == depthwise.interval.high == -1.0
    assert {one.verdict for one in (depthwise, none, hybrid)} == {"shown"}
    assert len(set(seeds)) == 4
