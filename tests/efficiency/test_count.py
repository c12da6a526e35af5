"""Costs equal hand-computed ones and the papers' tables, and counting leaves no trace."""

from __future__ import annotations

import time
from functools import partial

import psutil
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


def test_networks_with_several_outputs_count():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x):
            y = self.linear(x)
            return {"first": y, "others": (y.relu(), y.sum())}

    assert count(Pair(), torch.randn(2, 3)).macs == 2 * 3 * 4


@pytest.mark.parametrize("answer", [None, 3, "text"])
def test_a_network_that_returns_no_tensor_is_refused(answer):
    class Mute(nn.Module):
        def forward(self, x):
            return answer

    with pytest.raises(ValueError, match="must return tensors, and .* holds none"):
        count(Mute(), torch.randn(1, 3))


def test_networks_from_elsewhere_may_take_tokens():
    network = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    cost = count(network, torch.zeros(2, 6, dtype=torch.int64))
    assert cost.macs == 12 * 8 * 50
    # A look-up reads the rows that it gives and the tokens, not the table.
    assert cost.operators[0].bytes_read == 4 * 12 * 8 + 8 * 12


def test_control_flow_that_depends_on_values_runs_where_there_are_values():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    assert count(Picky(), torch.ones(2, 3)).macs == 18
    assert count(Picky(), -torch.ones(2, 3)).macs == 0
    with pytest.raises(ValueError, match="on the meta device nothing can depend on values"):
        count(Picky().to("meta"), torch.ones(2, 3, device="meta"))


def test_a_billion_parameters_count_without_being_allocated():
    with torch.device("meta"):
        layer = partial(nn.TransformerEncoderLayer, 2048, 16, 8192, batch_first=True)
        network = nn.Sequential(*(layer() for _ in range(20)))
        example = torch.empty(1, 256, 2048)
    before = resident_bytes()
    start = time.process_time()
    cost = count(network, example)
    seconds = time.process_time() - start
    assert cost.parameters > 1e9
    tokens, dim = 256, 2048
    assert cost.macs == 20 * (tokens * (4 * dim * dim + 2 * dim * 8192) + 2 * tokens * tokens * dim)
    assert resident_bytes() - before < 200e6
    # The promise is 20 seconds; a count of a tenth of that leaves room for machines slower by ten times.
    assert seconds < 20


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_a_module_prepares_what_it_keeps_for_inference():
    class Generated(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.kernel, self.asked = nn.Parameter(torch.randn(4, 5)), None, []

        def prepare_inference(self, dtype):
            self.asked.append(dtype)
            self.kernel = (self.source @ self.source.T).to(dtype)

        def forward(self, x):
            return x @ (self.source @ self.source.T if self.kernel is None else self.kernel)

    network = Generated()
    assert count(network, torch.randn(3, 4)).macs == 3 * 4 * 4
    assert network.asked == [torch.float32]


def test_stages_and_modules_add_up_to_the_operators(tiny, images):
    cost = count(tiny, images)
    for name in ("bytes_read", "bytes_written"):
        between = sum(getattr(entry, name) for entry in cost.operators if not entry.stage)
        assert sum(getattr(stage, name) for stage in cost.stages) + between == getattr(cost, name)
        assert getattr(cost.modules()[0], name) == getattr(cost, name)
    modules = {module.path: module for module in cost.modules()}
    assert list(modules) == ["", "conv", "norm", "depthwise", "head"]
    assert modules[""].macs == cost.macs
    assert modules[""].operators == len(cost.operators)
    assert modules["depthwise"].bias_macs == 0.5 * 2 * 8 * 8 * 8
    assert {entry.stage for entry in cost.operators} == {"", "conv", "norm", "depthwise", "head"}


@pytest.mark.untyped
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_compiled_and_traced_networks_count_as_what_they_are_made_of(tiny, images):
    macs = count(tiny, images).macs
    assert count(torch.compile(tiny, backend="eager"), images).macs == macs
    assert count(torch.fx.symbolic_trace(tiny), images).macs == macs
    with pytest.raises(ValueError, match="a scripted network does not tell which of its modules runs"):
        count(torch.jit.script(tiny), images)


def test_control_flow_inside_of_an_operator_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda y: y @ y, lambda y: y + 1, (x,))

    with pytest.raises(ValueError, match="with its own code inside, which cannot be counted"):
        count(Branching(), torch.randn(3, 3))
