"""Translation-variant convolution: values and gradients of its CPU paths, its choices and its errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import translation_variant_conv as module
from gatewise.ops.translation_variant_conv import (
    arrange_weight,
    output_size,
    translation_variant_conv,
    translation_variant_conv_reference,
)


def make(batch=2, channels=3, height=6, width=7, kernel=3, stride=1, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    outputs = output_size(height, stride), output_size(width, stride)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return (
        normal(batch, channels, height, width),
        normal(channels, kernel, kernel, *outputs),
        normal(channels, *outputs),
    )


def results(function, tensors, stride):
    """Output and gradients for x, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves, stride=stride)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), leaves)]


def by_the_equation(x, weight, bias, stride):
    """The sum of the docstring, number by number."""
    channels, kernel, _, h, w = weight.shape
    y = bias.expand(x.shape[0], -1, -1, -1).clone()
    for c in range(channels):
        for i in range(h):
            for j in range(w):
                for u in range(kernel):
                    for v in range(kernel):
                        row, column = stride * i + u - kernel // 2, stride * j + v - kernel // 2
                        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                            y[:, c, i, j] += weight[c, u, v, i, j] * x[:, c, row, column]
    return y


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2)])
def test_the_reference_is_the_equation(kernel, stride):
    x, weight, bias = make(2, 2, 5, 4, kernel, stride)
    expected = by_the_equation(x, weight, bias, stride)
    assert torch.allclose(translation_variant_conv_reference(x, weight, bias, stride=stride), expected, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    channels_last=st.booleans(),
    block=st.sampled_from([1, 100, 1 << 16]),
)
def test_values_and_gradients_equal_the_definition(
    batch, channels, height, width, kernel, stride, channels_last, block
):
    tensors = make(batch, channels, height, width, kernel, stride)
    if channels_last:
        tensors = (tensors[0].contiguous(memory_format=torch.channels_last), *tensors[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = results(translation_variant_conv, tensors, stride)
    expected = results(translation_variant_conv_reference, tensors, stride)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_non_contiguous_inputs(stride):
    x, weight, bias = make(4, 3, 8, 8, 3, stride)
    turned = x.transpose(2, 3)[::2], weight.transpose(3, 4), bias.transpose(1, 2)
    found = results(translation_variant_conv, turned, stride)
    expected = results(translation_variant_conv_reference, turned, stride)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_first_and_second_derivatives_are_right(kernel, stride):
    tensors = [tensor.requires_grad_() for tensor in make(2, 2, 3, 4, kernel, stride)]

    def convolve(x, weight, bias):
        return translation_variant_conv(x, weight, bias, stride=stride)

    assert torch.autograd.gradcheck(convolve, tensors)
    assert torch.autograd.gradgradcheck(convolve, tensors)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients_are_computed(frozen):
    tensors = [tensor.requires_grad_(i != frozen) for i, tensor in enumerate(make())]
    translation_variant_conv(*tensors).sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [i != frozen for i in range(3)]


@pytest.mark.parametrize("stride", [1, 2])
def test_with_one_kernel_for_all_positions_it_is_a_depthwise_convolution(stride):
    x, weight, _ = make(2, 5, 9, 8, 3, stride)
    weight = weight[..., :1, :1].expand_as(weight)
    expected = F.conv2d(x, weight[:, None, :, :, 0, 0], stride=stride, padding=1, groups=5)
    assert torch.allclose(translation_variant_conv(x, weight, stride=stride), expected, atol=1e-12)


def test_odd_and_even_inputs_give_as_many_outputs_at_stride_two():
    weight = make(1, 3, 8, 8, 3, 2)[1]
    for height, width in ((8, 8), (7, 8), (8, 7), (7, 7)):
        assert translation_variant_conv(make(1, 3, height, width)[0], weight, stride=2).shape == (1, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_is_rounded_once_from_float32(dtype, stride):
    halves = [tensor.to(dtype) for tensor in make(stride=stride, kernel=5)]
    wide = results(translation_variant_conv_reference, [tensor.float() for tensor in halves], stride)
    found = results(translation_variant_conv, halves, stride)
    assert all(tensor.dtype == dtype for tensor in found)
    # The output, rounded once; gradients take a rounded cotangent from outside.
    assert torch.allclose(found[0].float(), wide[0], rtol=torch.finfo(dtype).eps, atol=1e-3 * torch.finfo(dtype).eps)
    for ours, theirs in zip(found, wide, strict=True):
        assert (ours.float() - theirs).abs().max() < 1e-2 * theirs.abs().max()


def test_autocast_casts_as_for_any_convolution():
    x, weight, bias = (tensor.requires_grad_() for tensor in make(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = translation_variant_conv(x, weight, bias)
        assert translation_variant_conv(*make()).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


def test_an_empty_batch_gives_an_empty_batch():
    x, weight, bias = make(0)
    assert translation_variant_conv(x, weight, bias).shape == (0, 3, 6, 7)


def test_windows_are_never_unfolded(monkeypatch):
    """Beyond the output, no more is held than the padded maps of a block and the weight."""
    allocated = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                allocated.append(result.untyped_storage().nbytes())
            return result

    x, weight, bias = make(8, 4, 16, 16, 5, dtype=torch.float32)
    with Watch():
        translation_variant_conv(x, weight, bias)
    assert max(allocated) < 2 * x.nbytes


def test_arranging_changes_the_memory_alone():
    _, weight, _ = make()
    arranged = arrange_weight(weight)
    assert torch.equal(arranged, weight)
    assert arranged.permute(1, 2, 3, 4, 0).is_contiguous()


@pytest.mark.untyped
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
def test_operators_keep_the_rules_of_torch_library(stride, memory_format):
    x, weight, bias = make(stride=stride)
    x = x.contiguous(memory_format=memory_format)
    ops = torch.ops.gatewise
    torch.library.opcheck(
        ops.translation_variant_conv.default,
        (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), stride),
    )
    torch.library.opcheck(ops.translation_variant_conv.default, (x, weight, None, stride))
    dy = torch.randn(2, *bias.shape, dtype=x.dtype).requires_grad_()
    torch.library.opcheck(ops.translation_variant_conv_input_gradient.default, (dy, weight, *x.shape[2:], stride))
    torch.library.opcheck(ops.translation_variant_conv_weight_gradient.default, (x, dy, 3, stride))


@pytest.mark.untyped
@pytest.mark.parametrize("stride", [1, 2])
def test_it_compiles_whole(stride):
    tensors = make(dtype=torch.float32, stride=stride)
    torch._dynamo.reset()
    compiled = torch.compile(translation_variant_conv, fullgraph=True, backend="aot_eager")
    expected = results(translation_variant_conv, tensors, stride)
    for ours, theirs in zip(results(compiled, tensors, stride), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


class _Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 3, 3, 4, 5))

    def forward(self, x):
        return translation_variant_conv(x, self.weight, stride=2)


@pytest.mark.untyped
def test_exported_programs_hold_slices_products_and_sums():
    module, x = _Conv(), torch.randn(2, 3, 8, 9)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("gatewise" in name or "unfold" in name or "im2col" in name for name in called)
    other = torch.randn(5, 3, 8, 9)
    assert torch.allclose(program.module()(other), module(other), rtol=1e-5, atol=1e-5)


def test_kernels_are_chosen_on_cuda_but_for_float64():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")
    with FakeTensorMode():
        chosen = [
            (device, dtype)
            for device in ("cpu", "cuda")
            for dtype in (torch.float32, torch.bfloat16, torch.float64)
            if module.suits_triton(torch.empty(2, 4, 8, 8, device=device, dtype=dtype))
        ]
    assert chosen == [("cuda", torch.float32), ("cuda", torch.bfloat16)]


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("x", "weight", "bias", "stride", "message"),
    [
        ((3, 8, 8), (3, 3, 3, 8, 8), None, 1, r"\(batch, channels, height, width\), not \(3, 8, 8\)"),
        ((1, 3, 8, 8), (4, 3, 3, 8, 8), None, 1, r"the 3 channels of the maps and their 8x8 outputs, not \(4, 3,"),
        ((1, 3, 8, 8), (3, 3, 3, 8, 8), None, 2, r"4x4 outputs, not \(3, 3, 3, 8, 8\)"),
        ((1, 3, 8, 8), (3, 2, 2, 8, 8), None, 1, r"K odd, .*, not \(3, 2, 2, 8, 8\)"),
        ((1, 3, 8, 8), (3, 3, 5, 8, 8), None, 1, r"\(channels, K, K, h, w\)"),
        ((1, 3, 8, 8), (3, 9, 8, 8), None, 1, r"not \(3, 9, 8, 8\)"),
        ((1, 3, 8, 8), (3, 3, 3, 8, 8), (3,), 1, r"bias must be \(channels, h, w\) = \(3, 8, 8\), not \(3,\)"),
        ((1, 3, 8, 8), (3, 3, 3, 8, 8), None, 3, "stride must be 1 or 2, not 3"),
    ],
)
def test_what_does_not_fit_is_refused(x, weight, bias, stride, message):
    with pytest.raises(ValueError, match=message):
        translation_variant_conv(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), stride=stride
        )


def test_mixed_dtypes_are_refused():
    x, weight, _ = make()
    with pytest.raises(ValueError, match=r"dtype of the maps, torch.float64, not torch.float32"):
        translation_variant_conv(x, weight.float())


def test_counters_see_it_in_both_directions():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, _ = (tensor.requires_grad_() for tensor in make(2, 8, 9, 11, 3, 2))
    counter = FlopCounterMode(display=False)
    with counter:
        translation_variant_conv(x, weight, stride=2).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 8 * 5 * 6 * 9
