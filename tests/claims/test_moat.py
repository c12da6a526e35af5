"""The identities, the accounting and the variants of MOAT's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import moat
from gatewise.claims.lab import comparison as _comparison
from gatewise.claims.lab.run import Run
from gatewise.layers.squeeze_excite import SqueezeExcite
from gatewise.networks.image.moat import MoatBlock


def verdicts(finding):
    return [one.verdict for one in finding.measured if one.verdict is not None]


def test_parameters_are_those_published(monkeypatch):
    assert moat.count_parameters("tiny_moat_0") == 3_355_348
    monkeypatch.setattr(moat, "PUBLISHED_PARAMETERS", dict.fromkeys(moat.PUBLISHED_PARAMETERS, (1, 2)))
    wrong = moat.check_sizes(Run(0, 100)).measured[0]
    assert wrong.interval.value == 18
    assert wrong.verdict == "contrary"


def test_windows_and_positions_are_shown():
    for check in (moat.check_windows, moat.check_positions):
        found = verdicts(check(Run(0, 100)))
        assert found
        assert set(found) == {"shown"}


def test_attention_that_leaves_its_window_would_be_noticed():
    reach = moat.influence(lambda x: x + x.mean(dim=(2, 3), keepdim=True), seed=0)
    assert (reach[7:, 7:] > 0).all()
    assert (moat.influence(nn.Identity(), seed=0) > 0).sum() == 49


def test_a_table_resized_otherwise_would_be_off_the_line(monkeypatch):
    def nearest(table, window):
        return nn.functional.interpolate(table[None], [2 * side - 1 for side in window])[0]

    assert moat.resize_error((16, 16)) < 1e-6
    monkeypatch.setattr(moat, "resize_table", nearest)
    assert moat.resize_error((16, 16)) > 0.1


def test_costs_are_counted_exactly(monkeypatch):
    monkeypatch.setattr(
        moat, "time_by_turns", lambda calls, run, seconds: {name: (float(name[-2:]),) * 3 for name in calls}
    )
    windows, overall, *times = moat.measure_cost(Run(0, 100)).measured
    assert windows.interval.value == 1
    # 4 C^2 for the linear maps and 2 N C for the products, with C = 128.
    assert overall.interval.value == pytest.approx((4 * 128**2 + 2 * 48**2 * 128) / (4 * 128**2 + 2 * 16**2 * 128))
    assert [one.interval.value for one in times] == [3, 3]


@pytest.mark.parametrize("name", moat.VARIANTS)
def test_every_variant_classifies_clothes(name):
    network = moat.make_network(moat.VARIANTS[name]).train()
    network(torch.randn(4, 1, 28, 28)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def blocks(name):
    return [block for stage in moat.make_network(moat.VARIANTS[name]).stages for block in stage]


def test_variants_differ_in_the_blocks_with_attention_alone():
    assert [type(block) for block in blocks("MOAT")[2:]] == [MoatBlock] * 3
    assert [type(block) for block in blocks("attention first")[2:]] == [moat.AttentionFirst] * 3
    assert [type(block.mbconv) for block in blocks("MLP")[2:]] == [moat.MBConv, moat.MlpBranch, moat.MBConv]
    assert [isinstance(block.mbconv.se, SqueezeExcite) for block in blocks("MOAT with SE")[2:]] == [True] * 3
    kept = {name: [type(block) for block in blocks(name)[:2]] for name in moat.VARIANTS}
    assert set(map(tuple, kept.values())) == {(moat.MBConv, moat.MBConv)}


def test_variants_are_of_about_the_same_size():
    sizes = [sum(p.numel() for p in moat.make_network(change).parameters()) for change in moat.VARIANTS.values()]
    assert max(sizes) < 1.25 * min(sizes)


def test_averages_of_norms_follow_so_short_a_training():
    norms = [module for module in moat.make_network(moat.keep).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert {norm.momentum for norm in norms} == {0.1}


def test_comparison_takes_differences_within_a_seed(monkeypatch):
    accuracy = {"MOAT": 80.0, "attention first": 78.0, "MLP": 79.0, "MOAT with SE": 80.25}
    drawn: dict[str, nn.Module] = {}

    def keep(networks, task, schedule, seed, run):
        drawn.update(networks)

    monkeypatch.setattr(_comparison, "train_side_by_side", keep)
    seeds: list[float] = []

    def percent(task, network):
        name = next(name for name, one in drawn.items() if one is network)
        seeds.append(name == "MOAT")
        # Seeds shift all variants alike.
        return accuracy[name] + sum(seeds)

    monkeypatch.setattr(moat.Clothes, "percent_right", percent)
    _, order, mlp, squeeze, *_ = moat.compare_blocks(Run(0, 100)).measured
    assert [round(one.interval.value, 6) for one in (order, mlp, squeeze)] == [2.0, 1.0, 0.25]
    assert order.interval.low == order.interval.high == 2.0
    assert {one.verdict for one in (order, mlp, squeeze)} == {"shown"}
