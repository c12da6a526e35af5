"""Max pooling with one byte per output for the backward pass: values, derivatives of any order, memory, choices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import spatial_pool as module
from gatewise.ops.spatial_pool import spatial_max_pool, spatial_max_pool_reference


def maps(batch, channels, height, width, channels_last=False, ties=False, dtype=torch.float64):
    """Random maps; with `ties` of five values alone, so that most windows have several largest elements."""
    draw = torch.Generator().manual_seed(0)
    shape = (batch, channels, height, width)
    x = torch.randint(-2, 3, shape, generator=draw) if ties else torch.randn(shape, generator=draw)
    return x.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def first_largest(x, kernel_size, stride):
    """Row and column within its window of every window's first largest element, looked up one by one."""
    margin = kernel_size // 2
    padded = F.pad(x, (margin,) * 4, value=-torch.inf)
    windows = padded.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).flatten(4)
    inside = F.pad(torch.ones_like(x), (margin,) * 4).unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)
    largest = (windows == windows.amax(-1, keepdim=True)) & inside.flatten(4).bool()
    return largest.int().argmax(-1)


def reference_gradient(x, dy, kernel_size, stride):
    dx = torch.zeros_like(x)
    margin = kernel_size // 2
    for place, offset in zip(
        dy.new_ones(dy.shape).nonzero(), first_largest(x, kernel_size, stride).flatten(), strict=True
    ):
        b, c, i, j = place.tolist()
        p, q = divmod(int(offset), kernel_size)
        dx[b, c, i * stride + p - margin, j * stride + q - margin] += dy[b, c, i, j]
    return dx


some_maps = {
    "batch": st.integers(1, 2),
    "channels": st.integers(1, 3),
    "height": st.integers(1, 9),
    "width": st.integers(1, 9),
    "kernel_size": st.sampled_from([1, 3, 5, 7]),
    "stride": st.integers(1, 3),
    "channels_last": st.booleans(),
    "ties": st.booleans(),
}


@settings(max_examples=60, deadline=None)
@given(**some_maps)
def test_values_and_gradients_are_those_of_the_definition(
    batch, channels, height, width, kernel_size, stride, channels_last, ties
):
    x = maps(batch, channels, height, width, channels_last, ties).requires_grad_()
    y = spatial_max_pool(x, kernel_size, stride)
    assert torch.equal(y, spatial_max_pool_reference(x, kernel_size, stride))
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, reference_gradient(x.detach(), dy, kernel_size, stride))


@settings(max_examples=40, deadline=None)
@given(**some_maps)
def test_without_gradients_values_are_the_same(
    batch, channels, height, width, kernel_size, stride, channels_last, ties
):
    x = maps(batch, channels, height, width, channels_last, ties)
    assert torch.equal(module._largest(x, kernel_size, stride), spatial_max_pool_reference(x, kernel_size, stride))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_of_many_pieces(channels_last, stride, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 300)
    monkeypatch.setattr(module, "_WORTHWHILE", 0)
    x = maps(7, 6, 8, 9, channels_last, ties=True)
    expected = spatial_max_pool_reference(x, 3, stride)
    assert torch.equal(spatial_max_pool(x, 3, stride), expected)
    leaf = x.clone().requires_grad_()
    y = spatial_max_pool(leaf, 3, stride)
    assert torch.equal(y, expected)
    (dx,) = torch.autograd.grad(y, leaf, expected)
    torch.testing.assert_close(dx, reference_gradient(x, expected, 3, stride))


def test_offsets_name_the_first_largest_element():
    x = maps(2, 3, 7, 6, ties=True)
    _, offsets = torch.ops.gatewise.spatial_max_pool(x, 3, 2)
    assert offsets.dtype == torch.uint8
    assert torch.equal(offsets.long(), first_largest(x, 3, 2))


@pytest.mark.parametrize("size", [(5, 2), (2, 5), (4, 40), (3, 3000)])
@pytest.mark.parametrize("kernel_size", [3, 11, 15])
def test_offsets_and_places_say_the_same(size, kernel_size):
    """Also where rows are shorter than windows, and where small integers no longer count their elements."""
    x = maps(1, 2, *size, ties=True)
    window = [kernel_size] * 2, [2, 2], [kernel_size // 2] * 2
    _, places = torch.ops.aten.max_pool2d_with_indices(x, *window)
    offsets = module._offsets(places, size[1], kernel_size, 2)
    assert torch.equal(offsets.long(), first_largest(x, kernel_size, 2))
    assert torch.equal(module._places(offsets, size[1], kernel_size, 2), places)


@pytest.mark.parametrize("channels_last", [False, True])
def test_one_byte_per_output_is_kept(channels_last):
    x = maps(2, 4, 8, 8, channels_last, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = spatial_max_pool(x, 3, 2)
    assert [tensor.numel() * tensor.element_size() for tensor in kept] == [y.numel()]


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_first_and_second_derivatives_are_right(kernel_size, stride):
    x = maps(1, 2, 5, 4).requires_grad_()

    def pool(x):
        return spatial_max_pool(x, kernel_size, stride)

    def gradient_of_cubes(x):
        return torch.autograd.grad(pool(x).pow(3).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(pool, x)
    assert torch.autograd.gradcheck(gradient_of_cubes, x)
    assert torch.autograd.gradgradcheck(gradient_of_cubes, x)


def test_non_contiguous_inputs_and_gradients():
    wide = maps(2, 6, 9, 14).requires_grad_()
    x = wide.transpose(2, 3)[:, ::2, 1:]
    y = spatial_max_pool(x)
    assert torch.equal(y, spatial_max_pool_reference(x))
    dy = torch.randn(y.shape[::-1], dtype=y.dtype).permute(3, 2, 1, 0)
    (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    torch.testing.assert_close(dx, reference_gradient(x.detach(), dy, 3, 1))
    # A sum hands on one number without storage for each element.
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, reference_gradient(x.detach(), torch.ones_like(y), 3, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_is_exact_in_values_and_close_in_gradients(dtype, channels_last):
    x = maps(2, 3, 7, 8, channels_last, dtype=dtype)
    wide, half = x.float().requires_grad_(), x.clone().requires_grad_()
    y, y_half = spatial_max_pool(wide), spatial_max_pool(half)
    assert torch.equal(y_half.float(), y)
    assert torch.equal(spatial_max_pool(x).float(), y)
    dy = torch.randn_like(y).to(dtype)
    (dx,), (dx_half,) = torch.autograd.grad(y, wide, dy.float()), torch.autograd.grad(y_half, half, dy)
    # Sums of at most nine terms, rounded to the eight bits of bfloat16.
    torch.testing.assert_close(dx_half.float(), dx, rtol=2e-2, atol=4e-2)


def test_infinities_and_nans_come_through():
    x = torch.full((1, 1, 4, 4), -torch.inf).requires_grad_()
    y = spatial_max_pool(x)
    assert (y == -torch.inf).all()
    # The gradient stays within the map.
    assert torch.autograd.grad(y.sum(), x)[0].sum() == 16
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 1] = torch.nan
    for tensor in (x, x.clone().requires_grad_()):
        seen = spatial_max_pool(tensor)[0, 0].isnan()
        assert seen[:, :3].all()
        assert not seen[:, 3:].any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_memory_format_stays(channels_last, requires_grad, monkeypatch):
    monkeypatch.setattr(module, "_WORTHWHILE", 0)
    x = maps(2, 3, 6, 5, channels_last).requires_grad_(requires_grad)
    y = spatial_max_pool(x)
    assert module._is_channels_last(y) == channels_last
    if requires_grad:
        assert module._is_channels_last(torch.autograd.grad(y.sum(), x)[0]) == channels_last


def test_an_empty_batch():
    assert spatial_max_pool(torch.zeros(0, 3, 5, 4), 3, 2).shape == (0, 3, 3, 2)
    x = torch.zeros(0, 3, 5, 4, requires_grad=True)
    assert torch.autograd.grad(spatial_max_pool(x, 3, 2).sum(), x)[0].shape == x.shape


@pytest.mark.untyped
@pytest.mark.parametrize("channels_last", [False, True])
def test_operators_are_registered_in_full(channels_last):
    x = maps(2, 3, 6, 5, channels_last).requires_grad_()
    ops = torch.ops.gatewise
    y, offsets = ops.spatial_max_pool(x, 3, 2)
    torch.library.opcheck(ops.spatial_max_pool.default, (x, 3, 2))
    torch.library.opcheck(ops.spatial_max_pool_backward.default, (y.detach().requires_grad_(), offsets, 6, 5, 3, 2))
    torch.library.opcheck(ops.spatial_max_pool_gather.default, (x, offsets, 3, 2))


@pytest.mark.untyped
def test_compiles_whole_with_and_without_gradients():
    x = maps(2, 3, 6, 5)
    compiled = torch.compile(lambda x: spatial_max_pool(x * 2, 3, 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), spatial_max_pool_reference(x * 2, 3, 2))
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(dx, 2 * reference_gradient(x * 2, torch.ones_like(y), 3, 2))


@pytest.mark.untyped
def test_exported_programs_hold_the_library_operator():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return spatial_max_pool(x, 3, 2)

    x = maps(2, 3, 6, 5)
    program = torch.export.export(Pool(), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.max_pool2d.default"]
    assert torch.equal(program.module()(x), spatial_max_pool_reference(x, 3, 2))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("shape", "kernel_size", "stride", "message"),
    [
        ((3, 4, 4), 3, 1, r"\(batch, channels, height, width\) and not empty, not \(3, 4, 4\)"),
        ((1, 3, 0, 4), 3, 1, r"not empty, not \(1, 3, 0, 4\)"),
        ((1, 3, 4, 4), 4, 1, "odd and at most 15, not 4"),
        ((1, 3, 4, 4), 17, 1, "odd and at most 15, not 17"),
        ((1, 3, 4, 4), -1, 1, "odd and at most 15, not -1"),
        ((1, 3, 4, 4), 3, 0, "stride must be 1 or more, not 0"),
    ],
)
def test_wrong_arguments_are_told(shape, kernel_size, stride, message):
    with pytest.raises(ValueError, match=message):
        spatial_max_pool(torch.zeros(shape), kernel_size, stride)


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_gives_the_same(channels_last):
    x = maps(2, 5, 9, 12, channels_last, ties=True)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = spatial_max_pool(leaf, 3, 2)
        dy = torch.arange(y.numel(), dtype=y.dtype, device=device).view(y.shape)
        found.append((y.detach().cpu(), torch.autograd.grad(y, leaf, dy)[0].cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
