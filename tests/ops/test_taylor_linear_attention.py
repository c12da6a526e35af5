"""Taylor linear attention: the linear view against the quadratic one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import taylor_linear_attention as module
from gatewise.ops.taylor_linear_attention import (
    taylor_features,
    taylor_linear_attention,
    taylor_linear_attention_reference,
)


def inputs(batch: int, time: int, heads: int, features: int, value_dim: int, dtype: torch.dtype = torch.float64):
    q, k = (torch.randn(batch, time, heads, features, dtype=dtype) for _ in range(2))
    return q, k, torch.randn(batch, time, heads, value_dim, dtype=dtype)


@settings(max_examples=20, deadline=None)
@given(features=st.integers(1, 9))
def test_features_expand_the_exponential_to_second_order(features):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, features, dtype=torch.float64)
    s = (q * k).sum(-1) / features**0.5
    expanded = (taylor_features(q) * taylor_features(k)).sum(-1)
    assert torch.allclose(expanded, 1 + s + s**2 / 2, atol=1e-12)
    assert taylor_features(q).shape[-1] == 1 + features + features * (features + 1) // 2


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("time", [1, 4, 11])
def test_linear_view_equals_the_quadratic_one(monkeypatch, chunk, time):
    monkeypatch.setattr(module, "CHUNK", chunk)
    tensors = [t.requires_grad_() for t in inputs(2, time, 2, 3, 4)]
    y, expected = taylor_linear_attention(*tensors)[0], taylor_linear_attention_reference(*tensors)
    assert torch.allclose(y, expected, atol=1e-12)
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    assert all(torch.allclose(f, w, atol=1e-11) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize("sizes", [[1] * 10, [3, 7], [1, 8, 1]])
def test_continued_equals_whole(monkeypatch, sizes):
    monkeypatch.setattr(module, "CHUNK", 4)
    tensors = inputs(2, 10, 2, 3, 4)
    state, outputs = None, []
    for piece in zip(*(t.split(sizes, 1) for t in tensors), strict=True):
        y, state = taylor_linear_attention(*piece, state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), taylor_linear_attention_reference(*tensors), atol=1e-12)
    assert state.shape == (2, 2, 10, 5)


def test_half_precision_is_summed_in_float32():
    tensors = [t.bfloat16() for t in inputs(2, 70, 1, 4, 8, torch.float32)]
    y, state = taylor_linear_attention(*tensors)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, taylor_linear_attention(*(t.float() for t in tensors))[0].bfloat16())


def test_autocast_does_not_round_the_sums():
    tensors = inputs(2, 70, 1, 4, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = taylor_linear_attention(*tensors)
    assert torch.equal(y, taylor_linear_attention(*tensors)[0])


@pytest.mark.untyped
def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(1, 3, 2, 3, 4)
    with pytest.raises(ValueError, match=r"expected q and k \(B, T, H, f\)"):
        taylor_linear_attention(q, k, v[:, :2])
