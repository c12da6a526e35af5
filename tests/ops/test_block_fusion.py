"""Fused blocks: any tile gives what the plain block gives, in less memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gatewise.ops import block_fusion as module
from gatewise.ops.block_fusion import (
    ACTIVATIONS,
    conv_first_path,
    fused_conv_first,
    fused_conv_first_reference,
    fused_mbconv,
    fused_mbconv_reference,
    mbconv_path,
)
from gatewise.ops.block_fusion import plan as plan
from gatewise.ops.block_fusion.plan import BlockShape, Tile, plan_bands, plan_tiles

FUNCTIONS = {
    "conv first": (fused_conv_first, fused_conv_first_reference),
    "mbconv": (fused_mbconv, fused_mbconv_reference),
    "without expansion": (fused_mbconv, fused_mbconv_reference),
}
PATHS = {"conv first": conv_first_path, "mbconv": mbconv_path, "without expansion": mbconv_path}
FORMS = list(FUNCTIONS)
WHOLE = Tile(1000, 1000, 1000)


def make(form, *, batch=1, dim=8, hidden=16, out=8, size=(7, 5), kernel=3, group=2, biased=True, dtype=torch.float64):
    """x and the weights and biases of a block, in the order of its arguments."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        return (values / max(1, values[0].numel()) ** 0.5).to(dtype)

    def unit(outputs: int, inputs: int, size: int) -> list[Tensor | None]:
        return [normal(outputs, inputs, size, size), normal(outputs) if biased else None]

    x = torch.randn(batch, dim, *size, generator=draw, dtype=torch.float64).to(dtype)
    project = unit(out, hidden, 1)
    if form == "conv first":
        return [x, *unit(dim, group, kernel), *unit(hidden, dim, 1), *project]
    if form == "mbconv":
        return [x, *unit(hidden, dim, 1), *unit(hidden, group, kernel), *project]
    return [x, None, None, *unit(hidden, group, kernel), *project]


def options(form, activation="silu", other="identity", **rest):
    names = {"conv first": ("activation", "spatial_activation")}.get(form, ("spatial_activation", "expand_activation"))
    return {names[0]: activation, names[1]: other, **rest}


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 6)),
    kernel=st.sampled_from([1, 3, 5]),
    group=st.sampled_from([1, 2, 4, 8]),
    stride=st.integers(1, 2),
    out=st.sampled_from([3, 8]),
    tile=st.none() | st.builds(Tile, st.integers(1, 30), st.just(9), st.sampled_from([8, 16, 64])),
    biased=st.booleans(),
    channels_last=st.booleans(),
)
def test_any_tile_gives_what_the_plain_block_gives(
    form, batch, size, kernel, group, stride, out, tile, biased, channels_last
):
    x, *weights = make(form, batch=batch, size=size, kernel=kernel, group=group, out=out, biased=biased)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    fused, reference = FUNCTIONS[form]
    chosen = options(form, other="relu6", stride=stride, residual=stride == 1 and out == 8)
    y = fused(x, *weights, tile=tile, **chosen)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Sums of at most a few hundred products of numbers near 1, in another order.
    torch.testing.assert_close(y, reference(x, *weights, **chosen).contiguous(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_activation(form, activation):
    # Inputs of which some are beyond 6, where ReLU6 and Hardswish bend.
    x, *weights = make(form)
    fused, reference = FUNCTIONS[form]
    for chosen in (options(form, activation), options(form, "identity", activation)):
        y = fused(9 * x, *weights, tile=Tile(2, 5, 8), **chosen)
        torch.testing.assert_close(y, reference(9 * x, *weights, **chosen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_float32_to_its_own_precision(form):
    tensors = make(form, batch=2, dim=16, hidden=96, out=16, size=(19, 17), group=1, dtype=torch.float32)
    fused, reference = FUNCTIONS[form]
    expected = reference(*[None if tensor is None else tensor.double() for tensor in tensors], residual=True)
    for tile in (None, Tile(3, 17, 32), Tile(19, 17, 96), WHOLE):
        y = fused(*tensors, residual=True, tile=tile)
        assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tile", [None, Tile(3, 9, 1000), Tile(3, 9, 8)], ids=["planned", "bands", "chunks"])
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_no_further_from_float32_than_the_plain_block(form, tile):
    tensors = make(form, size=(12, 9), hidden=64, dtype=torch.bfloat16)
    fused, reference = FUNCTIONS[form]
    wide = reference(*[None if tensor is None else tensor.float() for tensor in tensors], residual=True)
    y, plain = fused(*tensors, residual=True, tile=tile), reference(*tensors, residual=True)
    assert y.dtype == torch.bfloat16

    def error(found: Tensor) -> float:
        return (found.float() - wide).square().mean().sqrt().item()

    # Roundings fall elsewhere where sums have another order; their number is the same.
    assert error(y) < 1.2 * error(plain)


def test_what_pads_the_expanded_map_is_zero_not_an_expanded_zero():
    x, weight, bias, *rest = make("mbconv", size=(6, 6))
    bias = bias + 5
    for tile in (Tile(2, 6, 8), Tile(6, 6, 16), WHOLE):
        y = fused_mbconv(x, weight, bias, *rest, tile=tile)
        torch.testing.assert_close(y, fused_mbconv_reference(x, weight, bias, *rest), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_tensors(form):
    tensors = make(form, size=(6, 8))
    turned = [tensor.transpose(2, 3) if tensor is not None and tensor.ndim == 4 else tensor for tensor in tensors]
    turned[0] = turned[0][:, :, ::2]
    fused, reference = FUNCTIONS[form]
    torch.testing.assert_close(fused(*turned, tile=Tile(2, 6, 8)), reference(*turned), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_an_input_is_never_written_to(form):
    tensors = make(form)
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    for tile in (Tile(2, 5, 8), WHOLE):
        FUNCTIONS[form][0](*tensors, residual=True, tile=tile)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def peak_bytes(run) -> int:
    """Of the allocator, beyond what is held before the call and what it returns."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        y = run()
    changes = sorted(_allocations(recorded.profiler.kineto_results.experimental_event_tree()))
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    assert peak >= y.numel() * y.element_size()
    return peak - y.numel() * y.element_size()


def _allocations(events):
    for event in events:
        size = getattr(event.typed[1], "alloc_size", None)
        if size is not None:
            yield event.start_time_ns, size
        yield from _allocations(event.children)


@pytest.mark.untyped
def test_bands_of_eight_rows_need_a_megabyte_where_the_plain_block_needs_thirteen():
    sizes = {"dim": 64, "hidden": 384, "out": 64, "size": (64, 64), "group": 8, "dtype": torch.float32}
    tensors = [
        tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
        for tensor in make("conv first", **sizes)
    ]
    hidden_map = 384 * 64 * 64 * 4
    assert hidden_map == 6_291_456
    # The expansion and its activation exist together.
    assert peak_bytes(partial(fused_conv_first_reference, *tensors, residual=True)) >= 2 * hidden_map
    assert peak_bytes(partial(fused_conv_first, *tensors, residual=True, tile=Tile(8, 64, 384))) < 1.1e6
    # Chunks of channels: tile (C + chunk + K), 0.8 MB of which the output's share is not extra.
    assert peak_bytes(partial(fused_conv_first, *tensors, residual=True, tile=Tile(8, 64, 64))) < 0.4e6


@pytest.mark.untyped
@pytest.mark.parametrize("form", FORMS)
def test_intermediates_stay_within_the_workspace(form):
    hidden = 16 if form == "without expansion" else 128
    tensors = make(form, dim=16, hidden=hidden, out=16, size=(48, 40), group=1, dtype=torch.float32)
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    shape = block_shape(form, 16, hidden, 16, 48, 40)
    # The library lays out the weights of the spatial convolution for itself.
    laid_out = 4 * 9 * hidden
    for tile in (Tile(4, 40, 32), Tile(12, 40, 64), Tile(48, 40, 32)):
        used = peak_bytes(partial(FUNCTIONS[form][0], *tensors, residual=True, tile=tile))
        assert used <= 4 * shape.workspace(tile) + laid_out


def block_shape(form, dim=8, hidden=16, out=8, height=7, width=5, **rest):
    kind = "conv first" if form == "conv first" else "mbconv"
    return BlockShape(kind, 1, dim, hidden, out, height, width, expands=form != "without expansion", **rest)


CONV_FIRST_64 = BlockShape("conv first", 128, 64, 384, 64, 64, 64, group_width=8)


def test_the_plan_costs_what_the_formula_says():
    # 16x16 tiles of 64x64 maps, and all weights once: 64 (72 + 1) + 384 (64 + 1) + 64 (384 + 1) numbers.
    found = plan_tiles(CONV_FIRST_64, 1 << 20, 2)
    rows, columns, channels = found.tile
    tiles = 128 * -(-64 // rows) * -(-64 // columns)
    assert found.tiles == tiles
    weights = 64 * 73 + 384 * 65 + 64 * 385
    windows = tiles * (rows + 2) * (columns + 2) * 64
    outputs = 128 * 64 * 64 * 64
    assert found.weights_stay
    assert found.bytes_moved == 2 * (windows + outputs + weights)
    assert found.workspace_bytes == 2 * rows * columns * (64 + channels + 64)
    assert found.workspace_bytes + 2 * weights <= 1 << 20


def test_weights_that_do_not_fit_are_read_for_every_tile():
    shape = BlockShape("mbconv", 2, 256, 1024, 256, 16, 16, group_width=8)
    found = plan_tiles(shape, 1 << 19, 2)
    assert not found.weights_stay
    rows, columns, _ = found.tile
    windows = found.tiles * (rows + 2) * (columns + 2) * 256
    assert found.bytes_moved == 2 * (windows + 2 * 16 * 16 * 256 + found.tiles * shape.weights)


shapes = st.builds(
    BlockShape,
    form=st.sampled_from(["conv first", "mbconv"]),
    batch=st.integers(1, 3),
    in_dim=st.sampled_from([8, 24, 64]),
    hidden_dim=st.sampled_from([48, 144, 384]),
    dim=st.sampled_from([8, 24, 64]),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    group_width=st.sampled_from([1, 8]),
    expands=st.just(True),
)


@settings(max_examples=40, deadline=None)
@given(shapes, st.lists(st.integers(2_000, 4_000_000), min_size=2, max_size=4), st.booleans())
def test_a_larger_memory_never_moves_more(shape, capacities, whole_rows):
    moved = []
    for capacity in sorted(capacities):
        try:
            found = plan_tiles(shape, capacity, 4, whole_rows=whole_rows)
        except ValueError:
            # Once something fits, it fits all larger memories.
            assert not moved
            continue
        assert found.workspace_bytes <= capacity
        assert found.tile.channels == shape.hidden_dim or found.tile.channels % shape.group_width == 0
        assert found.tile.columns == shape.out_width or not whole_rows
        moved.append(found.bytes_moved)
    assert moved == sorted(moved, reverse=True)


def test_what_fits_nowhere_is_said():
    with pytest.raises(ValueError, match=r"no tile fits 100 bytes: the smallest, \(1, 1, 32\), needs 640"):
        plan_tiles(CONV_FIRST_64, 100, 4)
    with pytest.raises(ValueError, match="positive numbers of bytes, not 0 and 4"):
        plan_tiles(CONV_FIRST_64, 0, 4)


def test_a_cache_that_holds_no_row_gets_one_row_and_a_large_one_several_images():
    assert plan_bands(CONV_FIRST_64, 1000, 4) == Tile(1, 64, 32)
    small = BlockShape("mbconv", 8, 64, 384, 64, 14, 14)
    one = small.workspace(Tile(14, 14, 384))
    assert plan_bands(small, 4 * (one + small.weights), 4) == Tile(14, 14, 384)
    assert plan_bands(small, 4 * 3 * one, 4) == Tile(3 * 14, 14, 384)
    assert plan_bands(small, 4 * 100 * one, 4) == Tile(8 * 14, 14, 384)


def test_the_cache_is_read_from_the_system_or_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_CACHES", tmp_path)
    assert plan.cache_bytes.__wrapped__() == plan.USUAL_CACHE
    for index, (level, size) in enumerate([("1", "32K"), ("2", "2M"), ("3", "32M")]):
        cache = tmp_path / f"index{index}"
        cache.mkdir()
        (cache / "level").write_text(f"{level}\n", encoding="ascii")
        (cache / "size").write_text(f"{size}\n", encoding="ascii")
    assert plan.cache_bytes.__wrapped__() == 2 << 20


@pytest.mark.parametrize("form", FORMS)
def test_where_gradients_are_wanted_the_plain_block_runs_and_gives_them(form):
    tensors = make(form)
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor is not None]
    fused, reference = FUNCTIONS[form]
    assert PATHS[form](*tensors).name == "plain"
    found = torch.autograd.grad(fused(*tensors).square().sum(), leaves)
    expected = torch.autograd.grad(reference(*tensors).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert PATHS[form](*tensors).name == "bands"


def test_the_path_is_told_with_its_reason():
    from torch._subclasses.fake_tensor import FakeTensorMode

    pytest.importorskip("triton")

    def path(form="conv first", device="cuda", **sizes):
        sizes = {"dim": 16, "hidden": 32, "out": 16, "dtype": torch.float16} | sizes
        with torch.device(device):
            tensors = [torch.empty_like(tensor, device=device) for tensor in make(form, **sizes)]
        return PATHS[form](*tensors)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert path().name == "kernel"
        assert path(group=8).name == "kernel"
        assert path(device="cpu") == ("bands", "a CPU takes bands of rows")
        assert path(device="meta") == ("plain", "no kernel for torch.float16 on meta")
        assert path(dtype=torch.float64) == ("plain", "no kernel for torch.float64 on cuda")
        assert "as wide as a power of 2, not 6" in path(dim=24, group=6).reason
        assert "at most 128 filtered and 256 output channels of a pixel, not 136" in path(dim=136).reason
        assert "not 16 and 264" in path(out=264).reason
        assert path("mbconv") == ("plain", "no kernel for MBConv: it would expand every pixel once per tap")


@pytest.mark.untyped
@pytest.mark.parametrize("form", FORMS)
def test_operators_keep_the_rules_of_torch_library(form):
    tensors = make(form, dtype=torch.float32)
    operator = torch.ops.gatewise.fused_conv_first if form == "conv first" else torch.ops.gatewise.fused_mbconv
    for stride, rows, channels in ((1, 0, 0), (2, 2, 8)):
        torch.library.opcheck(operator.default, (*tensors, stride, "silu", "relu", stride == 1, rows, channels))


@pytest.mark.untyped
@pytest.mark.parametrize("form", FORMS)
def test_it_compiles_whole(form):
    tensors = make(form, dtype=torch.float32)
    fused, reference = FUNCTIONS[form]
    with torch.no_grad():
        y = torch.compile(fused, fullgraph=True, backend="aot_eager")(*tensors, residual=True)
    torch.testing.assert_close(y, reference(*tensors, residual=True), rtol=1e-4, atol=1e-5)


class _Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(make("mbconv", dtype=torch.float32)[1:])

    def forward(self, x):
        return fused_mbconv(x, *self.weights)


@pytest.mark.untyped
def test_exported_programs_hold_plain_convolutions():
    program = torch.export.export(_Block().requires_grad_(False), (torch.randn(2, 8, 6, 6),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {"aten.conv2d.default", "aten.silu.default"}


@pytest.mark.untyped
@pytest.mark.parametrize("form", FORMS)
def test_counters_see_as_many_operations_as_in_the_plain_block(form):
    from torch.utils.flop_counter import FlopCounterMode

    tensors = make(form, batch=2, out=6, dtype=torch.float32)
    counts = []
    for function in FUNCTIONS[form]:
        counter = FlopCounterMode(display=False)
        with counter:
            function(*tensors, stride=2)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_autocast_casts_as_for_any_convolution():
    tensors = make("conv first", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = fused_conv_first(*tensors)
        assert fused_conv_first(*make("conv first")).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), fused_conv_first(*tensors), rtol=5e-2, atol=5e-2)


def test_an_empty_batch():
    x, *weights = make("mbconv")
    assert fused_mbconv(x[:0], *weights).shape == (0, 8, 7, 5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("changed", "given", "message"),
    [
        ({0: (8, 7, 5)}, {}, r"\(batch, channels, height, width\), not \(8, 7, 5\)"),
        ({1: (8, 2, 4, 4)}, {}, r"square and odd, not \(4, 4\)"),
        ({1: (8, 3, 3, 3)}, {}, "8 channels into 8 are not a multiple of group width 3"),
        ({1: (8, 9)}, {}, r"weights must be \(out, in, k, k\), not \(8, 9\)"),
        ({3: (16, 9, 1, 1)}, {}, r"1x1 and fit its input, not \(16, 9, 1, 1\)"),
        ({5: (8, 17, 1, 1)}, {}, r"\(out, 16, 1, 1\), not \(8, 17, 1, 1\)"),
        ({4: (15,)}, {}, r"one entry per output channel of its weight, not \(15,\)"),
        ({}, {"stride": 3}, "stride must be 1 or 2, not 3"),
        ({}, {"activation": "tanh"}, "hardswish, not tanh"),
        ({}, {"stride": 2, "residual": True}, "not stride 2 and 8, 8"),
        ({5: (6, 16, 1, 1), 6: (6,)}, {"residual": True}, "not stride 1 and 8, 6"),
        ({}, {"tile": Tile(0, 5, 8)}, r"a row and a channel at least, not \(0, 5, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed, given, message):
    tensors = make("conv first")
    for position, shape in changed.items():
        tensors[position] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        fused_conv_first(*tensors, **given)


@pytest.mark.untyped
def test_chunks_that_cut_groups_and_widths_that_differ_are_refused():
    tensors = make("mbconv", group=8)
    with pytest.raises(ValueError, match="a chunk of 12 channels cuts groups of 8"):
        fused_mbconv(*tensors, tile=Tile(2, 5, 12))
    tensors[1], tensors[2] = torch.zeros(24, 8, 1, 1).double(), None
    with pytest.raises(ValueError, match="filters 16 channels, the expansion makes 24"):
        fused_mbconv(*tensors)


def test_the_operator_refuses_gradients_where_it_is_called_itself():
    tensors = [tensor.requires_grad_() for tensor in make("mbconv")]
    y = torch.ops.gatewise.fused_mbconv(*tensors, 1, "silu", "silu", False, 0, 0)
    with pytest.raises((RuntimeError, NotImplementedError), match="no autograd formula"):
        y.sum().backward()


def test_half_precision_is_planned_without_chunks_which_it_would_have_to_add_in_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "plan_bands", lambda *given: seen.append(plan_bands(*given)) or seen[-1])
    monkeypatch.setattr(module, "cache_bytes", lambda: 4000)
    for dtype in (torch.float32, torch.bfloat16):
        fused_conv_first(*make("conv first", hidden=96, size=(19, 17), dtype=dtype))
    assert seen[0].channels < seen[1].channels == 96


def test_tiles_are_planned_for_four_caches(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "cache_bytes", lambda: 1000)
    monkeypatch.setattr(module, "plan_bands", lambda shape, capacity, unit: seen.append((capacity, unit)) or WHOLE)
    fused_mbconv(*make("mbconv"))
    assert seen == [(4000, 8)]
