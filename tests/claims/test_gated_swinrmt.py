"""The identities, the measures and the networks of Gated-SwinRMT's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import gated_swinrmt
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.networks.image.gated_swinrmt import Mixer
from gatewise.ops.decayed_window_attention import decayed_window_attention


def verdicts(finding):
    return {one.verdict for one in finding.measured if one.verdict is not None}


@pytest.mark.parametrize("check", ["check_decay", "check_windows", "check_rank"])
def test_identities_are_shown(check):
    assert verdicts(getattr(gated_swinrmt, check)(Run(0, 100))) == {"shown"}


def test_another_decay_would_be_noticed(monkeypatch):
    def blunt(q, k, v, log_decay, **options):
        return decayed_window_attention(q, k, v, 1.001 * log_decay, **options)

    monkeypatch.setattr(gated_swinrmt, "decayed_window_attention", blunt)
    finding = gated_swinrmt.check_decay(Run(0, 100))
    assert [one.verdict for one in finding.measured[:2]] == ["contrary"] * 2


def test_a_gate_that_is_not_open_is_not_rmt():
    assert gated_swinrmt.difference_from_rmt(0) == 0
    assert gated_swinrmt.difference_from_rmt(0, gate_bias=0.0) > 0.1
    assert gated_swinrmt.difference_from_rmt(0, window=4) > 0.1
    # Nine positions are fewer than two windows of seven.
    assert gated_swinrmt.difference_from_rmt(0, window=7) == 0


def test_attention_that_leaves_its_window_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Mixer, "place", lambda mixer, height, width: ((8, 8), (0, 0)))
    outside, unseen = gated_swinrmt.check_windows(Run(0, 100)).measured
    assert outside.verdict == "contrary"
    assert unseen.verdict == "contrary"


def test_small_images_are_global_and_large_ones_are_not(monkeypatch):
    macs = {"rmt": [1.0, 1.0, 1.0, 1.0, 1.2, 1.5], "retention": [1.0] * 6}
    monkeypatch.setattr(gated_swinrmt, "macs_per_pixel", macs.__getitem__)
    finding = gated_swinrmt.check_collapse(Run(0, 100))
    assert verdicts(finding) == {"shown"}
    assert [one.interval.value for one in finding.measured[2:]] == [1.0, 1.5]


def test_rmts_cost_grows_with_the_map(monkeypatch):
    monkeypatch.setattr(gated_swinrmt, "PIXELS", (224, 448))
    growth = {name: values[1] / values[0] for name in ("rmt", "retention") for values in [macs(name)]}
    assert growth["retention"] == pytest.approx(1, abs=0.01)
    assert growth["rmt"] > 1.05


def macs(name):
    return gated_swinrmt.macs_per_pixel(name)


def test_a_linear_head_has_as_many_directions_as_channels():
    assert gated_swinrmt.directions("rmt", seed=3) == 8
    assert gated_swinrmt.directions("retention", seed=3) == 16


def test_pictures_come_in_both_sizes():
    large, small = (gated_swinrmt.ClothesAt(pixels) for pixels in (28, 14))
    assert torch.equal(large.train[0], gated_swinrmt.Clothes().train[0])
    images, labels = small.batch(4, generator(0))
    assert images.shape == (4, 1, 14, 14)
    assert torch.equal(labels, large.batch(4, generator(0))[1])
    assert torch.allclose(small.test[0][5, 0, 3, 4], large.test[0][5, 0, 6:8, 8:10].mean())


@pytest.mark.parametrize("form", gated_swinrmt.TITLES)
def test_every_form_learns_in_both_sizes(form):
    network = gated_swinrmt.make_learner(form).train()
    for pixels in (28, 14):
        network(torch.randn(4, 1, pixels, pixels)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_large_maps_are_cut_into_windows_and_small_ones_are_not():
    network = gated_swinrmt.make_learner("retention")
    mixers = [stage.blocks[0].mixer for stage in network.stages]
    shifted = network.stages[0].blocks[1].mixer
    assert shifted.place(14, 14) == ((7, 7), (3, 3))
    assert [mixers[0].place(7, 7), mixers[1].place(7, 7), mixers[1].place(4, 4)] == [
        ((7, 7), (0, 0)),
        ((7, 7), (0, 0)),
        ((4, 4), (0, 0)),
    ]


def test_gaps_are_taken_within_a_seed(monkeypatch):
    accuracy = {(28, "rmt"): 70, (28, "retention"): 74, (28, "swat"): 76}
    accuracy |= {(14, "rmt"): 60, (14, "retention"): 61, (14, "swat"): 60.5}
    drawn: dict[str, nn.Module] = {}
    seeds: list[int] = []

    def train(networks, task, schedule, seed, run):
        drawn.update(networks)
        seeds.append(seed)

    def percent(task, network):
        form = next(form for form, one in drawn.items() if one is network)
        # Seeds shift all alike.
        return accuracy[task.test[0].shape[-1], form] + seeds[-1]

    monkeypatch.setattr(gated_swinrmt, "train_side_by_side", train)
    monkeypatch.setattr(gated_swinrmt.ClothesAt, "percent_right", percent)
    finding = gated_swinrmt.compare_forms(Run(0, 100))
    found = {one.what: one.interval for one in finding.measured}
    assert found["Retention minus RMT, 28 pixels"].value == pytest.approx(4)
    assert found["SWAT minus RMT, 14 pixels"].value == pytest.approx(0.5)
    assert found["SWAT: how much less at 14 pixels"].value == pytest.approx(5.5)
    assert found["SWAT: how much less at 14 pixels"].low == pytest.approx(5.5)
    assert verdicts(finding) == {"shown"}
    assert len(seeds) == 10
