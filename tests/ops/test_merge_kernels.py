"""Sums of normed depthwise convolutions as one convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.merge_kernels import Branch, dilate_kernel, merge_kernels, merge_kernels_reference


def make_branches(shapes, channels=3, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    return [
        Branch(normal(channels, 1, size, size), normal(channels), normal(channels), dilation)
        for size, dilation in shapes
    ]


def sum_of_branches(branches, x):
    total = torch.zeros_like(x)
    for weight, scale, shift, dilation in branches:
        padding = dilation * (weight.shape[-1] // 2)
        y = F.conv2d(x, weight, padding=padding, dilation=dilation, groups=x.shape[1])
        total = total + scale[:, None, None] * y + shift[:, None, None]
    return total


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.sampled_from([5, 7, 9, 13, 17]),
    shapes=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 3)), min_size=1, max_size=4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_one_convolution_equals_the_sum_on_any_map(kernel, shapes, height, width):
    shapes = [(size, dilation) for size, dilation in shapes if dilation * (size - 1) < kernel] or [(kernel, 1)]
    branches = make_branches(shapes)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    weight, bias = merge_kernels(branches, kernel)
    merged = F.conv2d(x, weight, bias, padding=kernel // 2, groups=3)
    # Rounding of sums of some hundred terms near 1.
    assert torch.allclose(merged, sum_of_branches(branches, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shapes", [[(13, 1), (5, 1), (7, 2), (3, 5)], [(1, 1)], [(3, 6), (3, 1)]])
def test_the_merge_is_the_impulse_response(shapes):
    branches = make_branches(shapes)
    for found, expected in zip(merge_kernels(branches, 13), merge_kernels_reference(branches, 13), strict=True):
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_gradients_reach_every_branch():
    branches = make_branches([(5, 1), (3, 2)])
    leaves = [tensor.requires_grad_() for branch in branches for tensor in branch[:3]]

    def merge(*tensors):
        parts = [Branch(*tensors[:3], 1), Branch(*tensors[3:], 2)]
        return merge_kernels(parts, 7)

    assert torch.autograd.gradcheck(merge, leaves)


def test_dilating_puts_zeros_between_taps():
    dense = dilate_kernel(torch.tensor([[[[1.0, 2.0, 3.0]] * 3]]), 3)
    assert dense.shape == (1, 1, 7, 7)
    assert dense[0, 0, 3].tolist() == [1, 0, 0, 2, 0, 0, 3]
    assert dense[0, 0, 1].abs().sum() == 0
    assert torch.equal(dilate_kernel(dense, 1), dense)


def test_non_contiguous_kernels_merge_alike():
    branches = make_branches([(5, 1), (3, 2)])
    turned = [branch._replace(weight=branch.weight.transpose(2, 3)) for branch in branches]
    copied = [branch._replace(weight=branch.weight.contiguous()) for branch in turned]
    assert torch.equal(merge_kernels(turned, 5)[0], merge_kernels(copied, 5)[0])


@pytest.mark.parametrize(
    ("shapes", "kernel", "message"),
    [
        ([], 5, "nothing to merge"),
        ([(3, 1)], 6, "kernel_size must be odd and positive, not 6"),
        ([(4, 1)], 7, "kernels of branches must be odd, not 4"),
        ([(5, 2)], 7, "a kernel of 5 with dilation 2 spans 9 positions, more than the 7"),
        ([(3, 0)], 7, "dilation must be 1 or more, not 0"),
    ],
)
def test_impossible_merges_are_refused(shapes, kernel, message):
    with pytest.raises(ValueError, match=message):
        merge_kernels(make_branches(shapes), kernel)
