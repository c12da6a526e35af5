"""The weighted average of RWKV-4 against its definition and against worked numbers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.weighted_key_value import weighted_key_value, weighted_key_value_reference
from tests.conftest import FINGERPRINTS


def inputs(batch: int, time: int, dim: int, dtype: torch.dtype = torch.float64, scale: float = 3.0):
    k, v = scale * torch.randn(batch, time, dim, dtype=dtype), torch.randn(batch, time, dim, dtype=dtype)
    return k, v, -torch.randn(dim, dtype=dtype).exp(), torch.randn(dim, dtype=dtype)


@pytest.mark.parametrize("function", [weighted_key_value, weighted_key_value_reference])
def test_worked_numbers(function):
    record = json.loads((FINGERPRINTS / "zoology" / "rwkv4_wkv_worked.json").read_text())
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in record["inputs"].items()}
    y = function(given["k"], given["v"], -given["time_decay"].exp(), given["time_first"])
    y = y[0] if isinstance(y, tuple) else y
    assert torch.allclose(y, torch.tensor(record["outputs"]["y"], dtype=torch.float64), rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), time=st.integers(1, 50), dim=st.integers(1, 5))
def test_equals_the_direct_sum_for_any_length(batch, time, dim):
    torch.manual_seed(0)
    tensors = inputs(batch, time, dim)
    assert torch.allclose(weighted_key_value(*tensors)[0], weighted_key_value_reference(*tensors), atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [1, 10, 1]])
def test_continued_equals_whole(sizes):
    k, v, decay, bonus = inputs(2, 12, 3)
    state, outputs = None, []
    for k_piece, v_piece in zip(k.split(sizes, 1), v.split(sizes, 1), strict=True):
        y, state = weighted_key_value(k_piece, v_piece, decay, bonus, state)
        outputs.append(y)
    assert torch.allclose(torch.cat(outputs, 1), weighted_key_value_reference(k, v, decay, bonus), atol=1e-12)


def test_gradients_are_those_of_the_direct_sum():
    tensors = [t.requires_grad_() for t in inputs(2, 20, 3)]
    weights = torch.randn(2, 20, 3, dtype=torch.float64)
    found = torch.autograd.grad((weighted_key_value(*tensors)[0] * weights).sum(), tensors)
    expected = torch.autograd.grad((weighted_key_value_reference(*tensors) * weights).sum(), tensors)
    assert all(torch.allclose(f, e, rtol=1e-9, atol=1e-12) for f, e in zip(found, expected, strict=True))


def test_gradients_flow_through_the_state():
    k, v, decay, bonus = (t.requires_grad_() for t in inputs(1, 6, 2))

    def in_two_parts(*tensors):
        k, v, *rest = tensors
        first, state = weighted_key_value(k[:, :3], v[:, :3], *rest)
        second, _ = weighted_key_value(k[:, 3:], v[:, 3:], *rest, state)
        return torch.cat([first, second], dim=1)

    assert torch.autograd.gradcheck(in_two_parts, (k, v, decay, bonus))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
@pytest.mark.parametrize("decay", [0.0, -1e-3, -50.0, -1e6])
def test_nothing_overflows(shift, decay):
    k, v, _, bonus = inputs(2, 200, 3, torch.float32, scale=30.0)
    w = torch.full((3,), decay)
    y, _ = weighted_key_value(k + shift, v, w, bonus)
    expected = weighted_key_value_reference((k + shift).double(), v.double(), w.double(), bonus.double())
    # Exponents of a few hundred carry rounding of 3e-5 in float32.
    assert torch.allclose(y.double(), expected, rtol=0, atol=1e-3)


def test_half_precision_is_summed_in_float32():
    tensors = [t.bfloat16() for t in inputs(2, 40, 4, torch.float32)]
    y, state = weighted_key_value(*tensors)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, weighted_key_value(*(t.float() for t in tensors))[0].bfloat16())


@pytest.mark.untyped
def test_impossible_inputs_are_refused():
    k, v, decay, bonus = inputs(1, 3, 2)
    with pytest.raises(ValueError, match=r"expected k and v \(B, T, D\)"):
        weighted_key_value(k, v[:, :2], decay, bonus)
    with pytest.raises(ValueError, match="at most 0, not 1.0"):
        weighted_key_value(k, v, torch.ones_like(decay), bonus)
