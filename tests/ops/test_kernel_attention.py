"""Linear attention with kernel features: values, gradients, ranges and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.kernel_attention import kernel_attention, kernel_attention_reference


def make(batch=2, tokens=7, heads=2, channels=4, value_dim=3, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)

    def normal(dim):
        return torch.randn((batch, tokens, heads, dim), generator=draw, dtype=torch.float64)

    q, k = normal(channels).abs(), normal(channels).abs()
    return [x.to(dtype) for x in (q, k, normal(value_dim), normal(channels), normal(channels))]


def results(function, tensors, turned):
    leaves = [tensor.detach().requires_grad_() for tensor in (tensors if turned else tensors[:3])]
    y = function(*leaves[:3], turned=tuple(leaves[3:]) if turned else None)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
    heads=st.integers(1, 3),
    turned=st.booleans(),
)
def test_values_and_gradients_equal_the_definition(batch, tokens, heads, turned):
    tensors = make(batch, tokens, heads)
    found = results(kernel_attention, tensors, turned)
    expected = results(kernel_attention_reference, tensors, turned)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_weights_without_positions_sum_to_one():
    q, k, *_ = make()
    ones = torch.ones(2, 7, 2, 1, dtype=torch.float64)
    torch.testing.assert_close(kernel_attention(q, k, ones, eps=0.0), ones)


def test_many_tokens_stay_in_the_range_of_half_precision():
    q, k, v, *_ = make(1, 4096, 1, 4, 4, torch.float16)
    y = kernel_attention(100 * q, 100 * k, 100 * v)
    assert y.dtype == torch.float16
    expected = kernel_attention_reference(*(100 * x.double() for x in (q, k, v)))
    assert (y.double() - expected).abs().max() < 0.01 * expected.abs().max()


def test_what_is_kept_grows_with_tokens_alone():
    def largest(tokens):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kernel_attention(*(x.requires_grad_() for x in make(1, tokens)[:3]))
        return max(sizes)

    assert largest(256) == 4 * largest(64)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(2, 7, 2, 5)}, "must all be"),
        ({2: torch.zeros(2, 6, 2, 3)}, "v must be"),
        ({4: torch.zeros(2, 7, 2, 6)}, "must all be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    q, k, v, *turned = [change.get(index, tensor) for index, tensor in enumerate(make())]
    with pytest.raises(ValueError, match=message):
        kernel_attention(q, k, v, turned=tuple(turned))
