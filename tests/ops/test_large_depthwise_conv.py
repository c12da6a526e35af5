"""Large depthwise convolution: values and gradients of its CPU paths, its choices and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import large_depthwise_conv as module
from gatewise.ops.large_depthwise_conv import arrange, large_depthwise_conv, large_depthwise_conv_reference

CASES = [(3, 1), (3, 4), (5, 1), (7, 1), (7, 2), (9, 1), (13, 1), (15, 1), (17, 1)]
"""Kernel size and dilation."""


def make(batch=2, channels=3, height=9, width=14, kernel=13, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return normal(batch, channels, height, width), normal(channels, 1, kernel, kernel), normal(channels)


def results(function, tensors, dilation):
    """Output and gradients for x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, dilation=dilation)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from(CASES),
    batch=st.integers(1, 3),
    channels=st.integers(1, 4),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels_last=st.booleans(),
)
def test_values_and_gradients_equal_the_definition(case, batch, channels, height, width, channels_last):
    kernel, dilation = case
    x, weight, bias = make(batch, channels, height, width, kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = results(large_depthwise_conv, (x, weight, bias), dilation)
    expected = results(large_depthwise_conv_reference, (x, weight, bias), dilation)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        # Sums of thousands of products of numbers near 1.
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "dilation"), CASES)
def test_without_gradients_it_gives_the_same(kernel, dilation):
    x, weight, bias = make(kernel=kernel)
    expected = large_depthwise_conv_reference(x, weight, bias, dilation=dilation)
    with torch.no_grad():
        assert torch.allclose(large_depthwise_conv(x, weight, bias, dilation=dilation), expected, atol=1e-10)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.allclose(large_depthwise_conv(last, weight, bias, dilation=dilation), expected, atol=1e-10)


def test_non_contiguous_inputs():
    x, weight, bias = make(height=14, width=9)
    turned = x.transpose(2, 3)[:, :, ::2], weight.transpose(2, 3), bias
    found = results(large_depthwise_conv, turned, 1)
    expected = results(large_depthwise_conv_reference, turned, 1)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 2), (7, 1)])
def test_first_and_second_derivatives_are_right(kernel, dilation):
    tensors = [tensor.requires_grad_() for tensor in make(1, 2, 3, 4, kernel)]

    def convolve(x, weight, bias):
        return large_depthwise_conv(x, weight, bias, dilation=dilation)

    assert torch.autograd.gradcheck(convolve, tensors)
    assert torch.autograd.gradgradcheck(convolve, tensors)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_computed(frozen):
    tensors = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(make())]
    large_depthwise_conv(*tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i != frozen for i in range(3)]


@pytest.mark.parametrize("kernel", [5, 13, 17])
def test_bfloat16_stays_close_to_float32(kernel):
    tensors = make(kernel=kernel, dtype=torch.float32)
    wide = results(large_depthwise_conv, [tensor.bfloat16().float() for tensor in tensors], 1)
    half = results(large_depthwise_conv, [tensor.bfloat16() for tensor in tensors], 1)
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.dtype == torch.bfloat16
        # Eight bits of mantissa.
        assert (ours.float() - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_autocast_casts_as_for_any_convolution():
    x, weight, bias = (tensor.requires_grad_() for tensor in make(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = large_depthwise_conv(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert large_depthwise_conv(*make()).dtype == torch.float64


def test_maps_are_laid_out_as_their_kernel_likes_it():
    x = torch.randn(2, 3, 5, 6)
    narrow = torch.randn(2, 3, 6, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    assert arrange(last, 13).is_contiguous()
    assert arrange(narrow, 13).is_contiguous(memory_format=torch.channels_last)
    assert arrange(x, 17).is_contiguous(memory_format=torch.channels_last)
    assert arrange(x, 7) is x
    assert arrange(last, 7) is last
    assert arrange(x.to("meta"), 17).is_contiguous()


def test_a_fourier_transform_gets_a_length_with_small_factors():
    assert [module._smooth_length(length) for length in (1, 7, 16, 31, 33, 34, 37, 97)] == [
        1,
        8,
        16,
        32,
        36,
        36,
        40,
        100,
    ]


@pytest.mark.untyped
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [7, 13, 17])
def test_operators_keep_the_rules_of_torch_library(kernel, memory_format):
    x, weight, bias = make(kernel=kernel)
    x = x.contiguous(memory_format=memory_format)
    ops = torch.ops.gatewise
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), 1)
    torch.library.opcheck(ops.large_depthwise_conv.default, arguments)
    torch.library.opcheck(ops.large_depthwise_conv.default, (x, weight, None, 1))
    dy = torch.randn_like(x).requires_grad_()
    torch.library.opcheck(ops.large_depthwise_conv_weight_gradient.default, (x, dy, kernel, 1))


@pytest.mark.untyped
def test_it_compiles_whole():
    x, weight, bias = (tensor.requires_grad_() for tensor in make(dtype=torch.float32))
    compiled = torch.compile(large_depthwise_conv, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        results(compiled, (x, weight, bias), 1), results(large_depthwise_conv, (x, weight, bias), 1), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


class _Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 1, 13, 13))

    def forward(self, x):
        return large_depthwise_conv(x, self.weight)


@pytest.mark.untyped
def test_exported_programs_hold_a_plain_convolution():
    program = torch.export.export(_Conv(), (torch.randn(2, 3, 8, 8),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.conv2d.default"}


def test_kernels_are_chosen_for_large_kernels_on_channels_last_cuda_maps():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode(allow_non_fake_inputs=True):
        chosen = []
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for kernel in (3, 13):
                    for memory_format in (torch.contiguous_format, torch.channels_last):
                        x = torch.empty(2, 4, 8, 8, device=device, dtype=dtype).contiguous(memory_format=memory_format)
                        if module._uses_kernels(x, torch.empty(4, 1, kernel, kernel, device=device)):
                            chosen.append((device, dtype, kernel, memory_format))
    assert chosen == [
        ("cuda", torch.float32, 13, torch.channels_last),
        ("cuda", torch.bfloat16, 13, torch.channels_last),
    ]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "weight", "bias", "dilation", "message"),
    [
        ((3, 8, 8), (3, 1, 7, 7), None, 1, r"\(batch, channels, height, width\), not \(3, 8, 8\)"),
        ((1, 3, 8, 8), (4, 1, 7, 7), None, 1, r"3 channels of the maps, not \(4, 1, 7, 7\)"),
        ((1, 3, 8, 8), (3, 1, 6, 6), None, 1, r"K odd and the 3 channels of the maps, not \(3, 1, 6, 6\)"),
        ((1, 3, 8, 8), (3, 1, 7, 5), None, 1, r"not \(3, 1, 7, 5\)"),
        ((1, 3, 8, 8), (3, 1, 7, 7), (4,), 1, r"each of the 3 channels, not \(4,\)"),
        ((1, 3, 8, 8), (3, 1, 7, 7), None, 0, "dilation must be 1 or more, not 0"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, dilation, message):
    with pytest.raises(ValueError, match=message):
        large_depthwise_conv(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), dilation=dilation
        )


def test_the_library_agrees():
    x, weight, bias = make(batch=3, channels=8, height=28, width=28, kernel=13, dtype=torch.float32)
    expected = F.conv2d(x, weight, bias, padding=6, groups=8)
    assert torch.allclose(large_depthwise_conv(x, weight, bias), expected, rtol=1e-4, atol=1e-4)


def test_counters_see_it_in_both_directions():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    weight = torch.randn(8, 1, 13, 13, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        large_depthwise_conv(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 13**2
