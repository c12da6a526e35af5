"""The identities, the accounting and the task of HorNet's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import hornet
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.layers.gnconv import GlobalLocalFilter, GnConv


@pytest.mark.parametrize("part", ["check_degree", "check_cost", "check_filter"])
def test_the_identities_are_shown(part):
    found = getattr(hornet, part)(Run(0, 100))
    assert {one.verdict for one in found.measured} <= {"shown", None}
    assert any(one.verdict == "shown" for one in found.measured)


def test_a_bias_would_be_noticed_in_the_degree(monkeypatch):
    monkeypatch.setattr(hornet, "without_biases", lambda module: module)
    assert hornet.check_degree(Run(0, 100)).measured[0].verdict == "contrary"


def test_a_filter_of_another_shape_would_be_noticed(monkeypatch):
    monkeypatch.setattr(
        hornet, "global_filter", lambda x, spectrum: hornet.global_filter_reference(x.flip(3), spectrum)
    )
    assert hornet.filter_error((6, 5), 0) > 0.1


def test_fields_of_view_end_where_the_kernel_does():
    seen = hornet.seen_positions(None, 11, 0)
    rows, columns = torch.nonzero(seen, as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 8, 2, 8)
    assert hornet.seen_positions((5, 3), 5, 0).sum() == 25


def test_both_filters_are_timed_at_each_size(monkeypatch):
    timed = {}

    def by_turns(calls, run, seconds):
        timed.update(calls)
        return {name: (0.002, 0.003) if "global" in name else (0.001, 0.001) for name in calls}

    monkeypatch.setattr(hornet, "time_by_turns", by_turns)
    monkeypatch.setattr(hornet, "SIDES", (4, 6))
    *_, last = hornet.time_filters(Run(0, 100)).measured
    assert [isinstance(call.func.spatial, GlobalLocalFilter) for call in timed.values()] == [False, True] * 2
    assert timed["global filter, 6"].func.spatial.spectrum.shape[1:3] == (6, 4)
    assert (last.interval.value, last.verdict) == (2.5, "shown")


@pytest.fixture(scope="module")
def products():
    return hornet.ProductOfCues(3).batch(200, generator(0))


def test_a_product_is_of_one_cue_here_and_of_the_means_around(products):
    planes, answers = products
    around = planes[7, 1:, 4:7, 8:11].sum(dim=(1, 2)) / 3
    torch.testing.assert_close(answers[7, 0, 5, 9], planes[7, 0, 5, 9] * around[0] * around[1])
    # A product of three variables of variance 1; fourth moments make its variance uncertain.
    assert answers[..., 1:-1, 1:-1].var().item() == pytest.approx(1, abs=0.1)


def test_no_product_of_fewer_cues_tells_anything(products):
    planes, answers = products
    around = torch.nn.functional.avg_pool2d(planes, 3, 1, 1)
    for factor in (planes[:, :1], around[:, 1:2], planes[:, :1] * around[:, 1:2], around[:, 1:2] * around[:, 2:]):
        correlation = torch.corrcoef(torch.stack([factor.flatten(), answers.flatten()]))[0, 1]
        # Four standard errors: the tails are heavy, and neighbors share what they average.
        assert abs(correlation) < 0.16


def test_explained_variance_is_one_for_the_answer_and_zero_for_the_mean(products):
    task = hornet.ProductOfCues(3)

    def answer(planes):
        return planes[:, :1] * task.window**2 * torch.nn.functional.avg_pool2d(planes[:, 1:], 3, 1, 1).prod(1, True)

    assert task.explained(answer, products) == pytest.approx(1, abs=1e-6)
    assert task.explained(torch.zeros_like, (products[1], products[1])) == pytest.approx(0, abs=1e-2)


def test_models_differ_in_their_order_alone():
    for make in (hornet.make_layer, hornet.make_block):
        for order in (1, 2, 3):
            model = make(order, 3)
            (gnconv,) = (module for module in model.modules() if isinstance(module, GnConv))
            assert gnconv.widths == [16, 8, 4][:order][::-1]
            assert model(torch.randn(2, 3, 6, 5)).shape == (2, 1, 6, 5)


def test_parts_fit_into_the_budget():
    assert sum(part.seconds for part in hornet.CLAIM.parts) < hornet.CLAIM.budget_s <= 180
