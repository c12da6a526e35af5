"""Recursive gated convolution: its equations, its degree, its options, its merged form and its errors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.layers.gnconv import GlobalLocalFilter, GnConv, GnConvNormAct
from gatewise.layers.norm import LayerNorm2d
from gatewise.ops.global_filter import global_filter_reference


def moved(module, seed=0):
    """The module in float64 and eval mode with every parameter and statistic away from its initial value."""
    draw = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        for key, buffer in module.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=draw, dtype=torch.float64))
    return module


def maps(*shape):
    return torch.randn(shape, dtype=torch.float64)


def pointwise(conv, x):
    return torch.einsum("bchw,dc->bdhw", x, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]


def norm_by_the_equation(norm, x):
    centered = x - x.mean(dim=1, keepdim=True)
    variance = centered.square().mean(dim=1, keepdim=True)
    return norm.weight[:, None, None] * centered / (variance + 1e-6).sqrt() + norm.bias[:, None, None]


def filter_by_the_equations(module, x):
    half = x.shape[1] // 2
    x = norm_by_the_equation(module.pre_norm, x)
    patches = F.pad(x[:, :half], (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    both = torch.empty_like(x)
    both[:, 0::2] = torch.einsum("bchwij,cij->bchw", patches, module.local.weight[:, 0])
    both[:, 1::2] = global_filter_reference(x[:, half:], module.spectrum)
    return norm_by_the_equation(module.post_norm, both)


def gnconv_by_the_equations(module, x, order, scale):
    projected = pointwise(module.project_in, x)
    dim = projected.shape[1] // 2
    widths = [dim // 2 ** (order - 1 - i) for i in range(order)]
    gated = projected[:, widths[0] :]
    if isinstance(module.spatial, GlobalLocalFilter):
        gates = filter_by_the_equations(module.spatial, gated)
    else:
        kernel = module.spatial.weight.shape[-1]
        patches = F.pad(gated, [kernel // 2] * 4).unfold(2, kernel, 1).unfold(3, kernel, 1)
        gates = torch.einsum("bchwij,cij->bchw", patches, module.spatial.weight[:, 0])
        gates = gates + module.spatial.bias[:, None, None]
    y, begin = projected[:, : widths[0]], 0
    for i, width in enumerate(widths):
        y = y * (scale * gates[:, begin : begin + width])
        begin += width
        y = pointwise(module.widen[i] if i < order - 1 else module.project_out, y)
    return y


@settings(max_examples=20, deadline=None)
@given(
    order=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    kernel=st.sampled_from([1, 3, 7]),
    grid=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    scale=st.sampled_from([1.0, 1 / 3]),
    in_dim=st.sampled_from([None, 5]),
    channels_last=st.booleans(),
)
def test_gnconv_follows_the_equations(order, size, kernel, grid, scale, in_dim, channels_last):
    module = moved(GnConv(32, order, scale=scale, kernel_size=kernel, grid=grid, in_dim=in_dim, out_dim=7))
    x = maps(2, in_dim or 32, *size)
    expected = gnconv_by_the_equations(module, x, order, scale)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(module(x), expected, rtol=1e-9, atol=1e-10)
    assert torch.allclose(module.merged()(x), expected, rtol=1e-9, atol=1e-10)


def test_local_and_global_channels_alternate():
    module = moved(GlobalLocalFilter(8, (4, 3)))
    with torch.no_grad():
        module.spectrum.zero_()
        module.post_norm.weight.fill_(1)
        module.post_norm.bias.zero_()
        y = module(maps(1, 8, 4, 4))
    # Channels that hold nothing are alike after a norm over channels.
    assert torch.allclose(y[:, 1::2], y[:, 1:2].expand(-1, 4, -1, -1))
    assert not torch.allclose(y[:, 0::2], y[:, 0:1].expand(-1, 4, -1, -1))


@pytest.mark.parametrize("make", [partial(GnConv, 8, 3), partial(GnConv, 8, 2, grid=(3, 2), scale=0.5)])
def test_gradients_are_right(make):
    module = moved(make())
    x = maps(1, 8, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_without_biases_it_is_a_polynomial_of_degree_one_above_the_order(order):
    module = moved(GnConv(16, order, scale=1 / 3))
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            nn.init.zeros_(inner.bias)
    x = maps(1, 16, 9, 8)
    assert torch.allclose(module(2 * x), 2 ** (order + 1) * module(x), rtol=1e-12)


def test_channels_last_memory_stays_channels_last():
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)
    for module in (GnConv(16, 3), GnConv(16, 3, grid=(9, 5))):
        assert module(x).is_contiguous(memory_format=torch.channels_last)


def test_the_merged_form_has_no_scale_left_and_merges_again():
    for module in (GnConv(16, 3, scale=0.25), GnConv(16, 3, scale=0.25, grid=(4, 3))):
        moved(module)
        merged = module.merged()
        assert (module.scale, merged.scale) == (0.25, None)
        x = maps(1, 16, 5, 6)
        assert torch.allclose(merged.merged()(x), module(x), rtol=1e-12)


def test_gates_are_read_as_they_are_used():
    module = moved(GnConv(8, 3, scale=0.5))
    x = maps(2, 8, 5, 4)
    read = module.read_gates(x)
    assert list(read) == ["order 1", "order 2", "order 3"]
    gates = 0.5 * module.spatial(module.project_in(x)[:, 2:])
    assert torch.allclose(read["order 1"], gates[:, :2].square().mean(1).sqrt())
    assert torch.allclose(read["order 3"], gates[:, 6:].square().mean(1).sqrt())


def test_a_unit_is_gnconv_norm_and_activation():
    unit = moved(GnConvNormAct(6, 8, order=3, width_ratio=2, grid=(4, 3)))
    x = maps(2, 6, 5, 7)
    expected = torch.relu(unit.norm(gnconv_by_the_equations(unit, x, 3, 1.0)))
    assert torch.allclose(unit(x), expected, rtol=1e-9, atol=1e-10)
    merged = unit.merged()
    assert isinstance(merged.norm, nn.Identity)
    assert torch.allclose(merged(x), expected, rtol=1e-9, atol=1e-10)


def test_a_unit_may_have_neither_norm_nor_activation_nor_last_projection():
    bare = moved(GnConvNormAct(6, 8, norm=None, act=None))
    assert (bare(maps(1, 6, 5, 5)) < 0).any()
    assert {type(bare.norm), type(bare.act)} == {nn.Identity}
    open_ended = moved(GnConvNormAct(6, 8, project_out=False, norm=LayerNorm2d, act=nn.GELU))
    assert not any(name.startswith("project_out") for name, _ in open_ended.named_parameters())
    x = maps(1, 6, 5, 5)
    assert open_ended(x).shape == (1, 8, 5, 5)
    assert torch.equal(open_ended.merged()(x), open_ended(x))


def test_a_batch_norm_without_a_projection_before_it_stays():
    unit = moved(GnConvNormAct(6, 8, project_out=False))
    merged = unit.merged()
    assert isinstance(merged.norm, nn.BatchNorm2d)
    x = maps(1, 6, 5, 5)
    assert torch.equal(merged(x), unit(x))


@pytest.mark.untyped
@pytest.mark.parametrize("make", [partial(GnConv, 16, 3), partial(GnConv, 16, 3, grid=(6, 4), scale=1 / 3)])
def test_it_compiles_whole_and_exports(make):
    module = make().eval()
    x = torch.randn(2, 16, 6, 7)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), module(x), rtol=1e-4, atol=1e-6)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    for other in (x, torch.randn(5, 16, 6, 7)):
        assert torch.allclose(program(other), module(other), rtol=1e-4, atol=1e-6)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GnConv(36, 4), r"order 4 needs a width that is a multiple of 2\^3 = 8, not 36; the nearest is 32"),
        (lambda: GnConv(3, 4), "not 3; the nearest is 8"),
        (lambda: GnConv(24, 4, grid=(4, 3)), r"multiple of 2\^4 with a global filter = 16, not 24"),
        (lambda: GnConv(8, 0), "order of a gnConv must be 1 or more, not 0"),
        (lambda: GnConv(8, 2, kernel_size=4), "odd and positive, not 4"),
        (lambda: GlobalLocalFilter(7), "must be even, not 7"),
        (lambda: GlobalLocalFilter(8, (0, 3)), r"positive in rows and columns, not \(0, 3\)"),
        (lambda: GnConvNormAct(8, 8, width_ratio=2, project_out=False), "1 where no projection follows .* not 2"),
        (lambda: GnConvNormAct(8, 8, width_ratio=0), "width_ratio must be positive, .* not 0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
