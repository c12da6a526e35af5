"""Quantizers: the worked numbers, real zero, gradients, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops.quantize import (
    Grid,
    affine_grid,
    code_range,
    dequantize,
    fake_quantize,
    quantize,
    signal_to_noise,
    symmetric_grid,
    weight_grid,
)
from tests.conftest import FINGERPRINTS

RECORD = json.loads((FINGERPRINTS / "quantization" / "quantizers.json").read_text())
OUTPUTS = RECORD["outputs"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


X, W = tensor(RECORD["inputs"]["x"]), tensor(RECORD["inputs"]["w"])


def assert_same(grid: Grid, x, expected) -> None:
    torch.testing.assert_close(grid.scale, tensor(expected["scale"]), rtol=1e-14, atol=0)
    assert int(grid.zero_point) == expected["zero_point"]
    codes = quantize(x, grid)
    assert codes.tolist() == expected["q"]
    torch.testing.assert_close(dequantize(codes, grid), tensor(expected["dequant"]), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("bits", [8, 4])
def test_affine_and_symmetric_quantizers_give_the_worked_numbers(bits):
    assert_same(affine_grid(X.min(), X.max(), bits), X, OUTPUTS[f"asymmetric per-tensor uint{bits}"])
    assert_same(symmetric_grid(X.abs().max(), bits), X, OUTPUTS[f"symmetric per-tensor int{bits} narrow"])


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_per_channel_and_per_tensor_give_the_worked_numbers(bits):
    expected = OUTPUTS[f"weights symmetric per-channel int{bits} narrow"]
    grid = weight_grid(W, bits)
    torch.testing.assert_close(grid.scale, tensor(expected["scales"]), rtol=1e-14, atol=0)
    assert quantize(W, grid).tolist() == expected["q"]
    noise = [signal_to_noise(row, new) for row, new in zip(W, fake_quantize(W, grid), strict=True)]
    assert noise == pytest.approx(expected["sqnr_db_per_channel"], rel=1e-9)
    expected = OUTPUTS[f"weights symmetric per-tensor int{bits} narrow"]
    grid = weight_grid(W, bits, per_channel=False)
    torch.testing.assert_close(grid.scale, tensor(expected["scale"]), rtol=1e-14, atol=0)
    noise = [signal_to_noise(row, new) for row, new in zip(W, fake_quantize(W, grid), strict=True)]
    assert noise == pytest.approx(expected["sqnr_db_per_channel"], rel=1e-9, abs=1e-9)
    grid = weight_grid(W, bits, symmetric=False)
    pairs = [[scale, zero] for scale, zero in zip(grid.scale.tolist(), grid.zero_point.tolist(), strict=True)]
    for pair, expected_pair in zip(
        pairs, OUTPUTS[f"weights asymmetric per-channel uint{bits}"]["scale_zero_point"], strict=True
    ):
        assert pair == pytest.approx(expected_pair, rel=1e-14)


def test_the_straight_through_gradient_is_the_worked_one():
    expected = OUTPUTS["fake quant range (-1,1.5) uint8"]
    grid = affine_grid(tensor(-1.0), tensor(1.5))
    torch.testing.assert_close(grid.scale, tensor(expected["scale"]), rtol=1e-14, atol=0)
    assert [float(grid.minimum), float(grid.maximum)] == pytest.approx(expected["representable"])
    x = X.clone().requires_grad_()
    y = fake_quantize(x, grid)
    torch.testing.assert_close(y, tensor(expected["forward"]), rtol=1e-14, atol=1e-15)
    y.backward(tensor(expected["grad_out"]))
    torch.testing.assert_close(x.grad, tensor(expected["grad_in"]), rtol=0, atol=0)


def test_the_gradient_passes_at_the_ends_of_the_range_and_not_beyond():
    grid = Grid(torch.tensor(0.5), torch.tensor(2, dtype=torch.int32), 0, 15)
    x = torch.tensor([-1.25, -1.0, 0.0, 6.5, 6.75], requires_grad=True)
    fake_quantize(x, grid).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@settings(max_examples=40, deadline=None)
@given(
    low=st.floats(-50, 50, width=32), high=st.floats(-50, 50, width=32), bits=st.integers(2, 8), signed=st.booleans()
)
def test_real_zero_is_exact_and_errors_stay_within_half_a_step(low, high, bits, signed):
    low, high = min(low, high), max(low, high)
    grid = affine_grid(torch.tensor(low), torch.tensor(high), bits, signed=signed)
    x = torch.linspace(min(low, 0.0), max(high, 0.0), 97)
    assert float(fake_quantize(torch.zeros(()), grid)) == 0.0
    # The zero point is rounded, which moves the ends by half a step at most: values there are off by a step at most.
    assert ((fake_quantize(x, grid) - x).abs() <= 1.001 * grid.scale).all()
    inside = x.clamp(float(grid.minimum), float(grid.maximum))
    assert ((fake_quantize(inside, grid) - inside).abs() <= 0.501 * grid.scale).all()


def test_rounding_is_half_to_even():
    grid = Grid(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -8, 7)
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), grid).tolist() == [0, 2, 2, 0, -2]


def test_zeros_and_constants_are_exact():
    weight = torch.stack([torch.zeros(3, 3), torch.full((3, 3), 0.7)])
    grid = weight_grid(weight)
    assert grid.scale[0] == 1
    assert quantize(weight[:1], weight_grid(weight[:1])).eq(0).all()
    torch.testing.assert_close(fake_quantize(weight, grid), weight)
    flat = torch.full((5,), -2.5)
    torch.testing.assert_close(fake_quantize(flat, affine_grid(flat.min(), flat.max())), flat)
    assert affine_grid(torch.tensor(0.0), torch.tensor(0.0)).scale == 1


def test_any_axis_can_be_the_channels():
    weight = torch.randn(4, 6)
    columns = weight_grid(weight, axis=1)
    assert columns.scale.shape == (6,)
    torch.testing.assert_close(
        fake_quantize(weight, columns), fake_quantize(weight.t(), weight_grid(weight.t())).t(), rtol=0, atol=0
    )


def test_half_precision_is_computed_in_float32():
    x = (torch.rand(500) * 10).to(torch.bfloat16)
    grid = affine_grid(torch.tensor(-3.0), torch.tensor(10.0))
    assert fake_quantize(x, grid).dtype == torch.bfloat16
    assert torch.equal(quantize(x, grid), quantize(x.float(), grid))


@pytest.mark.untyped
def test_fake_quantization_compiles_to_the_same_numbers():
    grid = affine_grid(torch.tensor(-1.0), torch.tensor(1.5))
    x = torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(lambda x: fake_quantize(x, grid).square().sum(), backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(fake_quantize(x, grid).square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_of_2_to_8_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be in 2..8, not {bits}"):
        code_range(bits)


def test_code_ranges():
    assert code_range(8) == (0, 255)
    assert code_range(4, signed=True) == (-8, 7)
    assert code_range(2, signed=True, narrow=True) == (-1, 1)
    with pytest.raises(ValueError, match="only signed codes"):
        code_range(8, narrow=True)


def test_ranges_that_are_not_finite_name_their_tensor():
    with pytest.raises(ValueError, match=r"range of features.3 must be finite"):
        affine_grid(torch.tensor(float("nan")), torch.tensor(1.0), name="features.3")
    with pytest.raises(ValueError, match=r"range of head.weight must be finite"):
        weight_grid(torch.tensor([[1.0, float("inf")]]), name="head.weight")
    with pytest.raises(ValueError, match="must not end below its start"):
        affine_grid(torch.tensor(2.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="does not fit a tensor of shape"):
        quantize(torch.zeros(3, 2), weight_grid(torch.ones(4, 2)))
