"""The gated blend of two norms against its definition, values and gradients."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.gated_norm_blend import gated_norm_blend, gated_norm_blend_reference

F64 = torch.float64


def inputs(*positions, width=6, dtype=F64):
    far, near, logits = (torch.randn(*positions, width, dtype=dtype) for _ in range(3))
    return far, near, logits, *(1 + 0.1 * torch.randn(width, dtype=dtype) for _ in range(2))


def with_gradients(function, tensors, eps=1e-6):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves, eps)
    cotangent = torch.cos(torch.arange(y.numel(), dtype=torch.float32)).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


def largest_error(found, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(1, 5), min_size=0, max_size=4),
    width=st.integers(1, 9),
    eps=st.sampled_from([1e-6, 0.3]),
)
def test_any_shape_equals_the_definition(positions, width, eps):
    torch.manual_seed(0)
    tensors = inputs(*positions, width=width)
    expected = with_gradients(gated_norm_blend_reference, tensors, eps)
    for ours, theirs in zip(with_gradients(gated_norm_blend, tensors, eps), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_in_float32():
    tensors = inputs(2, 14, 14, 3, width=64)
    expected = with_gradients(gated_norm_blend_reference, tensors)
    single = with_gradients(gated_norm_blend, [x.float() for x in tensors])
    # Gradients of the weights are sums over a thousand rows.
    assert largest_error([x.double() for x in single], expected) < 5e-6


def test_gradcheck():
    assert torch.autograd.gradcheck(gated_norm_blend, [x.requires_grad_() for x in inputs(2, 3, width=4)])


def test_tensors_that_are_not_contiguous():
    tensors = inputs(3, 4, 2)
    strange = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors[:3]]
    assert not any(x.is_contiguous() for x in strange)
    found = with_gradients(gated_norm_blend, [*strange, *tensors[3:]])
    assert largest_error(found, with_gradients(gated_norm_blend, tensors)) < 1e-14


def test_half_precision_rounds_inputs_and_results_alone():
    tensors = inputs(5, 4, width=16, dtype=torch.float32)
    half = [x.bfloat16() for x in tensors[:3]]
    found = with_gradients(gated_norm_blend, [*half, *tensors[3:]])
    assert [x.dtype for x in found] == [torch.bfloat16] * 4 + [torch.float32] * 2
    expected = with_gradients(gated_norm_blend, [*(x.float() for x in half), *tensors[3:]])
    # The cotangent is rounded too.
    assert largest_error([x.float() for x in found], expected) < 2**-7


def test_autocast_changes_nothing():
    tensors = inputs(5, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(gated_norm_blend, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, with_gradients(gated_norm_blend, tensors), strict=True))


def test_the_inputs_alone_are_kept_for_the_backward_pass():
    tensors = [x.requires_grad_() for x in inputs(7, 5)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        gated_norm_blend(*tensors)
    assert sum(kept) == sum(x.numel() for x in tensors)


@pytest.mark.untyped
def test_compiles_and_keeps_what_it_promises_to_torch():
    tensors = [x.requires_grad_() for x in inputs(3, 4)]
    torch.library.opcheck(torch.ops.gatewise.gated_norm_blend.default, (*tensors, 1e-6))
    compiled = torch.compile(gated_norm_blend, fullgraph=True, backend="aot_eager")
    expected = with_gradients(gated_norm_blend, tensors)
    assert largest_error(with_gradients(compiled, tensors), expected) < 1e-13


@pytest.mark.untyped
def test_compiled_half_precision_has_wide_sums_too():
    far, near, logits, *weights = inputs(5, 4, width=16, dtype=torch.float32)
    half = [x.bfloat16() for x in (far, near, logits)]
    compiled = torch.compile(gated_norm_blend, fullgraph=True, backend="aot_eager")(*half, *weights)
    assert compiled.dtype == torch.bfloat16
    expected = gated_norm_blend(*(x.float() for x in half), *weights)
    assert (compiled.float() - expected).abs().max() < 2**-7 * expected.abs().max()


X = torch.zeros


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"near": X(2, 5)}, "near must have the shape of far, (2, 6), not (2, 5)"),
        ({"logits": X(6)}, "logits must have the shape of far, (2, 6), not (6,)"),
        ({"far_weight": X(1)}, "far_weight must have one entry per channel, 6, not (1,)"),
        ({"near": X(2, 6, dtype=torch.int64)}, "near must have a floating-point dtype, not torch.int64"),
    ],
)
def test_wrong_input_is_refused(changes, message):
    names = ("far", "near", "logits", "far_weight", "near_weight")
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_norm_blend(**dict(zip(names, inputs(2), strict=True)) | changes)
