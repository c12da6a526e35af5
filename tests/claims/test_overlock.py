"""The identities, the measures and the task of OverLoCK's claim; no training."""

from __future__ import annotations

import pytest
import torch

from gatewise.claims import overlock
from gatewise.claims.lab.checks import generator
from gatewise.claims.lab.run import Run
from gatewise.ops.context_mixing import context_mixing


def test_identities_hold():
    finding = overlock.check_identities(Run(0, 100))
    assert all(one.verdict == "shown" for one in finding.measured)


def test_a_wrong_window_would_be_noticed(monkeypatch):
    def padded(*arguments):
        return context_mixing(*arguments[:-1], arguments[-1].roll(1, dims=3))

    monkeypatch.setattr(overlock, "context_mixing", padded)
    assert overlock.uniform_error(0) > 0.1
    finding = overlock.check_identities(Run(0, 100))
    assert [one.verdict for one in finding.measured[:3]] == ["contrary"] * 3


def test_the_reach_of_kernels_without_context_is_their_window(monkeypatch):
    monkeypatch.setattr(overlock, "context_mixing", lambda query, centers, *rest: rest[-1] + 0 * centers.sum())
    assert overlock.reach_through_kernels(0) == 0


def test_all_forms_compute_the_same():
    given = overlock.arguments(3, 14, window=7, heads=2, batch=2)
    found = [mix(*given) for mix in overlock.FORMS.values()]
    assert all(torch.allclose(one, found[0], atol=1e-5) for one in found)


def test_what_is_kept_is_counted_once():
    given = overlock.arguments(0, 14)
    inputs = sum(tensor.numel() for tensor in given) * 4 / 1e6
    assert overlock.kept_megabytes(context_mixing, given) == pytest.approx(inputs)
    # All windows of the second half of the values: 128 channels, 169 entries, 14 x 14 positions.
    assert overlock.kept_megabytes(overlock.mix_by_unfolding, given) > 128 * 169 * 14**2 * 4 / 1e6


def test_costs_are_measured_and_judged(monkeypatch):
    monkeypatch.setattr(overlock, "SIDES", (14,))
    finding = overlock.compare_costs(Run(0, 20))
    memory = [one for one in finding.measured if one.what.startswith("memory")]
    assert len(memory) == 2
    assert all(one.verdict == "shown" for one in memory)
    assert len(finding.charts[0].bars) == 3


def test_the_task_can_be_answered_from_both_parts_and_from_neither_alone():
    task = overlock.SignsByDots()
    pictures, answers = task.batch(2000, generator(0))
    assert pictures.shape == (2000, 9, 12, 12)
    # A sign may stand where the other does, in a plane of its own.
    first, second = pictures[:, :4].amax((2, 3)).argmax(1), pictures[:, 4:8].amax((2, 3)).argmax(1)
    is_dense = pictures[:, 8].mean((1, 2)) > (task.few + task.many) / 2
    assert (torch.where(is_dense, first, second) == answers).float().mean() > 0.97
    assert 0.58 < (first == answers).float().mean() < 0.67
    # A ninth of the picture is not enough to tell how many dots there are.
    part = pictures[:, 8, :4, :4].mean((1, 2)) > (task.few + task.many) / 2
    assert (torch.where(part, first, second) == answers).float().mean() < 0.95
    assert torch.equal(task.batch(8, generator(1))[0], task.batch(8, generator(1))[0])


def test_networks_start_alike_and_differ_in_what_the_focus_net_is_told():
    networks = overlock.make_networks(0)
    guided, unguided = networks[overlock.GUIDED], networks[overlock.UNGUIDED]
    state = unguided.state_dict()
    assert {key for key in guided.state_dict() if key not in state} == {"context.weight", "context.bias"}
    assert all(torch.equal(value, guided.state_dict()[key]) for key, value in state.items())
    pictures = overlock.SignsByDots().batch(2, generator(0))[0]
    for network, is_told in ((guided.eval(), True), (unguided.eval(), False)):
        logits = network(pictures)
        with torch.no_grad():
            for parameter in network.stages[3].parameters():
                parameter.add_(0.5)
        assert torch.equal(network(pictures), logits) != is_told


def test_both_classifiers_are_in_the_loss():
    network = overlock.make_networks(0)[overlock.UNGUIDED].train()
    task = overlock.SignsByDots()
    task.loss(network, task.batch(4, generator(0))).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
