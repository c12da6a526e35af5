"""The parts of quantization by themselves: integer arithmetic against worked numbers, and observers of ranges."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from gatewise.efficiency.quantization.calibration import AveragedMinMax, Histogram, make_observer
from gatewise.efficiency.quantization.integer import (
    fixed_point,
    integer_conv2d,
    largest_accumulator,
    multiply_fixed,
    quantize_bias,
)
from gatewise.errors import Failure
from gatewise.ops.quantize import Grid, affine_grid, dequantize, fake_quantize, weight_grid
from gatewise.ops.quantize import quantize as to_codes
from tests.conftest import FINGERPRINTS

# Integer arithmetic


def test_integer_convolution_gives_the_worked_numbers():
    worked = json.loads((FINGERPRINTS / "quantization" / "integer-conv.json").read_text())
    x, weight, bias = (torch.tensor(worked["inputs"][key], dtype=torch.float64) for key in ("x", "W", "b"))
    out = worked["outputs"]
    input_grid, grid = affine_grid(x.min(), x.max()), weight_grid(weight)
    bias_codes = quantize_bias(bias, input_grid, grid)
    assert float(input_grid.scale) == pytest.approx(out["x_scale"], rel=1e-14)
    assert grid.scale.tolist() == pytest.approx(out["w_scales"], rel=1e-14)
    assert to_codes(weight, grid).tolist() == out["w_q"]
    assert bias_codes.tolist() == out["b_q"]
    output_grid = Grid(
        torch.tensor(out["y_scale"], dtype=torch.float64), torch.tensor(out["y_zero_point"], dtype=torch.int32), 0, 255
    )
    accumulator, codes = integer_conv2d(
        to_codes(x, input_grid), input_grid, to_codes(weight, grid), grid, bias_codes, output_grid
    )
    assert accumulator.tolist() == out["acc_int32"]
    assert codes.tolist() == out["y_q"]
    torch.testing.assert_close(dequantize(codes, output_grid), torch.tensor(out["y_dequant"], dtype=torch.float64))
    pairs = [fixed_point(value) for value in (input_grid.scale * grid.scale / output_grid.scale).tolist()]
    assert [pair[0] for pair in pairs] == out["multiplier_q31"]
    assert [pair[1] for pair in pairs] == out["right_shift"]


@pytest.mark.parametrize("multiplier", [1.0, 0.75, 1e-4, 0.9999999999, 3.7])
def test_fixed_point_multiplies_as_float_does(multiplier):
    fixed, shift = fixed_point(multiplier)
    assert 2**30 <= fixed < 2**31
    sums = torch.arange(-2000, 2001)
    found = multiply_fixed(sums, torch.tensor(fixed), torch.tensor(shift))
    # A multiplier of 31 bits is off by 2^-31 of itself, far less than a code for sums of this size; ties may turn.
    assert (found - (sums.double() * multiplier)).abs().max() <= 0.5 + 1e-5
    assert torch.equal(multiply_fixed(sums, *map(torch.tensor, fixed_point(0.5))), (sums / 2).round().long())


def test_fixed_point_refuses_what_has_none():
    with pytest.raises(ValueError, match="positive and finite, not 0"):
        fixed_point(0)
    with pytest.raises(ValueError, match="shifts must be in"):
        multiply_fixed(torch.ones(1), *map(torch.tensor, fixed_point(1e-12)))


def test_padding_is_real_zero_and_sums_beyond_32_bits_are_refused():
    input_grid = affine_grid(torch.tensor(-1.0), torch.tensor(3.0))
    weight = torch.randn(2, 3, 3, 3)
    grid = weight_grid(weight)
    codes = to_codes(torch.rand(1, 3, 5, 5) * 4 - 1, input_grid)
    zeros = torch.zeros(2, dtype=torch.int64)
    wide = Grid(torch.tensor(0.05), torch.tensor(128, dtype=torch.int32), 0, 255)
    accumulator, _ = integer_conv2d(
        codes, input_grid, to_codes(weight, grid), grid, zeros, wide, padding=1, groups=1, stride=2
    )
    exact = nn.functional.conv2d(
        dequantize(codes, input_grid).double(), dequantize(to_codes(weight, grid), grid).double(), None, 2, 1
    )
    steps = (input_grid.scale * grid.scale).double()[:, None, None]
    torch.testing.assert_close(accumulator * steps, exact, rtol=1e-5, atol=1e-6)
    with pytest.raises(Failure, match="beyond 32 bits"):
        integer_conv2d(codes, input_grid, to_codes(weight, grid), grid, torch.full((2,), 2**31), wide)
    with pytest.raises(ValueError, match="symmetric weights"):
        integer_conv2d(codes, input_grid, codes, input_grid, zeros, wide)


def test_the_bound_on_sums_is_reached_and_not_passed():
    input_grid = affine_grid(torch.tensor(0.0), torch.tensor(1.0))
    codes = torch.full((1, 66_311), 127)
    assert largest_accumulator(codes, torch.zeros(1, dtype=torch.int64), input_grid) <= 2**31 - 1
    longer = torch.full((1, 66_312), 127)
    assert largest_accumulator(longer, torch.zeros(1, dtype=torch.int64), input_grid) > 2**31 - 1


# Observers


def observed(observer, *pieces):
    for piece in pieces:
        observer.observe(piece.astype(np.float32))
        observer.end_batch()
    return observer.range()


def test_observers_choose_the_ranges_they_are_named_for():
    values = np.random.RandomState(0).standard_normal(200_000)
    first, second = values[:100_000], values[100_000:]
    assert observed(make_observer("min-max", 8), first, second) == pytest.approx((values.min(), values.max()), rel=1e-6)
    low, high = observed(make_observer("averaged", 8), first, second)
    assert low == pytest.approx((first.min() + second.min()) / 2, rel=1e-6)
    assert high == pytest.approx((first.max() + second.max()) / 2, rel=1e-6)
    ends = observed(make_observer("percentile", 8), first, second)
    # Within a bin, a four-thousandth of the range, values are taken as evenly spread.
    assert ends == pytest.approx(tuple(np.percentile(values, [0.01, 99.99])), abs=0.01)


def test_pieces_of_a_batch_are_averaged_as_one():
    observer = AveragedMinMax()
    for values in ([0, 1], [2, 5]):
        observer.observe(np.asarray(values))
    observer.end_batch()
    observer.observe(np.asarray([0.0, 1.0]))
    observer.end_batch()
    assert observer.range() == (0, 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_least_squares_range_is_the_best_of_all(bits):
    values = np.random.RandomState(0).laplace(size=100_000)

    def error(ends):
        grid = affine_grid(torch.tensor(ends[0]), torch.tensor(ends[1]), bits)
        x = torch.from_numpy(values)
        return (fake_quantize(x, grid) - x).square().mean().item()

    chosen = error(observed(make_observer("mse", bits), values))
    full = np.asarray([values.min(), values.max()])
    tried = [error((full * part).tolist()) for part in np.linspace(0.1, 1, 30)]
    # The error inside is taken as that of an even spread, which it nearly is.
    assert chosen <= 1.05 * min(tried)


def test_entropy_leaves_out_a_rare_outlier():
    values = np.append(np.random.RandomState(0).standard_normal(100_000), 100.0)
    low, high = observed(make_observer("entropy", 8), values)
    assert -6 < low < -1
    assert 3 < high < 30


def test_zeros_of_a_relu_do_not_narrow_the_range():
    values = np.random.RandomState(0).standard_normal(100_000)
    _, both = observed(make_observer("entropy", 8), np.maximum(values, 0))
    _, alone = observed(make_observer("entropy", 8), values[values > 0])
    assert both == alone


def test_a_histogram_that_grows_counts_exactly():
    random = np.random.RandomState(0)
    pieces = [random.standard_normal(1000) * scale for scale in (0.0, 1e-3, 1.0, 30.0, 0.1, 1000.0)]
    pieces[2][:100] = 0
    histogram = Histogram()
    for piece in pieces:
        histogram.observe(piece)
    edges, values = histogram.edges(), np.concatenate(pieces)
    expected = np.histogram(values[values != 0], bins=edges)[0]
    assert (histogram._counts.sum(), histogram._zeros) == (4900, 1100)
    # A value on an edge may be counted on either side of it.
    assert np.abs(histogram._counts - expected).sum() <= 4
    assert 0.0 in edges


def test_constant_tensors_have_a_range():
    for method in ("min-max", "averaged", "percentile", "mse", "entropy"):
        assert observed(make_observer(method, 8), np.zeros(10)) == (0, 0)
        low, high = observed(make_observer(method, 8), np.full(10, 2.0))
        grid = affine_grid(torch.tensor(low), torch.tensor(high))
        assert float(fake_quantize(torch.tensor(2.0), grid)) == pytest.approx(2.0, rel=0.02)
