"""The rewritten operators compute what the originals do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.efficiency.acceleration.rewrite import (
    depthwise_by_taps,
    linear_as_convolution,
    linears_to_convolutions,
    unroll_depthwise,
)

sizes = st.integers(1, 9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_a_linear_map_is_a_convolution_for_any_number_of_axes(lead, inputs, outputs, biased):
    x, weight = torch.randn(*lead, inputs).double(), torch.randn(outputs, inputs).double()
    bias = torch.randn(outputs).double() if biased else None
    torch.testing.assert_close(linear_as_convolution(x, weight, bias), F.linear(x, weight, bias))


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(sizes, sizes),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    biased=st.booleans(),
)
def test_a_depthwise_convolution_is_the_sum_of_its_taps(size, kernel, stride, padding, dilation, biased):
    fits = all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in (0, 1))
    if not fits:
        return
    x, weight = torch.randn(2, 3, *size).double(), torch.randn(3, 1, *kernel).double()
    bias = torch.randn(3).double() if biased else None
    expected = F.conv2d(x, weight, bias, stride, padding, dilation, groups=3)
    torch.testing.assert_close(depthwise_by_taps(x, weight, bias, stride, padding, dilation), expected)


def exported(model, *shape):
    x = torch.randn(*shape)
    return torch.export.export(model.eval(), (x,)).module(), x


@pytest.mark.untyped
def test_graphs_keep_their_outputs_and_lose_the_operators():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(4 * 25, 3))
    graph, x = exported(model, 2, 4, 5, 5)
    assert linears_to_convolutions(graph) == 1
    assert unroll_depthwise(graph) == 1
    torch.testing.assert_close(graph(x), model(x))
    left = {node.target for node in graph.graph.nodes}
    assert left.isdisjoint({torch.ops.aten.linear.default, torch.ops.aten.conv2d.default})


@pytest.mark.untyped
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 9, padding=4, groups=4),
        nn.Conv2d(4, 4, 1),
    ],
    ids=["dense", "two kernels per channel", "two channels per group", "81 taps", "pointwise"],
)
def test_other_convolutions_stay(layer):
    graph, x = exported(layer, 1, 4, 6, 6)
    assert unroll_depthwise(graph) == 0
    torch.testing.assert_close(graph(x), layer(x))
