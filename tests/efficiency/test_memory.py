"""Live activations, by stage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.efficiency.cost.memory import memory_by_stage


class Widening(nn.Module):
    """Two stages of known sizes: 4 -> 64 -> 4 features, and a residual connection around the second."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4))
        self.second = nn.Linear(4, 8, bias=False)

    def forward(self, x):
        x = self.first(x)
        return torch.cat([x, self.second(x)], dim=1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peaks_are_what_lives_at_once(device):
    with torch.device(device):
        model, x = Widening().eval(), torch.zeros(10, 4)
    first, second = memory_by_stage(model, x)
    # Both sides of the ReLU, 64 wide; then the output of the first stage alone.
    assert (first.name, first.peak_bytes, first.left_bytes) == ("first", 2 * 10 * 64 * 4, 10 * 4 * 4)
    # The first stage's output is needed behind the second.
    assert (second.name, second.peak_bytes, second.left_bytes) == ("second", 10 * 12 * 4, 10 * 12 * 4)


def test_views_and_changes_in_place_take_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.ReLU(inplace=True)).eval()
    stages = memory_by_stage(model, torch.zeros(3, 4))
    assert {stage.peak_bytes for stage in stages} == {3 * 4 * 4}


def test_the_network_is_left_as_it_was():
    model = Widening().train()
    memory_by_stage(model, torch.zeros(2, 4))
    assert model.training
    assert not model.first._forward_hooks
    with pytest.raises(ValueError, match="cannot run on an example of shape"):
        memory_by_stage(model, torch.zeros(2, 5))
    assert not model.first._forward_hooks
