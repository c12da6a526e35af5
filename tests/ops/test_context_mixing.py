"""Context mixing: values and gradients of its forms, what it keeps in memory, and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import context_mixing as module
from gatewise.ops.context_mixing import (
    context_mixing,
    context_mixing_reference,
    neighborhood_sum_reference,
    relative_bias,
)
from gatewise.ops.context_mixing import rows as rows


def make(batch=2, heads=2, query_dim=3, value_dim=2, height=9, width=11, small=3, large=5, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    regions, taps = 4, small**2 + large**2
    return (
        normal(batch, heads * query_dim, height, width),
        normal(batch, heads * query_dim, regions),
        normal(taps, regions),
        normal(taps),
        normal(heads, 2 * small - 1, 2 * small - 1),
        normal(heads, 2 * large - 1, 2 * large - 1),
        normal(batch, 2 * heads * value_dim, height, width),
    )


def results(function, tensors):
    """Output and gradients for all arguments."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


def by_unfolding(kernels, values):
    """The sum over windows from all windows at once: those that fit into the map, the outer ones repeated."""
    heads, height, width, taps = kernels.shape[1:]
    size = round(taps**0.5)
    maps = values.permute(0, 1, 4, 2, 3).flatten(1, 2)
    fitting = F.unfold(maps, size).unflatten(2, (height - size + 1, width - size + 1))
    windows = F.pad(fitting, [size // 2] * 4, mode="replicate")
    windows = windows.unflatten(1, (heads, -1, taps))
    return torch.einsum("bhijt,bhctij->bhijc", kernels, windows)


@settings(max_examples=20, deadline=None)
@given(
    windows=st.sampled_from([(1, 3), (3, 3), (3, 5), (5, 7)]),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    more_rows=st.integers(0, 9),
    more_columns=st.integers(0, 25),
    block=st.sampled_from([1, 1000, 2**18]),
)
def test_values_and_gradients_equal_the_definition(windows, batch, heads, more_rows, more_columns, block):
    small, large = windows
    tensors = make(batch, heads, 3, 2, large + more_rows, large + more_columns, small, large)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_BAND", block)
        found = results(context_mixing, tensors)
    for ours, theirs in zip(found, results(context_mixing_reference, tensors), strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_exported_products_equal_the_definition():
    for size in ((5, 5), (6, 13), (14, 5)):
        tensors = make(height=size[0], width=size[1])
        found = results(module._traceable, tensors)
        for ours, theirs in zip(found, results(context_mixing_reference, tensors), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("size", "height", "width"), [(3, 3, 3), (5, 6, 7), (7, 12, 8)])
def test_two_readings_of_the_window_sum_agree(size, height, width):
    kernels = torch.randn(2, 3, height, width, size**2, dtype=torch.float64).softmax(-1)
    values = torch.randn(2, 3, height, width, 4, dtype=torch.float64)
    expected = by_unfolding(kernels, values)
    assert torch.allclose(neighborhood_sum_reference(kernels, values), expected, rtol=1e-12, atol=1e-12)


def test_first_derivatives_are_right():
    tensors = [tensor.requires_grad_() for tensor in make(1, 1, 2, 2, 6, 7)]
    assert torch.autograd.gradcheck(context_mixing, tensors)


def test_windows_stay_inside_of_the_map():
    # The value counts columns; a kernel that looks at one entry alone shows which column it is at.
    heads, size, width = 1, 5, 8
    query, centers, weight, bias, small, large, value = make(1, heads, 3, 1, 6, width, 3, size)
    value[:] = torch.arange(width)
    weight.zero_()
    bias.zero_()
    large.zero_()
    bias[9] = 1e4  # the first entry of the large kernel: the upper left corner of the window
    seen = context_mixing(query, centers, weight, bias, small, large, value)[0, 1, 0]
    assert seen.tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


def test_equal_entries_make_it_a_mean_over_windows():
    query, centers, weight, bias, small, large, value = make(large=7, height=9, width=12)
    zeros = [torch.zeros_like(tensor) for tensor in (weight, bias, small, large)]
    y = context_mixing(query, centers, *zeros, value)
    for half, size in ((0, 3), (1, 7)):
        expected = F.pad(F.avg_pool2d(value.chunk(2, 1)[half], size, stride=1), [size // 2] * 4, mode="replicate")
        assert torch.allclose(y.chunk(2, 1)[half], expected, rtol=1e-12, atol=1e-12)


def test_the_bias_is_read_by_offset():
    table = torch.arange(25.0).reshape(1, 5, 5)
    bias = relative_bias(table, 3, 4)[0]
    # In the middle, offsets -1..1; in a corner, the window starts at the position itself: 0..2.
    assert bias[1, 1].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert bias[0, 0].tolist() == [12, 13, 14, 17, 18, 19, 22, 23, 24]
    assert bias[2, 3].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


def test_kernels_depend_on_the_whole_map_and_values_on_the_window():
    tensors = [tensor.requires_grad_() for tensor in make(1, height=20, width=20)]
    y = context_mixing(*tensors)
    _, centers, *_, value = torch.autograd.grad(y[:, :, 10, 10].sum(), tensors)
    assert (centers != 0).all()
    reached = value[0, -1].nonzero()
    assert (reached.min(0).values.tolist(), reached.max(0).values.tolist()) == ([8, 8], [12, 12])


def test_non_contiguous_inputs():
    turned = list(make(height=11, width=11))
    for index in (0, 4, 5, 6):
        turned[index] = turned[index].transpose(-1, -2)
    turned[2] = turned[2].T.contiguous().T
    for ours, theirs in zip(results(context_mixing, turned), results(context_mixing_reference, turned), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    last = [*turned[:-1], turned[-1].contiguous(memory_format=torch.channels_last)]
    assert torch.allclose(context_mixing(*last), context_mixing(*turned), rtol=1e-12, atol=1e-12)


def test_bfloat16_stays_close_to_float32():
    tensors = [tensor.bfloat16() for tensor in make(dtype=torch.float32)]
    wide = results(context_mixing, [tensor.float() for tensor in tensors])
    for ours, theirs in zip(results(context_mixing, tensors), wide, strict=True):
        assert ours.dtype == torch.bfloat16
        # Eight bits of mantissa.
        assert (ours.float() - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_large_logits_do_not_overflow_half_precision():
    tensors = list(make(dtype=torch.float32))
    tensors[0] *= 1000
    half = context_mixing(*(tensor.half() for tensor in tensors))
    assert half.isfinite().all()


def test_autocast_changes_nothing_but_the_dtype():
    tensors = [tensor.requires_grad_() for tensor in make(dtype=torch.float32)]
    expected = context_mixing(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(context_mixing(*tensors), expected)
    mixed = [tensor.bfloat16() if n in (0, 1, 6) else tensor for n, tensor in enumerate(tensors)]
    y = context_mixing(*mixed)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors)


def test_neither_windows_nor_kernels_are_kept_for_the_backward_pass():
    tensors = [tensor.requires_grad_() for tensor in make(1, 2, 4, 4, 24, 24, 5, 13, torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        context_mixing(*tensors)
    assert sum(tensor.numel() for tensor in kept) == sum(tensor.numel() for tensor in tensors)


def test_what_is_in_work_is_bounded_by_a_few_rows(monkeypatch):
    largest = 0
    band = rows._Block.band

    def watched(block, kernels, strip):
        nonlocal largest
        made = band(block, kernels, strip)
        largest = max(largest, made.numel(), kernels.numel())
        return made

    monkeypatch.setattr(rows._Block, "band", watched)
    tensors = make(1, 2, 4, 4, 64, 64, 5, 13, torch.float32)
    context_mixing(*tensors)
    # The kernels of the map are 2 heads x 64 x 64 x 169 = 1.4 million; the windows of its values four times that.
    assert largest <= rows._BAND


@pytest.mark.untyped
def test_operators_keep_the_rules_of_torch_library():
    tensors = [tensor.requires_grad_() for tensor in make()]
    torch.library.opcheck(torch.ops.gatewise.context_mixing.default, tensors)
    dy = torch.randn_like(tensors[-1])
    plain = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(torch.ops.gatewise.context_mixing_backward.default, (dy, *plain))


@pytest.mark.untyped
def test_it_compiles_whole():
    tensors = make(dtype=torch.float32)
    compiled = torch.compile(context_mixing, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, tensors), results(context_mixing, tensors), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_counters_see_what_the_papers_tables_count():
    from torch.utils.flop_counter import FlopCounterMode

    tensors = [tensor.requires_grad_() for tensor in make(2, 2, 3, 2, 9, 11, 3, 5)]
    counter = FlopCounterMode(display=False)
    with counter:
        y = context_mixing(*tensors)
    affinities, kernels = 2 * 99 * 6 * 4, 2 * 2 * 99 * 4 * 34
    assert counter.get_total_flops() == 2 * (affinities + kernels)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * (affinities + kernels)


def test_it_runs_without_storage():
    tensors = [tensor.to("meta") for tensor in make()]
    assert context_mixing(*tensors).shape == tensors[-1].shape


def changed(index, shape):
    shapes = [tuple(tensor.shape) for tensor in make()]
    shapes[index] = shape
    return [torch.zeros(shape) for shape in shapes]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 6, 9, 10), r"maps \(batch, channels, height, width\) of one size, not \(2, 6, 9, 10\)"),
        (1, (2, 5, 4), r"centers must be \(2, 6, 'regions'\) as the query, not \(2, 5, 4\)"),
        (2, (33, 4), r"need a weight \(34, 4\) and a bias \(34,\), not \(33, 4\)"),
        (3, (35,), r"not \(34, 4\) and \(35,\)"),
        (4, (2, 5, 3), r"the small table must be \(2 heads, 2K - 1, 2K - 1\) with K odd, not \(2, 5, 3\)"),
        (5, (2, 7, 7), r"the large table .* not \(2, 7, 7\)"),
        (5, (3, 9, 9), r"the large table .* not \(3, 9, 9\)"),
        (6, (2, 6, 9, 11), "divisible by twice the heads .2. and the query's by the heads, not 6 and 6"),
    ],
)
def test_what_does_not_fit_is_refused(index, shape, message):
    with pytest.raises(ValueError, match=message):
        context_mixing(*changed(index, shape))


@pytest.mark.untyped
def test_a_map_smaller_than_the_window_is_refused():
    with pytest.raises(ValueError, match="5x5 does not fit into a map of 4x11"):
        context_mixing(*make(height=4))
