"""The selective scan against its recurrence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import selective_scan as module
from gatewise.ops.selective_scan import selective_scan, selective_scan_reference


def inputs(batch: int, time: int, dim: int, state: int, dtype: torch.dtype = torch.float64):
    x = torch.randn(batch, time, dim, dtype=dtype)
    dt = torch.rand(batch, time, dim, dtype=dtype)
    a = -4 * torch.rand(dim, state, dtype=dtype)
    return x, dt, a, torch.randn(batch, time, state, dtype=dtype), torch.randn(batch, time, state, dtype=dtype)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), time=st.integers(1, 30), dim=st.integers(1, 4), state=st.integers(1, 4))
def test_equals_the_recurrence_for_any_length(batch, time, dim, state):
    torch.manual_seed(0)
    tensors = inputs(batch, time, dim, state)
    assert torch.allclose(selective_scan(*tensors)[0], selective_scan_reference(*tensors), atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 4, 7, 100])
def test_segments_of_any_size_give_values_and_gradients_of_the_recurrence(monkeypatch, tokens):
    monkeypatch.setattr(module, "_SEGMENT", tokens * 2 * 3 * 5)
    tensors = [t.requires_grad_() for t in inputs(2, 21, 3, 5)]
    weights = torch.randn(2, 21, 3, dtype=torch.float64)
    y = selective_scan(*tensors)[0]
    expected = selective_scan_reference(*tensors)
    assert torch.allclose(y, expected, atol=1e-12)
    found = torch.autograd.grad((y * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected * weights).sum(), tensors)
    assert all(torch.allclose(f, w, rtol=1e-9, atol=1e-12) for f, w in zip(found, wanted, strict=True))


def test_gradients_flow_from_and_to_the_state():
    tensors = [t.requires_grad_() for t in inputs(1, 4, 2, 3)]
    state = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(selective_scan, (*tensors, state))


@pytest.mark.parametrize("sizes", [[1] * 9, [4, 5]])
def test_continued_equals_whole(sizes):
    x, dt, a, b, c = inputs(2, 9, 3, 4)
    state, outputs = None, []
    for x_piece, dt_piece, b_piece, c_piece in zip(*(t.split(sizes, 1) for t in (x, dt, b, c)), strict=True):
        y, state = selective_scan(x_piece, dt_piece, a, b_piece, c_piece, state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), selective_scan_reference(x, dt, a, b, c), atol=1e-12)


def test_inputs_need_not_be_contiguous():
    x, dt, a, b, c = inputs(2, 9, 3, 4)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dt, a, b, c)]
    assert torch.allclose(selective_scan(*strided)[0], selective_scan_reference(x, dt, a, b, c), atol=1e-12)


def test_half_precision_is_scanned_in_float32():
    tensors = [t.bfloat16() for t in inputs(2, 20, 4, 4, torch.float32)]
    y, state = selective_scan(*tensors)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, selective_scan(*(t.float() for t in tensors))[0].bfloat16())


@pytest.mark.untyped
def test_operator_is_registered_as_compilers_need_it():
    x, dt, a, b, c = inputs(2, 7, 3, 4)
    arguments = (x, dt, a.t().contiguous(), b, c, torch.randn(2, 4, 3, dtype=torch.float64))
    torch.library.opcheck(
        torch.ops.gatewise.selective_scan.default, tuple(t.detach().requires_grad_() for t in arguments)
    )


@pytest.mark.untyped
def test_shapes_that_do_not_fit_are_refused():
    x, dt, a, b, c = inputs(2, 7, 3, 4)
    for wrong in ((x, dt[:, :6], a, b, c), (x, dt, a.t(), b, c), (x, dt, a, b, c[:, :6])):
        with pytest.raises(ValueError, match=r"expected x and dt \(B, T, D\)"):
            selective_scan(*wrong)
