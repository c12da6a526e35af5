"""Causal attention with masks and with visible weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.layers.causal_attention import causal_attention
from gatewise.layers.masked_attention import attention_weights, masked_attention


def attention_by_the_definition(q, k, v, visible, bias):
    """Query by query; zeros where nothing may be seen."""
    batch, queries, heads, width = q.shape
    group = heads // k.shape[2]
    y = torch.zeros(batch, queries, heads, v.shape[-1], dtype=q.dtype)
    for b in range(batch):
        for t in range(queries):
            for h in range(heads):
                seen = visible[b, h, t].nonzero()[:, 0]
                if len(seen):
                    scores = k[b, seen, h // group] @ q[b, t, h] * width**-0.5 + bias[b, h, t, seen]
                    y[b, t, h] = scores.softmax(0) @ v[b, seen, h // group]
    return y


def inputs(batch, queries, keys, heads, kv_heads):
    q = torch.randn(batch, queries, heads, 4, dtype=torch.float64)
    k, v = torch.randn(2, batch, keys, kv_heads, 4, dtype=torch.float64)
    return q, k, v


def causal(batch, heads, queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, heads, -1, -1)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 4),
    cached=st.integers(0, 3),
    group=st.integers(1, 2),
    per_head=st.booleans(),
    kept=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_masks_of_both_kinds_follow_the_definition(batch, queries, cached, group, per_head, kept):
    torch.manual_seed(0)
    keys, heads = queries + cached, 2 * group
    q, k, v = inputs(batch, queries, keys, heads, 2)
    shape = (batch, heads if per_head else 1, queries, keys)
    allowed = torch.rand(shape) < kept
    visible = causal(batch, heads, queries, keys) & allowed
    none = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    torch.testing.assert_close(masked_attention(q, k, v, allowed), attention_by_the_definition(q, k, v, visible, none))
    added = torch.randn(shape, dtype=torch.float64)
    hiding = added.masked_fill(~allowed, float("-inf"))
    expected = attention_by_the_definition(q, k, v, visible, none + added)
    torch.testing.assert_close(masked_attention(q, k, v, hiding), expected)


def test_rows_that_see_nothing_have_no_nan_in_gradients_either():
    q, k, v = (x.requires_grad_() for x in inputs(1, 3, 3, 2, 1))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[:2] = False
    y = masked_attention(q, k, v, mask)
    y.sum().backward()
    assert torch.equal(y[:, :2], torch.zeros_like(y[:, :2]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert torch.equal(q.grad[:, :2], torch.zeros_like(q.grad[:, :2]))


@pytest.mark.parametrize("window", [None, 2])
def test_weights_times_values_are_the_attention(window):
    q, k, v = inputs(2, 4, 7, 4, 2)
    weights = attention_weights(q, k, window=window, scale=0.3)
    y = torch.einsum("bhts,bshd->bthd", weights, v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(y, causal_attention(q, k, v, window=window, scale=0.3))


def test_weights_are_float32_for_half_precision():
    q, k, _ = inputs(1, 3, 3, 2, 1)
    assert attention_weights(q.bfloat16(), k.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(3, 4, dtype=torch.bool),
            r"broadcast to \(batch, heads, queries, keys\) = \(1, 2, 3, 3\), not \(3, 4\)",
        ),
        (torch.ones(1, 1, 1, 1, 3, dtype=torch.bool), r"not \(1, 1, 1, 1, 3\)"),
        (torch.ones(3, 3, dtype=torch.long), "booleans or numbers to add, not torch.int64"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        masked_attention(*inputs(1, 3, 3, 2, 1), mask)
