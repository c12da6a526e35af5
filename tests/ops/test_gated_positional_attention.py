"""Gated positional attention: its factors against the definition, values, gradients and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.gated_positional_attention import (
    gated_positional_attention,
    gated_positional_attention_reference,
    gated_positional_weights,
    offsets,
    position_factors,
    position_weights,
)


def make(batch=2, height=3, width=5, heads=2, channels=4, value_dim=3, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    size = (batch, height, width, heads)
    return normal(*size, channels), normal(*size, channels), normal(*size, value_dim), normal(heads, 3), normal(heads)


def results(function, tensors, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    heads=st.integers(1, 4),
    scale=st.sampled_from([None, 0.3]),
)
def test_values_and_gradients_equal_the_definition(batch, height, width, heads, scale):
    tensors = make(batch, height, width, heads)
    found = results(gated_positional_attention, tensors, scale=scale)
    expected = results(gated_positional_attention_reference, tensors, scale=scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-11)


def test_layouts_in_memory_do_not_matter():
    q, k, v, weights, gates = make()
    apart = [torch.stack([x, x], dim=-1)[..., 0] for x in (q, k, v)]
    torch.testing.assert_close(
        gated_positional_attention(*apart, weights, gates), gated_positional_attention(q, k, v, weights, gates)
    )


def test_two_softmaxes_make_the_one_over_the_grid():
    weights = torch.randn(3, 3, dtype=torch.float64)
    rows, columns = position_factors(weights, (4, 6))
    product = torch.einsum("hyi,hxj->hyxij", rows, columns).flatten(3).flatten(1, 2)
    torch.testing.assert_close(product, position_weights(weights, (4, 6)))


def test_offsets_go_from_query_to_key_columns_first():
    found = offsets((2, 3))
    assert found[0].tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 4], [0, 1, 1], [1, 1, 2], [2, 1, 5]]
    assert found[5, 0].tolist() == [-2, -1, 5]


def test_open_gates_leave_one_term():
    q, k, v, weights, _ = make()
    content = gated_positional_attention(q, k, v, weights, torch.full((2,), -60.0, dtype=torch.float64))
    torch.testing.assert_close(
        content, gated_positional_attention(q, k, v, 0 * weights, torch.full((2,), -60.0).double())
    )
    position = gated_positional_attention(q, k, v, weights, torch.full((2,), 60.0, dtype=torch.float64))
    torch.testing.assert_close(
        position, gated_positional_attention(0 * q, k, v, weights, torch.full((2,), 60.0).double())
    )


def test_a_bias_changes_nothing_and_gets_nothing():
    tensors = make()
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    y = gated_positional_attention(*tensors, bias=bias)
    torch.testing.assert_close(y, gated_positional_attention(*tensors))
    y.sum().backward()
    assert bias.grad.abs().max() < 1e-12


def test_rows_of_the_blend_sum_to_one():
    q, k, _, weights, gates = make()
    torch.testing.assert_close(gated_positional_weights(q, k, weights, gates).sum(-1), torch.ones(2, 2, 15).double())


def test_far_positions_survive_half_precision():
    # At a distance of 40 the square is 1600; bf16 holds integers up to 256.
    q, k, v, weights, gates = make(1, 1, 41, 1, dtype=torch.bfloat16)
    weights = torch.tensor([[80.0, 0.0, -1.0]], dtype=torch.bfloat16)
    gates = torch.full((1,), 60.0, dtype=torch.bfloat16)
    y = gated_positional_attention(q, k, v, weights, gates)
    assert y.dtype == torch.bfloat16
    # The first query's attention peaks at the last column.
    assert torch.allclose(y[0, 0, 0, 0], 0.564 * v[0, 0, 40, 0] + 0.436 * v[0, 0, 39, 0], atol=0.6)
    expected = gated_positional_attention_reference(*(x.double() for x in (q, k, v, weights, gates)))
    assert (y.double() - expected).abs().max() < 0.02 * expected.abs().max()


def test_no_map_of_positions_by_positions_is_kept():
    q, k, v, weights, gates = (x.float().requires_grad_() for x in make(1, 32, 32, 2, 4, 4))
    largest = 0

    def pack(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_positional_attention(q, k, v, weights, gates)
    assert largest < 1024**2 / 16


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 5, 2, 5)}, "q and k alike"),
        ({2: torch.zeros(2, 3, 4, 2, 5)}, "must be .batch, height, width"),
        ({3: torch.zeros(2, 2)}, r"2 heads need weights \(2, 3\)"),
        ({4: torch.zeros(3)}, r"gates \(2,\), not \(2, 3\) and \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    tensors = [change.get(index, tensor) for index, tensor in enumerate(make())]
    with pytest.raises(ValueError, match=message):
        gated_positional_attention(*tensors)
