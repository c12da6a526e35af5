"""The identities, the accounting and the task of InceptionNeXt's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import inception_next
from gatewise.claims.lab.checks import generator, randomise
from gatewise.claims.lab.run import Run
from gatewise.networks.image.inception_next import InceptionDepthwise, InceptionNeXt, MetaNeXtBlock


def test_the_dense_kernel_is_equal_and_depends_on_the_order_of_branches():
    mixer = InceptionDepthwise(32)
    x = torch.randn(2, 32, 13, 9)
    assert inception_next.equivalence_error(mixer, x) <= 1e-6
    row, column = mixer.convs["row"], mixer.convs["column"]
    with torch.no_grad():
        weight, _ = inception_next.dense_kernel(mixer)
        row.weight.add_(1)
    assert weight.shape == (32, 1, 11, 11)
    assert weight[:20].sum() == 20
    torch.testing.assert_close(weight[24:28, 0, 5, :], (row.weight - 1)[:, 0, 0])
    torch.testing.assert_close(weight[28:, 0, :, 5], column.weight[:, 0, :, 0])


def test_the_receptive_field_is_a_cross_with_a_square():
    mixer = InceptionDepthwise(32)
    assert inception_next.cross().sum() == 25
    assert torch.equal(inception_next.seen_positions(mixer, 32, slice(None)), inception_next.cross())
    sizes = [inception_next.seen_positions(mixer, 32, own).sum() for own in inception_next.branch_channels(mixer)]
    assert sizes == [1, 9, 11, 11]


def test_a_larger_field_would_be_noticed():
    seen = inception_next.seen_positions(nn.Conv2d(8, 8, 5, padding=2, groups=8), 8, slice(None))
    assert (seen > inception_next.cross()).sum() > 0


def test_the_identities_are_shown():
    found = inception_next.check_identities(Run(0, 100))
    assert all(one.verdict == "shown" for one in found.measured)


def test_costs_are_counted_exactly(monkeypatch):
    monkeypatch.setattr(
        inception_next, "time_by_turns", lambda calls, run, seconds: dict.fromkeys(calls, (0.001, 0.002, 0.001))
    )
    per_position, ratio, *_ = inception_next.measure_cost(Run(0, 100)).measured
    assert per_position.interval.value == 3.875
    assert ratio.interval.value == pytest.approx(49 / 3.875)
    assert ratio.verdict == "shown"


def test_each_mixer_is_compared_in_its_better_format():
    times = {
        "Inception, NCHW": (1.0, 1.0, 1.0),
        "Inception, channels-last": (2.0, 2.0, 2.0),
        "7x7, NCHW": (9.0, 9.0, 9.0),
        "7x7, channels-last": (3.0, 3.0, 3.0),
    }
    assert inception_next.in_better_formats("7x7", times, inception_next.at_least(1)).interval.value == 3
    assert inception_next.in_format("7x7", "channels-last", times).interval.value == 1.5


def test_folding_is_exact_and_leaves_no_norm(monkeypatch):
    monkeypatch.setattr(inception_next, "time_by_turns", lambda calls, run, seconds: dict.fromkeys(calls, (1.0, 1.0)))
    difference, norms, _ = inception_next.check_folding(Run(0, 100)).measured
    assert difference.interval.value < 1e-5
    assert norms.interval.value == 0


@pytest.fixture(scope="module")
def batch():
    return inception_next.SymbolNearby().batch(200, generator(0))


def test_one_symbol_is_within_reach_of_a_dot_and_is_the_answer(batch):
    pictures, cells, answers, distance = batch
    symbols = pictures[:, :10]
    for reach in range(1, 5):
        window = 2 * reach + 1
        near = nn.functional.avg_pool2d(symbols, window, 1, reach, divisor_override=1).flatten(2)
        seen = near.gather(2, cells[:, None].expand(-1, 10, -1))
        assert torch.equal(seen.sum(1) == 1, distance <= reach)
        assert (seen.argmax(1) == answers)[distance <= reach].all()


def test_dots_are_marked_and_move(batch):
    pictures, cells, _, distance = batch
    marks = pictures[:, 10].flatten(1)
    assert (marks.gather(1, cells) == 1).all()
    assert (marks.sum(1) == 4).all()
    assert len(cells[:, 0].unique()) == 9
    assert set(distance.unique().tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize(("name", "reach"), [("identity", 0), ("3x3", 2), ("7x7", 6), ("Inception", 10)])
def test_networks_differ_in_their_reach_alone(name, reach):
    network = randomise(inception_next.make_network(inception_next.MIXERS[name]), 0)
    assert sum(isinstance(module, MetaNeXtBlock) for module in network.modules()) == 2
    side = 2 * reach + 5
    x = torch.rand(1, 11, side, side, requires_grad=True)
    network.forward_features(x)[0, :, side // 2, side // 2].sum().backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(0), as_tuple=True)
    assert rows.max() - rows.min() == columns.max() - columns.min() == 2 * reach


def test_mixers_are_replaced_at_every_width():
    network = inception_next.replace_mixers(InceptionNeXt(inception_next.ATTO), inception_next.MIXERS["7x7"])
    with torch.no_grad():
        assert network(torch.rand(1, 3, 64, 64)).shape == (1, 1000)
    assert all(block.mixer.kernel_size == (7, 7) for block in network.modules() if isinstance(block, MetaNeXtBlock))
