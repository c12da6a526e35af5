"""The schedule of HGF's gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.layers.ternary import HybridGatedLinear
from gatewise.methods import HGFGates, Step, pack_ternary


@pytest.fixture
def model():
    return nn.Sequential(HybridGatedLinear(8, 8, 2, gate_init=0.5), HybridGatedLinear(8, 8, 2, gate_init=-0.5))


def step(progress):
    nothing = torch.zeros(1)
    return Step(nothing, nothing, nothing, progress)


def states(model):
    model(torch.zeros(1, 8))
    return [(ternary.ramp, ternary.frozen) for ternary in model]


def test_gates_fade_in_then_stay_then_freeze(model):
    term = HGFGates(model, warmup=0.2, freeze=0.6)
    assert states(model) == [(0.0, False)] * 2
    for progress, expected in [(0.1, (0.5, False)), (0.2, (1.0, False)), (0.5, (1.0, False)), (0.6, (1.0, True))]:
        term(step(progress))
        assert states(model) == [expected] * 2


def test_penalty_acts_between_warm_up_and_freeze(model):
    term = HGFGates(model, warmup=0.2, freeze=0.6, weight=0.1)
    term(step(0.3))
    model(torch.zeros(1, 8))
    assert term(step(0.3)).item() == pytest.approx(0.1 * torch.tanh(torch.tensor(0.5)).item() ** 2)
    assert term(step(0.1)).item() == 0
    assert term(step(0.6)).item() == 0


def test_a_restored_term_starts_with_the_gates_as_they_were(model):
    term = HGFGates(model, warmup=0.2)
    term(step(0.1))
    fresh = nn.Sequential(HybridGatedLinear(8, 8, 2))
    other = HGFGates(fresh, warmup=0.2)
    other.load_state_dict(term.state_dict())
    assert states(fresh) == [(0.5, False)]


def test_the_networks_parameters_are_not_the_terms(model):
    assert list(HGFGates(model).parameters()) == []


def test_wrong_phases_and_networks_are_refused(model):
    with pytest.raises(ValueError, match="phases must be in order"):
        HGFGates(model, warmup=0.7, freeze=0.6)
    with pytest.raises(ValueError, match="weight must be 0 or positive, not -1"):
        HGFGates(model, weight=-1)
    with pytest.raises(ValueError, match="Linear has no gated ternary layer"):
        HGFGates(nn.Linear(2, 2))


def test_packing_needs_a_ternary_map():
    with pytest.raises(ValueError, match="Linear has no ternary layer to pack"):
        pack_ternary(nn.Linear(2, 2))
