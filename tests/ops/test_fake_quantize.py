"""Rounding to a few levels with straight-through gradients."""

from __future__ import annotations

import pytest
import torch

from gatewise.ops.fake_quantize import INT8_PER_TOKEN, TERNARY, QuantizationRule, fake_quantize, quantize


def test_ternary_codes_round_at_half_the_mean_magnitude():
    x = torch.tensor([[2.0, -2.0, 0.4], [0.6, -0.5, 0.5]])
    codes, scale = quantize(x, TERNARY)
    assert scale.item() == pytest.approx(1.0)
    # Ties go to the even code: 0.
    assert codes.tolist() == [[1, -1, 0], [1, 0, 0]]


def test_scale_is_the_largest_magnitude_of_each_token():
    x = torch.tensor([[[1.0, -2.0], [0.0, 0.5]]])
    codes, scale = quantize(x, INT8_PER_TOKEN)
    torch.testing.assert_close(scale, torch.tensor([[[2 / 127], [0.5 / 127]]]))
    assert codes.tolist() == [[[64, -127], [0, 127]]]


@pytest.mark.parametrize(
    ("granularity", "group_size", "shape"),
    [("tensor", None, (1, 1)), ("channel", None, (3, 1)), ("token", None, (3, 1))],
)
def test_what_shares_a_scale(granularity, group_size, shape):
    rule = QuantizationRule(-7, 7, "absmax", granularity, group_size)
    assert quantize(torch.randn(3, 8), rule)[1].shape == shape


def test_groups_have_scales_of_their_own():
    x = torch.tensor([[1.0, 2.0, 30.0, 40.0]])
    codes, scale = quantize(x, QuantizationRule(-4, 4, "absmax", "group", 2))
    torch.testing.assert_close(scale, torch.tensor([[0.5, 0.5, 10.0, 10.0]]))
    assert codes.tolist() == [[2, 4, 3, 4]]


def test_gradient_passes_straight_through():
    x = (3 * torch.randn(4, 5)).requires_grad_()
    cotangent = torch.randn(4, 5)
    fake_quantize(x, TERNARY).backward(cotangent)
    assert torch.equal(x.grad, cotangent)


def test_half_precision_is_quantized_in_float32():
    x = torch.randn(64, 64).bfloat16()
    expected, scale = quantize(x.float(), TERNARY)
    codes, half_scale = quantize(x, TERNARY)
    assert torch.equal(codes, expected)
    assert torch.equal(half_scale, scale)
    assert fake_quantize(x, TERNARY).dtype == torch.bfloat16


def test_zeros_have_a_scale():
    codes, scale = quantize(torch.zeros(2, 2), TERNARY)
    assert scale.item() == pytest.approx(1e-5)
    assert not codes.any()


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(FloatingPointError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]), TERNARY)


def test_groups_must_divide_the_row():
    with pytest.raises(ValueError, match="groups of 3 do not divide the last axis of 8"):
        quantize(torch.randn(2, 8), QuantizationRule(-7, 7, "absmax", "group", 3))


def test_group_size_belongs_to_groups():
    with pytest.raises(ValueError, match="group_size belongs"):
        QuantizationRule(-7, 7, "absmax", "tensor", 3)


@pytest.mark.untyped
def test_compiles_whole():
    x = torch.randn(8, 8, requires_grad=True)
    compiled = torch.compile(lambda x: fake_quantize(x, TERNARY).square().sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fake_quantize(x, TERNARY).square().sum())
