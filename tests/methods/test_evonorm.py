from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import gatewise
from gatewise.layers.evonorm import EvoNormB0, EvoNormS0, EvoNormS0a
from gatewise.methods import find_method
from gatewise.methods.evonorm import swap_norms


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_a_pair_becomes_one_layer_and_a_norm_alone_a_weight_and_a_bias():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Flatten()
    )
    network[1].weight.data.uniform_(), network[1].bias.data.uniform_()
    weight, bias = network[1].weight.clone(), network[1].bias.clone()
    assert swap_norms(network, groups=4) is network
    assert (network[1].act, network[1].groups, network[4].act) == (True, 4, False)
    assert isinstance(network[2], nn.Identity)
    assert torch.equal(network[1].weight, weight)
    assert torch.equal(network[1].bias, bias)
    assert network(torch.randn(2, 3, 5, 5)).shape == (2, 36)


class Block(nn.Module):
    """One activation for two places, and a functional one, as torchvision and others write it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return self.relu(x + self.norm3(self.conv3(y)))


def test_shared_and_functional_activations_go_and_those_behind_sums_stay():
    network = nn.Sequential(Block())
    keys = [key for key, _ in network.named_parameters()]
    swap_norms(network)
    assert [network[0].get_submodule(f"norm{i}").act for i in (1, 2, 3)] == [True, True, False]
    assert {key for key, _ in network.named_parameters()} == {*keys, "0.norm1.v", "0.norm2.v"}
    x = torch.randn(2, 4, 3, 3)
    block = network[0]
    y = block.norm2(block.conv2(block.norm1(block.conv1(x))))
    torch.testing.assert_close(network(x), (x + block.norm3(block.conv3(y))).relu())


@pytest.mark.parametrize(
    ("build", "with_act", "without"),
    [
        (lambda: torchvision.models.resnet18(num_classes=3), 9, 11),
        (lambda: torchvision.models.mobilenet_v2(num_classes=3), 35, 17),
        (lambda: timm.create_model("resnetv2_50d_evos", num_classes=3), None, None),
        (lambda: timm.create_model("efficientnet_b0", num_classes=3), 33, 16),
        (lambda: gatewise.create_model("mobilenetv2_035", num_classes=3), 35, 17),
    ],
    ids=["resnet18", "mobilenet_v2", "no norm", "timm", "ours"],
)
def test_networks_of_other_libraries(build, with_act, without):
    network = build().eval()
    if with_act is None:
        with pytest.raises(ValueError, match="no batch or group norm over maps"):
            swap_norms(network)
        return
    keys = [key for key, _ in network.named_parameters()]
    swapped = swap_norms(copy.deepcopy(network), groups=4)
    layers = [module for module in swapped.modules() if isinstance(module, EvoNormS0)]
    assert [sum(layer.act for layer in layers), sum(not layer.act for layer in layers)] == [with_act, without]
    assert count(swapped, nn.BatchNorm2d) == 0
    assert {key for key, _ in swapped.named_parameters() if not key.endswith(".v")} == set(keys)
    swapped.train()(torch.randn(1, 3, 64, 64)).sum().backward()


def test_it_equals_the_network_that_was_built_with_it():
    built = gatewise.create_model("mobilenetv2_evonorm_b0", num_classes=3).eval()
    swapped = gatewise.create_model("mobilenetv2_100", num_classes=3).eval()
    swap_norms(swapped, layer="B0", eps=1e-5)
    names = {"stem.": "stem.0."}
    state = {
        next((ours + key.removeprefix(theirs) for theirs, ours in names.items() if key.startswith(theirs)), key): value
        for key, value in swapped.state_dict().items()
    }
    built.load_state_dict(state)
    x = torch.randn(1, 3, 40, 33)
    torch.testing.assert_close(swapped(x), built(x))


def test_members_and_options_reach_the_layers():
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.SiLU())
    other = copy.deepcopy(network)
    layer = swap_norms(network, layer="B0", momentum=0.2, unbiased=False)[1]
    assert isinstance(layer, EvoNormB0)
    assert (layer.momentum, layer.unbiased, layer.eps) == (0.2, False, 1e-3)
    layer = swap_norms(other, layer="S0a", group_size=4)[1]
    assert isinstance(layer, EvoNormS0a)
    assert layer.groups == 2


def test_branches_that_start_closed_still_do():
    network = torchvision.models.resnet18(num_classes=3, zero_init_residual=True)
    swap_norms(network)
    assert network.layer1[0].bn2.weight.abs().max() == 0


def test_resumes_from_its_own_state():
    first, second = (swap_norms(nn.Sequential(Block()), layer="B0") for _ in range(2))
    first.train()(torch.randn(4, 4, 3, 3))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(second.eval()(x), first.eval()(x))


def test_a_block_that_serves_twice_still_does():
    block = Block()
    network = swap_norms(nn.Sequential(block, nn.Identity(), block))
    assert network[0] is network[2]
    assert count(network, nn.BatchNorm2d) == 0


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(4)])

    def forward(self, x):
        return self.norms[0](x).relu()


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(x).relu() if x.sum() > 0 else x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.norm(x).relu())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear has no batch or group norm over maps"),
        (nn.BatchNorm2d(2), "a norm by itself shows no activation"),
        (nn.Sequential(Listed()), "what follows the norms in Sequential.0.norms cannot be seen: it is a list"),
        (nn.Sequential(Block(), Branching()), "what follows the norms in Sequential.1 cannot be seen: TraceError"),
        (nn.Sequential(Twice()), "Sequential.0.norm is used with an activation and without"),
    ],
)
def test_what_cannot_be_seen_is_told_and_left_alone(model, message):
    before = str(model)
    with pytest.raises(ValueError, match=message):
        swap_norms(model)
    assert str(model) == before


def test_it_is_registered_as_a_transform():
    assert find_method("swap_norms").kind == "transform"
    assert find_method("swap_norms").build is swap_norms
