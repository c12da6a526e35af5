"""The linear recurrence against its definition, in chunks and token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import linear_recurrence as module
from gatewise.ops.linear_recurrence import linear_recurrence, linear_recurrence_reference


def inputs(batch: int, time: int, *shape: int, shared: bool = False, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    factors = (1, *shape[1:]) if shared else shape
    a = torch.rand(batch, time, *factors, dtype=torch.float64, generator=generator)
    b = torch.randn(batch, time, *shape, dtype=torch.float64, generator=generator)
    return a, b, torch.randn(batch, *shape, dtype=torch.float64, generator=generator)


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 3), time=st.integers(1, 70), dim=st.integers(1, 4), shared=st.booleans())
def test_equals_the_definition_for_any_length(batch, time, dim, shared):
    a, b, initial = inputs(batch, time, 2, dim, shared=shared)
    assert torch.allclose(linear_recurrence(a, b, initial), linear_recurrence_reference(a, b, initial), atol=1e-12)


@pytest.mark.parametrize("small_step", [0, 10**9])
@pytest.mark.parametrize("time", [16, 25, 26])
def test_chunks_and_steps_give_values_and_gradients_of_the_definition(monkeypatch, small_step, time):
    monkeypatch.setattr(module, "_SMALL_STEP", small_step)
    tensors = [t.requires_grad_() for t in inputs(2, time, 2, 3, shared=True)]
    weights = torch.randn(2, time, 2, 3, dtype=torch.float64)
    found = torch.autograd.grad((linear_recurrence(*tensors) * weights).sum(), tensors)
    expected = torch.autograd.grad((linear_recurrence_reference(*tensors) * weights).sum(), tensors)
    assert all(torch.allclose(f, e, atol=1e-12) for f, e in zip(found, expected, strict=True))


def test_gradients_of_gradients_are_right():
    tensors = [t.requires_grad_() for t in inputs(1, 4, 2)]
    assert torch.autograd.gradcheck(linear_recurrence, tensors)
    assert torch.autograd.gradgradcheck(linear_recurrence, tensors)


def test_zero_factors_forget():
    a, b, initial = inputs(2, 40, 3)
    a[:, 20] = 0
    h = linear_recurrence(a, b, initial)
    assert torch.equal(h[:, 20], b[:, 20])
    assert torch.allclose(h[:, 21:], linear_recurrence(a[:, 21:], b[:, 21:], b[:, 20]), atol=1e-12)


@pytest.mark.untyped
def test_operator_is_registered_as_compilers_need_it():
    tensors = [t.requires_grad_() for t in inputs(2, 20, 3)]
    torch.library.opcheck(torch.ops.gatewise.linear_recurrence.default, tuple(tensors))


@pytest.mark.untyped
def test_shapes_that_do_not_fit_are_refused():
    a, b, initial = inputs(2, 5, 3)
    for wrong in ((a[:, :4], b, initial), (a[..., :2], b, initial), (a, b, initial[:1]), (a[..., None], b, initial)):
        with pytest.raises(ValueError, match="expected a and b"):
            linear_recurrence(*wrong)
