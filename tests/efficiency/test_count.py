"""Costs equal hand-computed ones and the sheets' tables, and counting leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatewise
from gatewise.efficiency import count


def test_counts_equal_those_by_hand(tiny, images):
    cost = count(tiny, images)
    positions = 2 * 8 * 8  # batch of two, stride 2
    conv, depthwise, head = positions * 8 * 27, positions * 8 * 9, 2 * 8 * 5
    assert cost.macs == conv + depthwise + head
    assert cost.parameters == 8 * 27 + 16 + 8 * 9 + 8 + 8 * 5 + 5
    assert cost.activation_bytes == 4 * (3 * positions * 8 + 2 * 5)
    assert [stage.name for stage in cost.stages] == ["conv", "norm", "depthwise", "head"]
    assert [stage.macs for stage in cost.stages] == [conv, 0, depthwise, head]
    assert cost.stages[2].output_shape == (2, 8, 8, 8)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("focalnet_tiny_srf", 4_403_335_680),
        ("focalnet_huge_fl4", 118_762_609_152),
        ("inception_next_atto", 503_035_040),
        ("mobilenetv2_100", 300_774_272),
        ("mobilenetv2_035", 59_285_808),
    ],
)
def test_macs_equal_the_published_tables(name, macs):
    with torch.device("meta"):
        cost = count(gatewise.create_model(name), torch.empty(1, 3, 224, 224))
    assert cost.macs == macs
    assert sum(stage.macs for stage in cost.stages) == macs
    assert sum(stage.parameters for stage in cost.stages) == cost.parameters


def test_stages_are_parts_of_their_own_even_where_only_their_members_are_called():
    with torch.device("meta"):
        cost = count(gatewise.create_model("focalnet_tiny_srf"), torch.empty(1, 3, 64, 64))
    assert [stage.name for stage in cost.stages] == [
        "stem", "stages.0", "stages.1", "stages.2", "stages.3", "norm", "head"
    ]  # fmt: skip
    assert cost.stages[4].output_shape == (1, 2, 2, 768)


def test_shared_parameters_count_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    cost = count(Twice(), torch.randn(3, 4))
    assert cost.parameters == sum(stage.parameters for stage in cost.stages) == 16
    assert cost.macs == 2 * 3 * 16


def test_the_network_is_left_as_it_was(tiny, images):
    tiny.train()
    tiny.depthwise.eval()
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    count(tiny, images)
    assert tiny.training
    assert tiny.norm.training
    assert not tiny.depthwise.training
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


def test_hooks_and_mode_are_restored_when_the_network_fails(tiny):
    tiny.train()
    with pytest.raises(ValueError, match=r"cannot run on an example of shape \(1, 4, 16, 16\)"):
        count(tiny, torch.randn(1, 4, 16, 16))
    assert tiny.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny.modules())


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ([1.0], TypeError, "must be one tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, "must be floating-point"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), ValueError, "float64, the network torch.float32"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "on meta, the network on cpu"),
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one sample"),
    ],
)
def test_bad_examples_are_named(tiny, example, error, message):
    with pytest.raises(error, match=message):
        count(tiny, example)


def test_a_network_with_several_outputs_is_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match="must return one tensor, not tuple"):
        count(Pair(), torch.randn(1, 3))
