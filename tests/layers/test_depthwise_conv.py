"""The depthwise convolution is `nn.Conv2d`'s in all but speed."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatewise.efficiency.acceleration.fold import fold
from gatewise.layers.conv import ConvNormAct
from gatewise.layers.depthwise_conv import DepthwiseConv2d, conv2d

CASES = [
    (3, {}),
    (5, {}),
    (7, {}),
    (13, {}),
    ((1, 11), {}),
    ((5, 3), {}),
    (7, {"stride": 2}),
    (3, {"dilation": 2}),
    (5, {"padding": 0}),
    (4, {"padding": 1}),
]


def pair(kernel_size, options):
    """The layer and `nn.Conv2d` with its weights, in float64."""
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, kernel_size, **options).double()
    theirs = nn.Conv2d(
        6, 6, kernel_size, ours.stride, ours.padding, ours.dilation, groups=6, bias=ours.bias is not None
    ).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("kernel_size", "options"), CASES)
def test_values_and_gradients_are_those_of_the_library(kernel_size, options, memory_format):
    x = torch.randn(2, 6, 14, 15, dtype=torch.float64).contiguous(memory_format=memory_format)
    found = []
    for layer in pair(kernel_size, options):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        found.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel_size", "options"), CASES)
def test_initial_weights_and_keys_are_those_of_the_library(kernel_size, options):
    ours, _ = pair(kernel_size, options)
    torch.manual_seed(0)
    fresh = nn.Conv2d(6, 6, kernel_size, ours.stride, ours.padding, ours.dilation, groups=6).double()
    assert ours.state_dict().keys() == fresh.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in fresh.state_dict().items())


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernel_size", "options", "memory_format", "own"),
    [
        (3, {}, torch.contiguous_format, False),
        (3, {"dilation": 2}, torch.contiguous_format, True),
        (5, {}, torch.contiguous_format, True),
        (5, {}, torch.channels_last, False),
        (7, {}, torch.channels_last, True),
        (7, {"stride": 2}, torch.contiguous_format, False),
        ((1, 11), {}, torch.contiguous_format, False),
    ],
)
def test_training_takes_the_own_operator_where_that_is_faster(kernel_size, options, memory_format, own):
    layer = DepthwiseConv2d(4, kernel_size, **options)
    x = torch.randn(1, 4, 16, 16).contiguous(memory_format=memory_format)
    with _Recorder() as trained:
        layer(x).sum().backward()
    assert ("large_depthwise_conv.default" in trained.names) == own
    with _Recorder() as used, torch.no_grad():
        layer(x)
    assert "large_depthwise_conv.default" not in used.names


@pytest.mark.untyped
def test_a_network_with_it_can_be_traced_and_folded():
    unit = ConvNormAct(6, 6, 7, groups=6).eval()
    unit.norm.running_var.uniform_(0.5, 2)
    plain = nn.Sequential(DepthwiseConv2d(6, 7), nn.BatchNorm2d(6)).eval()
    plain[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 6, 9, 9)
    for network in (unit, plain):
        torch.testing.assert_close(fx.symbolic_trace(network)(x), network(x))
        folded = fold(network)
        assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
        torch.testing.assert_close(folded(x), network(x), rtol=1e-5, atol=1e-6)


@pytest.mark.untyped
def test_gradients_for_each_sample_come_from_torch_func():
    layer, x = DepthwiseConv2d(4, 7), torch.randn(3, 4, 12, 12)
    parameters = dict(layer.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, sample[None]).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for position, sample in enumerate(x):
        alone = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(together[name][position], gradient, rtol=1e-4, atol=1e-4)


def test_convolutions_are_depthwise_where_each_channel_is_a_group():
    assert type(conv2d(4, 4, 3, groups=4)) is DepthwiseConv2d
    assert type(conv2d(4, 8, 3, groups=4)) is nn.Conv2d
    assert type(conv2d(4, 4, 3, groups=2)) is nn.Conv2d
    assert type(conv2d(1, 1, 3)) is nn.Conv2d


def test_an_even_kernel_needs_its_padding():
    with pytest.raises(ValueError, match="odd sides, not 4 and 4"):
        DepthwiseConv2d(4, 4)
