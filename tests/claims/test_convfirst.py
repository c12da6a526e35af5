"""The parts of ConvFirst's claim that are arithmetic or identities, and what its measurements are made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.claims import convfirst
from gatewise.claims.lab.intervals import exact
from gatewise.claims.lab.run import Run

# Blocks are found by tracing them, which checks of types at run time would be traced with.
IDENTITY = pytest.param(convfirst.check_identity, marks=pytest.mark.untyped)


@pytest.mark.parametrize("check", [convfirst.bound_processors, IDENTITY])
def test_what_can_be_computed_is_as_stated(check):
    assert all(one.verdict == "shown" for one in check(Run(0, 100)).measured)


def test_extra_bytes_are_the_most_that_lives_at_once_less_the_output():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    with torch.no_grad():
        # Both sides of the ReLU are alive at once.
        assert convfirst._extra_bytes(model, torch.zeros(8, 16)) == 2 * 8 * 64 * 4 - 8 * 16 * 4


def test_the_order_of_bounds_is_judged():
    times = dict.fromkeys(("separate", "folded", "fused"), (3.0, 3.0, 3.0))
    right = convfirst._orders("a", {"separate": 0.1, "folded": 0.5, "fused": 0.5}, times)
    wrong = convfirst._orders("a", {"separate": 0.5, "folded": 0.5, "fused": 0.6}, times)
    assert [one.verdict for one in right] == ["shown"] * 3
    assert wrong[0].verdict == "contrary"


def test_the_spread_of_efficiencies_is_the_widest_ratio():
    assert convfirst._widest_ratio({"a": exact(0.2), "b": exact(0.6), "c": exact(0.3)}).value == pytest.approx(3.0)
