"""The checks and networks of ViG's claim; no training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import vig
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run


@pytest.mark.parametrize("check", [vig.check_forms, vig.check_reach])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict in ("shown", None) for one in check(Run(0, 100)).measured)


def test_one_scan_sees_what_comes_before_alone():
    seen = {one.what: one.interval.value for one in vig.check_reach(Run(0, 100)).measured}
    assert seen == {"positions that the first one sees": 196, "the same of a scan forwards alone": 1}


def test_kinds_differ_in_their_mixers_alone():
    networks = {name: vig.make_network(kind) for name, kind in vig.KINDS.items()}
    shapes = [{key: tensor.shape for key, tensor in one.state_dict().items()} for one in networks.values()]
    assert all(one == shapes[0] for one in shapes)
    pictures = vig.NearOrFar().batch(2, generator(0))[0]
    for network in networks.values():
        assert network(pictures).shape == (2, 10)


def test_shared_gates_are_own_gates_that_are_equal():
    shared, own = (kind(16, 2, vig.CONFIG) for kind in (vig.SharedGates, vig.WithoutLocality))
    own.load_state_dict(shared.state_dict())
    x = torch.randn(1, 4, 5, 16)
    assert not torch.allclose(shared(x), own(x))
    with torch.no_grad():
        for tensor in (own.project.decay2.weight, own.project.decay2.bias):
            tensor[8:] = tensor[:8]
    torch.testing.assert_close(shared(x), own(x))


def test_dots_before_the_far_symbol_are_told_from_others():
    batch = vig.NearOrFar().batch(50, generator(0))
    early = vig.before_the_far_symbol(batch)
    assert early.any()
    assert not early[batch[3] == 0].any()
    pictures, cells = batch[:2]
    far = pictures[:, 10:20].sum(1).flatten(1)
    for sample, question in early.nonzero().tolist():
        assert far[sample, : cells[sample, question]].sum() == 0


def test_memory_kept_for_training_counts_every_piece_once_and_no_parameter():
    network = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4), nn.Sigmoid())
    # The input, and each sigmoid's output, which the next map keeps as well.
    assert vig.kept_for_training(network, torch.randn(5, 8)) == 4 * 5 * (8 + 16 + 4)


def test_memory_used_again_is_counted_again():
    class Twice(nn.Module):
        def forward(self, x):
            for _ in range(3):
                x = x + x.exp().sum()
            return x

    x = torch.randn(1000, requires_grad=True)
    # Each exponential is kept; the sums are small.
    assert vig.kept_for_training(Twice(), x) == 3 * 4 * 1000
