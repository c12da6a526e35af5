"""Long causal convolution against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.long_convolution import long_convolution, long_convolution_reference


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    time=st.integers(1, 17),
    taps=st.integers(1, 20),
    dim=st.integers(1, 4),
)
def test_transform_equals_the_direct_sum(batch, time, taps, dim):
    torch.manual_seed(0)
    x = torch.randn(*batch, time, dim, dtype=torch.float64)
    filters = torch.randn(taps, dim, dtype=torch.float64)
    assert torch.allclose(long_convolution(x, filters), long_convolution_reference(x, filters), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 4, 8])
@pytest.mark.parametrize("taps", [3, 9, 30])
def test_continued_equals_whole(cut, taps):
    x, filters = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(taps, 3, dtype=torch.float64)
    whole = long_convolution_reference(x, filters)
    assert torch.allclose(long_convolution(x[:, cut:], filters, x[:, :cut]), whole[:, cut:], rtol=0, atol=1e-12)


def test_gradients_are_right():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    filters = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    past = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(long_convolution, (x, filters, past))
    assert torch.autograd.gradcheck(long_convolution, (x[:, :1], filters, past))


def test_inputs_need_not_be_contiguous():
    x, filters = torch.randn(2, 3, 9).transpose(1, 2), torch.randn(3, 9).t()
    # Float32: rounding of transforms of 18 values.
    assert torch.allclose(long_convolution(x, filters), long_convolution_reference(x, filters), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x, filters = torch.randn(2, 33, 4).to(dtype), torch.randn(33, 4).to(dtype)
    y = long_convolution(x, filters)
    assert y.dtype == dtype
    assert torch.equal(y, long_convolution(x.float(), filters.float()).to(dtype))


@pytest.mark.untyped
def test_a_filter_per_channel_is_needed():
    with pytest.raises(ValueError, match="3 channels, taps"):
        long_convolution(torch.randn(1, 4, 3), torch.randn(4, 2))
