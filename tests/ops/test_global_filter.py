"""Global filter: values and gradients of both of its paths, resizing, precision and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.ops.global_filter import global_filter, global_filter_reference, resize_spectrum

SIZES = [(6, 5), (5, 6), (1, 1), (1, 7), (4, 1), (2, 2), (7, 12)]


def make(batch=2, channels=3, size=(6, 5), grid=None, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    grid = (size[0], size[1] // 2 + 1) if grid is None else grid

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return normal(batch, channels, *size), normal(channels, *grid, 2)


def results(function, x, spectrum):
    """Output and gradients for maps and spectrum."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, spectrum)]
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


def assert_all_close(found, expected, tolerance=1e-10):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    grid=st.none() | st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels_last=st.booleans(),
)
def test_values_and_gradients_equal_the_definition(batch, channels, size, grid, channels_last):
    x, spectrum = make(batch, channels, size, grid)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert_all_close(results(global_filter, x, spectrum), results(global_filter_reference, x, spectrum))


def test_non_contiguous_inputs():
    x, spectrum = make(channels=4, size=(5, 6))
    turned = x.transpose(2, 3)[:, ::2], spectrum.transpose(1, 2)[1::2]
    assert_all_close(results(global_filter, *turned), results(global_filter_reference, *turned))


def test_first_and_second_derivatives_are_right():
    tensors = [tensor.requires_grad_() for tensor in make(1, 2, (3, 4), grid=(2, 2))]
    assert torch.autograd.gradcheck(global_filter, tensors)
    assert torch.autograd.gradgradcheck(global_filter, tensors)


class Filter(nn.Module):
    def forward(self, x, spectrum):
        return global_filter(x, spectrum)


@pytest.mark.untyped
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_exported_programs_compute_the_same_without_complex_numbers(size, grid):
    x, spectrum = make(size=size, grid=grid)
    program = torch.export.export(Filter(), (x, spectrum))
    assert not any("fft" in str(node.target) for node in program.graph.nodes)
    assert torch.allclose(program.module()(x, spectrum), global_filter_reference(x, spectrum), rtol=1e-10, atol=1e-10)


@pytest.mark.untyped
def test_exported_gradients_are_right():
    x, spectrum = make(size=(5, 4), grid=(3, 3))
    program = torch.export.export(Filter(), (x, spectrum)).module()
    assert_all_close(results(program, x, spectrum), results(global_filter_reference, x, spectrum))


@pytest.mark.untyped
def test_exported_programs_stay_in_float32_under_autocast():
    x, spectrum = make(dtype=torch.float32, size=(8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.export.export(Filter(), (x, spectrum)).module()(x, spectrum)
    assert torch.allclose(y, global_filter(x, spectrum), rtol=1e-5, atol=1e-5)


def test_it_is_the_product_of_orthonormal_transforms():
    x, spectrum = make(size=(6, 8))
    product = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(spectrum)
    expected = torch.fft.irfft2(product, s=(6, 8), norm="ortho")
    assert torch.allclose(global_filter(x, spectrum), expected, atol=1e-12)


def test_it_commutes_with_circular_shifts():
    x, spectrum = make(size=(6, 5))
    shifted = global_filter(x.roll((2, 3), dims=(2, 3)), spectrum)
    assert torch.allclose(shifted, global_filter(x, spectrum).roll((2, 3), dims=(2, 3)), atol=1e-12)


def test_a_spectrum_of_ones_changes_nothing_at_any_size():
    x, _ = make(size=(7, 9))
    ones = torch.stack([torch.ones(3, 4, 3), torch.zeros(3, 4, 3)], dim=-1).double()
    assert torch.allclose(global_filter(x, ones), x, atol=1e-12)


def test_imaginary_parts_of_frequencies_that_are_their_own_mirror_images_have_no_effect():
    x, spectrum = make(size=(6, 4))
    changed = spectrum.clone()
    for u in (0, 3):
        for v in (0, 2):
            changed[:, u, v, 1] += 10
    assert torch.allclose(global_filter(x, changed), global_filter(x, spectrum), atol=1e-12)


def test_resizing_keeps_the_corners_and_what_fits():
    _, spectrum = make(size=(6, 5))
    larger = resize_spectrum(spectrum, 11, 9)
    assert larger.shape == (3, 11, 5, 2)
    # Every second row and column is one of the old ones.
    assert torch.allclose(larger[:, ::2, ::2], spectrum)
    assert torch.allclose(larger[:, 1, 0], (spectrum[:, 0, 0] + spectrum[:, 1, 0]) / 2)
    assert resize_spectrum(spectrum, 6, 4) is spectrum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_transformed_in_float32(dtype):
    x, spectrum = make(size=(7, 6), dtype=torch.float32)
    y = global_filter(x.to(dtype), spectrum.to(dtype))
    assert y.dtype == dtype
    expected = global_filter(x.to(dtype).float(), spectrum.to(dtype).float())
    # Rounded once, at the end.
    assert torch.equal(y, expected.to(dtype))


def test_bfloat16_stays_close_to_float32_in_gradients_too():
    x, spectrum = make(size=(7, 6), dtype=torch.float32)
    wide = results(global_filter, x.bfloat16().float(), spectrum.bfloat16().float())
    half = results(global_filter, x.bfloat16(), spectrum.bfloat16())
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.dtype == torch.bfloat16
        # Eight bits of mantissa, in the cotangent as well.
        assert (ours.float() - theirs).abs().max() < 1e-2 * theirs.abs().max()


@pytest.mark.untyped
def test_it_compiles_whole():
    x, spectrum = make(size=(6, 6), grid=(4, 4), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(global_filter, fullgraph=True, backend="aot_eager")
    assert_all_close(results(compiled, x, spectrum), results(global_filter, x, spectrum), tolerance=1e-5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "spectrum", "message"),
    [
        ((2, 6, 5), (2, 6, 3, 2), r"\(batch, channels, height, width\), not \(2, 6, 5\)"),
        ((1, 2, 6, 5), (3, 6, 3, 2), r"with the 2 channels of the maps, not \(3, 6, 3, 2\)"),
        ((1, 2, 6, 5), (2, 6, 3), r"\(channels, rows, columns, 2\) .* not \(2, 6, 3\)"),
        ((1, 2, 6, 5), (2, 6, 3, 1), r"not \(2, 6, 3, 1\)"),
        ((1, 2, 6, 5), (2, 0, 3, 2), r"not \(2, 0, 3, 2\)"),
        ((1, 2, 0, 5), (2, 6, 3, 2), "at least one row and one column, not 0 x 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, spectrum, message):
    with pytest.raises(ValueError, match=message):
        global_filter(torch.zeros(x), torch.zeros(spectrum))
