"""Window attention: values and gradients against the definition, windows, biases by position, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import window_attention as module
from gatewise.ops.window_attention import (
    fit_window,
    merge,
    partition,
    relative_position_bias,
    relative_position_bias_reference,
    resize_table,
    window_attention,
    window_attention_reference,
)


def make(batch=2, height=4, width=6, heads=2, head_dim=3, value_dim=None, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    dims = (head_dim, head_dim, head_dim if value_dim is None else value_dim)
    return [
        torch.randn(batch, height, width, heads, dim, generator=draw, dtype=torch.float64).to(dtype) for dim in dims
    ]


def position(kind, window, heads=2, dtype=torch.float64):
    """Keyword arguments that add a bias of this kind."""
    draw = torch.Generator().manual_seed(1)
    if kind == "none":
        return {}
    tokens = window[0] * window[1]
    shape = (heads, tokens, tokens) if kind == "bias" else (heads, 2 * window[0] - 1, 2 * window[1] - 1)
    return {kind: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)}


def results(function, maps, added, **options):
    """Output and gradients for queries, keys, values and the bias or table."""
    leaves = [tensor.detach().requires_grad_() for tensor in maps]
    added = {name: tensor.detach().requires_grad_() for name, tensor in added.items()}
    y = function(*leaves, **added, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), [*leaves, *added.values()])]


def assert_equals_definition(maps, added, **options):
    found = results(window_attention, maps, added, **options)
    expected = results(window_attention_reference, maps, added, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    down=st.integers(1, 3),
    across=st.integers(1, 3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    kind=st.sampled_from(["none", "bias", "table"]),
    scale=st.sampled_from([None, 0.3]),
    value_dim=st.integers(1, 4),
)
def test_values_and_gradients_equal_the_definition(window, down, across, batch, heads, kind, scale, value_dim):
    maps = make(batch, window[0] * down, window[1] * across, heads, 3, value_dim)
    assert_equals_definition(maps, position(kind, window, heads), window=window, scale=scale)


@settings(max_examples=40, deadline=None)
@given(
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 2),
    kind=st.sampled_from(["none", "bias", "table"]),
)
def test_padding_masks_the_keys_that_it_adds(window, height, width, batch, kind):
    """The reference pads with zeros and masks; windows that stick out of the map are smaller here."""
    assert_equals_definition(make(batch, height, width), position(kind, window), window=window, pad=True)


@pytest.mark.parametrize("limit", [1, 2 * 3 * 12, 2 * 6 * 12])
@pytest.mark.parametrize("window", [None, (4, 3)])
def test_large_biases_are_laid_out_a_few_rows_at_a_time(monkeypatch, limit, window):
    monkeypatch.setattr(module, "_LARGEST_BIAS_ON_CPU", limit)
    assert_equals_definition(make(), position("table", window or (4, 6)), window=window)


def test_non_contiguous_inputs(monkeypatch):
    maps = [x.transpose(1, 2)[:, ::2] for x in make(height=4, width=6)]
    added = {"table": position("table", (4, 3))["table"].transpose(1, 2)}
    assert_equals_definition(maps, added, window=(3, 4))
    monkeypatch.setattr(module, "_LARGEST_BIAS_ON_CPU", 1)
    assert_equals_definition(maps, added, window=(3, 4))


def test_gradients_are_right():
    maps = [tensor.requires_grad_() for tensor in make(1, 4, 2)]
    table = position("table", (2, 2))["table"].requires_grad_()

    def attend(q, k, v, table):
        return window_attention(q, k, v, table=table, window=(2, 2))

    assert torch.autograd.gradcheck(attend, (*maps, table))


@pytest.mark.parametrize("kind", ["none", "bias", "table"])
def test_bfloat16_stays_close_to_float32(kind):
    maps, added = make(dtype=torch.bfloat16), position(kind, (2, 3), dtype=torch.bfloat16)
    half = results(window_attention, maps, added, window=(2, 3))
    wide = results(
        window_attention,
        [tensor.float() for tensor in maps],
        {name: tensor.float() for name, tensor in added.items()},
        window=(2, 3),
    )
    for ours, theirs in zip(half, wide, strict=True):
        assert ours.dtype == torch.bfloat16
        # Eight bits of mantissa.
        assert (ours.float() - theirs).abs().max() < 2e-2 * theirs.abs().max()


def test_a_bias_in_float32_may_meet_maps_in_half_precision():
    maps = make(dtype=torch.bfloat16)
    for kind in ("bias", "table"):
        assert window_attention(*maps, **position(kind, (2, 3), dtype=torch.float32), window=(2, 3)).dtype == (
            torch.bfloat16
        )


def test_the_bias_looks_from_the_query_to_the_key():
    table = torch.arange(15.0).reshape(1, 3, 5)
    bias = relative_position_bias(table, (2, 3)).reshape(2, 3, 2, 3)
    assert bias[0, 0, 0, 0] == table[0, 1, 2]
    assert bias[0, 0, 1, 2] == table[0, 2, 4]
    assert bias[1, 2, 0, 0] == table[0, 0, 0]
    assert bias[0, 1, 0, 2] == table[0, 1, 3]


@settings(max_examples=20, deadline=None)
@given(window=st.tuples(st.integers(1, 5), st.integers(1, 5)), heads=st.integers(1, 3))
def test_the_bias_equals_its_definition(window, heads):
    table = position("table", window, heads)["table"]
    assert torch.equal(relative_position_bias(table, window), relative_position_bias_reference(table, window))


def test_a_table_that_fits_is_left_alone():
    table = torch.randn(2, 7, 5)
    assert resize_table(table, (4, 3)) is table


@pytest.mark.parametrize("window", [(8, 6), (3, 2)])
def test_a_table_that_is_linear_in_the_offset_stays_so_away_from_its_border(window):
    rows, columns = torch.arange(-6.0, 7), torch.arange(-4.0, 5)
    table = (2 * rows[:, None] - 3 * columns)[None]
    resized = resize_table(table, window)
    assert resized.shape == (1, 2 * window[0] - 1, 2 * window[1] - 1)
    steps = {1: 2 * 13 / resized.shape[1], 2: -3 * 9 / resized.shape[2]}
    inner = resized[:, 1:-1, 1:-1]
    for axis, step in steps.items():
        assert torch.allclose(inner.diff(dim=axis), torch.tensor(step), atol=1e-5)
    assert inner[0, (inner.shape[1] - 1) // 2, (inner.shape[2] - 1) // 2] == pytest.approx(0, abs=1e-5)


def test_a_table_in_half_precision_is_resized_in_float32():
    table = torch.randn(2, 5, 5).bfloat16()
    assert torch.equal(resize_table(table, (4, 4)), resize_table(table.float(), (4, 4)))


def test_windows_of_a_map_make_the_map():
    x = torch.arange(2 * 4 * 6).reshape(2, 4, 6, 1, 1).expand(2, 4, 6, 2, 3).float()
    windows = partition(x, (2, 3))
    assert windows.shape == (8, 6, 2, 3)
    assert windows[1, :, 0, 0].tolist() == [3, 4, 5, 9, 10, 11]
    assert torch.equal(merge(windows, (2, 3), 4, 6), x)
    flat = torch.randn(3, 4, 6)
    assert torch.equal(merge(partition(flat, (4, 2)), (4, 2), 4, 6), flat)


@pytest.mark.parametrize(("window", "fitted"), [(None, (5, 7)), ((3, 3), (3, 3)), ((9, 4), (5, 4)), ((9, 9), (5, 7))])
def test_windows_are_no_larger_than_the_map(window, fitted):
    assert fit_window(window, 5, 7) == fitted


def test_windows_of_one_row_or_column_are_axis_attention():
    q, k, v = make(1, 3, 5)
    along = window_attention(q, k, v, window=(1, 5))
    for row in range(3):
        alone = window_attention(*(x[:, row : row + 1] for x in (q, k, v)))
        assert torch.allclose(along[:, row : row + 1], alone)
    across = window_attention(q, k, v, window=(3, 1))
    turned = window_attention(*(x.transpose(1, 2) for x in (q, k, v)), window=(1, 3))
    assert torch.allclose(across, turned.transpose(1, 2))


def test_nothing_passes_from_window_to_window():
    maps = [tensor.requires_grad_() for tensor in make(1, 4, 6)]
    y = window_attention(*maps, **position("table", (2, 3)), window=(2, 3))
    for gradient in torch.autograd.grad(y[:, :2, :3].sum(), maps):
        assert gradient[:, :2, :3].abs().sum() > 0
        assert gradient[:, 2:].abs().sum() == gradient[:, :2, 3:].abs().sum() == 0


def test_without_a_bias_the_order_of_positions_does_not_matter():
    maps = make(2, 3, 4)
    order = torch.randperm(12)

    def permuted(x):
        return x.flatten(1, 2)[:, order].unflatten(1, (3, 4))

    y = window_attention(*map(permuted, maps))
    assert torch.allclose(y, permuted(window_attention(*maps)))
    table = position("table", (3, 4))["table"]
    y = window_attention(*map(permuted, maps), table=table)
    assert not torch.allclose(y, permuted(window_attention(*maps, table=table)), atol=1e-2)


@pytest.mark.untyped
@pytest.mark.parametrize("limit", [2**20, 1])
def test_it_compiles_whole(monkeypatch, limit):
    monkeypatch.setattr(module, "_LARGEST_BIAS", limit)
    maps, added = make(height=5, dtype=torch.float32), position("table", (2, 3), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        results(compiled, maps, added, window=(2, 3), pad=True),
        results(window_attention, maps, added, window=(2, 3), pad=True),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class _Attention(torch.nn.Module):
    def forward(self, q, k, v, table):
        return window_attention(q, k, v, table=table, window=(2, 3), pad=True)


@pytest.mark.untyped
def test_it_exports():
    arguments = (*make(height=5, dtype=torch.float32), position("table", (2, 3), dtype=torch.float32)["table"])
    program = torch.export.export(_Attention(), arguments)
    assert torch.allclose(program.module()(*arguments), _Attention()(*arguments), rtol=1e-4, atol=1e-6)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (3, 3)}, "map 4x6 is not divisible by window 3x3; pad the map or pass pad=True"),
        ({"window": (2, 0)}, "at least one row and one column, not 2x0"),
        ({"window": (2, 3), "bias": torch.zeros(2, 4, 4)}, r"\(2, 6, 6\) for windows of 2x3, not \(2, 4, 4\)"),
        ({"table": torch.zeros(2, 7, 9)}, r"\(2, 7, 11\) for windows of 4x6, not \(2, 7, 9\)"),
        ({"table": torch.zeros(3, 7, 11)}, r"\(2, 7, 11\) for windows of 4x6, not \(3, 7, 11\)"),
        ({"table": torch.zeros(2, 7, 11), "bias": torch.zeros(2, 24, 24)}, "not both"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        window_attention(*make(dtype=torch.float32), **options)


@pytest.mark.untyped
def test_maps_of_other_shapes_are_refused():
    q, k, v = make()
    for maps in ((q[0], k[0], v[0]), (q, k[:, :2], v), (q, k[..., :1], v), (q, k, v[:, :, :, :1])):
        with pytest.raises(ValueError, match=r"q and k must be \(batch, height, width, heads, head_dim\)"):
            window_attention(*maps)
