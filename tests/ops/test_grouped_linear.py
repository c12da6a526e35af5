"""Linear maps of groups of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from gatewise.ops.grouped_linear import grouped_linear, grouped_linear_reference


def inputs(counts, dtype=torch.float64):
    x = torch.randn(sum(counts), 5, dtype=dtype)
    weight = torch.randn(len(counts), 3, 5, dtype=dtype)
    return x, weight, torch.tensor(counts)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_values_and_gradients_are_those_of_the_definition(counts):
    torch.manual_seed(0)
    x, weight, counts = inputs(counts)
    gradients = []
    cotangent = torch.randn(x.shape[0], 3, dtype=torch.float64)
    for function in (grouped_linear, grouped_linear_reference):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = function(*leaves, counts)
        gradients.append((y.detach(), *torch.autograd.grad((y * cotangent).sum(), leaves)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_rows_need_not_be_contiguous():
    _, weight, counts = inputs([2, 0, 3])
    x = torch.randn(5, 5, dtype=torch.float64).T
    torch.testing.assert_close(grouped_linear(x, weight, counts), grouped_linear_reference(x, weight, counts))


def test_the_fused_kernel_computes_the_same(monkeypatch):
    """On the CPU too, in bfloat16; the rows and groups that it needs to be aligned are."""
    counts = torch.tensor([3, 0, 5, 8])
    x, weight = torch.randn(16, 16).bfloat16(), torch.randn(4, 8, 16).bfloat16()
    found = []
    for fused in (False, True):
        monkeypatch.setattr("gatewise.ops.grouped_linear._has_kernel", lambda *tensors, fused=fused: fused)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = grouped_linear(*leaves, counts)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    for plain, kernel in zip(*found, strict=True):
        # Eight bits of mantissa.
        torch.testing.assert_close(kernel, plain, rtol=2e-2, atol=2e-2)


def test_autocast_reaches_the_operator():
    x, weight, counts = inputs([1, 2], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, counts).dtype == torch.bfloat16


def test_products_are_counted_without_storage():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        weight = torch.empty(4, 3, 5, requires_grad=True)
        y = grouped_linear(torch.empty(7, 5, requires_grad=True), weight, torch.empty(4, dtype=torch.long))
        assert y.shape == (7, 3)
        assert counter.get_total_flops() == 2 * 7 * 3 * 5
        y.sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 7 * 3 * 5


def test_the_operator_keeps_the_rules_of_custom_operators():
    x, weight, counts = inputs([2, 0, 1])
    arguments = (x.requires_grad_(), weight.requires_grad_(), counts)
    torch.library.opcheck(torch.ops.gatewise.grouped_linear, arguments)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "weight", "counts"), [((3, 5), (2, 3, 4), 2), ((3, 5), (2, 3, 5), 3), ((5,), (2, 3, 5), 2)]
)
def test_shapes_that_do_not_fit_are_refused(x, weight, counts):
    with pytest.raises(ValueError, match="grouped_linear takes rows"):
        grouped_linear(torch.zeros(x), torch.zeros(weight), torch.zeros(counts, dtype=torch.long))
