"""The identities, the measures and the tasks of UniRepLKNet's claim; no training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from gatewise.claims import unireplknet
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.run import Run
from gatewise.claims.lab.training import build
from gatewise.layers.dilated_reparam import DilatedReparam
from gatewise.networks.image.unireplknet import BRANCHES, UniRepLKNet


@pytest.mark.parametrize("kernel", BRANCHES)
def test_merges_are_exact_at_every_kernel_size(kernel):
    assert unireplknet.merge_error(kernel, torch.float64, seed=1) < 1e-14
    assert 0 < unireplknet.merge_error(kernel, torch.float32, seed=1) < 1e-5


def test_a_wrong_merge_would_be_noticed(monkeypatch):
    def forgetful(block):
        return unireplknet.drop_branches(nn.Sequential(block))[0]

    monkeypatch.setattr(DilatedReparam, "merged", forgetful)
    assert unireplknet.merge_error(13, torch.float32, seed=1) > 0.1


def test_dropping_branches_leaves_all_other_weights():
    network = build(0, lambda: UniRepLKNet(unireplknet.SMALL))
    plain = unireplknet.drop_branches(network)
    kept, state = plain.state_dict(), network.state_dict()
    assert {key for key in state if key not in kept} == {key for key in state if ".branches." in key} != set()
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert any(".branches." in key for key in network.state_dict())


def test_merging_leaves_nothing_of_the_branches():
    finding = unireplknet.check_merging(Run(0, 100))
    assert all(one.verdict == "shown" for one in finding.measured)
    assert [one.interval.value for one in finding.measured[-2:]] == [0, 0]


def test_half_of_the_energy_is_counted_from_the_strongest_pixel():
    energy = torch.tensor([[0.3, 0.1], [0.25, 0.35]])
    assert unireplknet.half_energy_area(energy) == 2
    assert unireplknet.half_energy_area(torch.tensor([[0.6, 0.4]])) == 1
    assert unireplknet.half_energy_area(torch.full((10, 10), 0.01)) in (50, 51)


def test_larger_kernels_see_a_larger_area(monkeypatch):
    monkeypatch.setattr(unireplknet, "SIDE", 256)
    finding = unireplknet.compare_fields(Run(0, 100))
    assert [one.interval.method for one in finding.measured][-1].endswith("6 networks")
    assert finding.measured[-1].interval.low > 2
    energy = unireplknet.energy_by_pixel(
        randomise(build(0, lambda: UniRepLKNet(unireplknet.with_kernels(3))), 0), torch.randn(1, 3, 64, 64)
    )
    assert energy.shape == (64, 64)
    assert energy.sum().item() == pytest.approx(1)


def test_networks_differ_in_the_kernels_that_are_large_alone():
    assert unireplknet.with_kernels(13) == unireplknet.SMALL
    assert unireplknet.with_kernels(3).kernels == ((3,), (3,), (3, 3, 3), (3,))


@pytest.fixture(scope="module")
def batch():
    return unireplknet.SymbolFurther().batch(100, generator(0))


def test_one_symbol_is_within_reach_of_a_dot_and_is_the_answer(batch):
    pictures, cells, answers, distance = batch
    assert pictures.shape == (100, 11, 28, 28)
    assert set(distance.unique().tolist()) == {1, 2, 3, 4, 5, 6}
    for reach in range(1, 7):
        window = 2 * reach + 1
        near = nn.functional.avg_pool2d(pictures[:, :10], window, 1, reach, divisor_override=1).flatten(2)
        seen = near.gather(2, cells[:, None].expand(-1, 10, -1))
        assert torch.equal(seen.sum(1) == 1, distance <= reach)
        assert (seen.argmax(1) == answers)[distance <= reach].all()


@pytest.mark.parametrize(("name", "reach"), [(unireplknet.BRANCHED, 6), (unireplknet.ALONE, 6), (unireplknet.THREE, 1)])
def test_one_block_reaches_as_far_as_its_kernel(name, reach):
    network = randomise(unireplknet.make_networks(0)[name], 0)
    (block,) = network.stages[0].blocks
    x = torch.rand(1, 32, 21, 21, requires_grad=True)
    block.depthwise(x)[0, :, 10, 10].sum().backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(0), as_tuple=True)
    assert rows.max() - rows.min() == columns.max() - columns.min() == 2 * reach


def test_large_kernels_start_from_the_same_weights():
    networks = unireplknet.make_networks(3)
    branched, alone = (networks[name].stages[0].blocks[0] for name in (unireplknet.BRANCHED, unireplknet.ALONE))
    assert torch.equal(branched.depthwise.large.weight, alone.depthwise.large.weight)
    assert torch.equal(branched.expand.weight, alone.expand.weight)
    assert len(branched.depthwise.branches) == 5
    assert len(alone.depthwise.branches) == 0


def test_clothes_are_drawn_from_the_generator_alone_and_normalized():
    task = unireplknet.Clothes()
    (images, labels), (again, _) = (task.batch(200, generator(5)) for _ in range(2))
    assert torch.equal(images, again)
    assert images.shape == (200, 1, 28, 28)
    assert abs(images.mean().item()) < 0.1
    assert images.std().item() == pytest.approx(1, abs=0.1)
    assert set(labels.tolist()) == set(range(10))
    assert len(task.test[0]) == 2000


def test_a_classifier_of_clothes_is_scored_on_all_test_pictures():
    task = unireplknet.Clothes()

    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 7), 10).float()

    assert task.percent_right(Always()) == pytest.approx(10)
    network = build(0, unireplknet.make_classifier)
    assert [level.shape[2:] for level in network.forward_pyramid(torch.randn(1, 1, 28, 28))] == [(7, 7)]
    assert task.loss(network, task.batch(4, generator(0))).isfinite()


def test_speed_is_compared_within_rounds(monkeypatch):
    times = {"with branches": (4.0, 6.0, 4.0), "merged": (2.0, 3.0, 2.0), "with": (3.0,) * 3, "without": (2.0,) * 3}
    monkeypatch.setattr(unireplknet, "time_by_turns", lambda calls, run, seconds: {name: times[name] for name in calls})
    monkeypatch.setattr(unireplknet, "SIZE_A", unireplknet.SMALL)
    finding = unireplknet.time_merging(Run(0, 100))
    assert [one.interval.value for one in finding.measured] == [2, 2, 2, 1.5]
    assert [one.verdict for one in finding.measured] == ["shown"] * 3 + [None]


def test_what_is_timed_runs():
    layer = randomise(build(0, partial(DilatedReparam, 8, 13, BRANCHES)), 0)
    with torch.no_grad():
        x = torch.randn(1, 8, 14, 14)
        assert torch.allclose(layer(x), layer.merged()(x), atol=1e-4)
    network = build(0, lambda: UniRepLKNet(unireplknet.SMALL)).train()
    unireplknet.run_backward(network, torch.randn(2, 3, 64, 64))
    assert all(parameter.grad is not None for parameter in network.parameters())
