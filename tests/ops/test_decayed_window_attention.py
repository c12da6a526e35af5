"""Decayed window attention: values and gradients against the definition, its constants, and what it lets through."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.ops import decayed_window_attention as module
from gatewise.ops.decayed_window_attention import (
    adaptive_window,
    balanced_slopes,
    decayed_window_attention,
    decayed_window_attention_reference,
    head_log_decay,
    manhattan_attention,
    window_mask_reference,
)
from tests.conftest import FINGERPRINTS

WORKED = json.loads((FINGERPRINTS / "gated-swinrmt" / "decay_and_slopes.json").read_text())
FORMS = [(activation, decay) for activation in module.ACTIVATIONS for decay in module.DECAYS]


def make(batch=2, height=5, width=6, heads=2, head_dim=3, value_dim=None, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    dims = (head_dim, head_dim, head_dim if value_dim is None else value_dim)
    maps = [torch.randn(batch, height, width, heads, dim, generator=draw, dtype=torch.float64) for dim in dims]
    return [x.to(dtype) for x in maps]


def by_head(heads=2, dtype=torch.float64):
    return {"log_decay": head_log_decay(heads, 2, 4).to(dtype), "slopes": balanced_slopes(heads).to(dtype)}


def results(function, maps, given, **options):
    """Output and gradients for queries, keys, values, decays and slopes."""
    leaves = [tensor.detach().requires_grad_() for tensor in maps]
    given = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    y = function(*leaves, **given, **options)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad((y * cotangent).sum(), [*leaves, *given.values()])]


def assert_equals_definition(maps, given, **options):
    found = results(decayed_window_attention, maps, given, **options)
    expected = results(decayed_window_attention_reference, maps, given, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    window=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    form=st.sampled_from(FORMS),
    is_shifted=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    value_dim=st.integers(1, 4),
    small=st.sampled_from([0, 16]),
)
def test_values_and_gradients_equal_the_definition(
    window, height, width, batch, heads, form, is_shifted, scale, value_dim, small
):
    """The reference pads, rolls and masks. With 0, all windows are large, and softmax attention is fused."""
    maps = make(batch, height, width, heads, 3, value_dim)
    shift = (window[0] // 2, window[1] // 2) if is_shifted else (0, 0)
    options = {"activation": form[0], "decay": form[1], "window": window, "shift": shift, "scale": scale}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMALL", small)
        assert_equals_definition(maps, by_head(heads), **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [(), ("log_decay",), ("slopes",)])
def test_decay_and_slopes_may_be_left_out(form, names):
    given = {name: by_head()[name] for name in names}
    assert_equals_definition(make(), given, activation=form[0], decay=form[1], window=(3, 4), shift=(1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_no_window_is_one_as_large_as_the_map(form):
    options = {"activation": form[0], "decay": form[1]}
    maps, given = make(height=17, width=19), by_head()
    assert_equals_definition(maps, given, **options)
    y = decayed_window_attention(*maps, **given, **options)
    assert torch.equal(y, decayed_window_attention(*maps, **given, window=(17, 19), **options))


@pytest.mark.parametrize("form", FORMS)
def test_non_contiguous_inputs(form):
    maps = [x.transpose(1, 2)[:, ::2] for x in make(height=4, width=10)]
    assert_equals_definition(maps, by_head(), activation=form[0], decay=form[1], window=(3, 3), shift=(1, 1))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_right(form):
    leaves = [tensor.requires_grad_() for tensor in (*make(1, 4, 3), *by_head().values())]

    def attend(*arguments):
        return decayed_window_attention(*arguments, activation=form[0], decay=form[1], window=(2, 2), shift=(1, 1))

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_close_to_float32(form):
    maps, given = make(dtype=torch.bfloat16), by_head(dtype=torch.float32)
    options = {"activation": form[0], "decay": form[1], "window": (3, 4), "shift": (1, 2)}
    half = results(decayed_window_attention, maps, given, **options)
    wide = results(decayed_window_attention, [tensor.float() for tensor in maps], given, **options)
    # Eight bits of mantissa; what a head's decay and slope get is a sum over all pairs, in which much cancels.
    for ours, theirs, tolerance in zip(half, wide, [2e-2] * 4 + [1e-1] * 2, strict=True):
        assert ours.dtype == (torch.bfloat16 if tolerance < 0.1 else torch.float32)
        assert (ours.float() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_weights_of_half_precision_are_computed_in_float32_under_autocast():
    """Logits near 1000 leave bfloat16 steps of 4 between them, which a sigmoid would take for all or nothing."""
    q = torch.full((1, 1, 2, 1, 2), 22.0, dtype=torch.bfloat16)
    k = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.bfloat16).reshape(1, 1, 2, 1, 2)
    slopes = torch.tensor([-44.5])
    with torch.autocast("cpu", torch.bfloat16):
        y = decayed_window_attention(
            q, k, torch.eye(2).reshape(1, 1, 2, 1, 2), None, slopes, activation="sigmoid", window=(1, 2), scale=1.0
        )
    own = torch.tensor(44.0).sigmoid()
    expected = torch.stack([own, torch.tensor(-0.5).sigmoid()]) * own
    assert torch.allclose(y[0, 0, 0, 0].float(), expected, atol=4e-3)


def test_long_axes_keep_no_weights_for_training():
    maps = [x.requires_grad_() for x in make(1, 1, 96, heads=1, head_dim=8, dtype=torch.float32)]
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decayed_window_attention(*maps, head_log_decay(1, 2, 4))
    # The bias by distance is laid out once for all rows; weights would be as many again for every row.
    assert max(kept) <= 96 * 96
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        decayed_window_attention(*[x.expand(8, 4, -1, -1, -1) for x in maps], head_log_decay(1, 2, 4))
    assert max(kept) < 32 * 96 * 96 / 3


def weights(height, width, head, **options):
    """Of every pair of positions of a map, (H, W, H, W), with queries and keys of zero."""
    positions = height * width
    zeros = torch.zeros(1, height, width, 4, 2, dtype=torch.float64)
    v = torch.eye(positions, dtype=torch.float64).reshape(1, height, width, 1, positions).expand(-1, -1, -1, 4, -1)
    y = decayed_window_attention(zeros, zeros, v, head_log_decay(4, 2, 4).double(), **options)
    return y[0, :, :, head].unflatten(-1, (height, width))


def manhattan_powers(height, width, head):
    """gamma^(Manhattan distance), with gamma as stated: 0.75, 0.875, 0.9375, 0.96875."""
    gamma = (0.75, 0.875, 0.9375, 0.96875)[head]
    rows, columns = torch.arange(height), torch.arange(width)
    down = (rows[:, None] - rows).abs()[:, None, :, None]
    across = (columns[:, None] - columns).abs()[None, :, None, :]
    return gamma ** (down + across).double()


@pytest.mark.parametrize("head", range(4))
def test_without_content_weights_fall_with_the_manhattan_distance(head):
    found, expected = weights(5, 7, head), manhattan_powers(5, 7, head)
    assert torch.allclose(found, expected / expected.sum(dim=(2, 3), keepdim=True), rtol=1e-6, atol=0)
    sigmoids = weights(5, 7, head, activation="sigmoid", decay="multiplicative")
    assert torch.allclose(sigmoids, 0.25 * expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_passes_a_window_or_a_seam(form):
    """Axis of 16, windows of 7, shifted by 3: 0-2, 3-9 and 10-15."""
    q, k, v = (x.requires_grad_() for x in make(1, 16, 16, heads=1))
    log_decay, slopes = by_head(1).values()
    y = decayed_window_attention(
        q, k, v, log_decay, slopes, activation=form[0], decay=form[1], window=(7, 7), shift=(3, 3)
    )
    places = [range(3), range(3, 10), range(10, 16)]
    for rows in places:
        for columns in places:
            here = torch.zeros(16, 16, dtype=torch.bool)
            here[rows.start : rows.stop, columns.start : columns.stop] = True
            found = torch.autograd.grad(y[0, here].square().sum(), (q, k, v), retain_graph=True)
            for gradient in found:
                assert (gradient[0, ~here] == 0).all()
            # Each sees all of its window's values.
            assert found[2][0, here].abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 8, 15])
def test_no_size_gives_nan(form, length):
    maps = [x.requires_grad_() for x in make(1, length, 1)]
    y = decayed_window_attention(*maps, **by_head(), activation=form[0], decay=form[1], window=(7, 7), shift=(3, 3))
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), maps))


def test_of_a_single_position_softmax_takes_all_and_a_sigmoid_its_share():
    q, k, v = make(1, 1, 1)
    assert torch.allclose(decayed_window_attention(q, k, v), v)
    share = (q * k).sum(dim=-1, keepdim=True).mul(3**-0.5).sigmoid()
    assert torch.allclose(decayed_window_attention(q, k, v, activation="sigmoid"), share**2 * v)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (6, 4)])
def test_manhattan_attention_is_a_softmax_over_the_whole_map(height, width):
    maps, log_decay = make(2, height, width), by_head()["log_decay"]

    def by_definition(q, k, v, log_decay):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        distance = (grid[:, None] - grid).abs().sum(dim=-1)
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        logits = query @ key.mT * 3**-0.5 + log_decay[:, None, None] * distance
        return (logits.softmax(dim=-1) @ value).transpose(1, 2).unflatten(1, (height, width))

    found = results(manhattan_attention, maps, {"log_decay": log_decay})
    expected = results(by_definition, maps, {"log_decay": log_decay})
    assert all(
        torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11) for ours, theirs in zip(found, expected, strict=True)
    )
    plain = manhattan_attention(*maps, scale=0.5)
    assert torch.allclose(plain, manhattan_attention(*maps, torch.zeros(2, dtype=torch.float64), scale=0.5))


@pytest.mark.parametrize("name", WORKED["log_decay"])
def test_log_decays_are_those_worked_out(name):
    heads, init, spread = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
    expected = torch.tensor(WORKED["log_decay"][name], dtype=torch.float64)
    assert torch.allclose(head_log_decay(heads, init, spread).double(), expected, rtol=1e-6)


def test_log_decays_near_zero_keep_their_digits():
    """1 - 2^-20 has one bit left to say so in float32."""
    assert head_log_decay(1, 20, 0).item() == pytest.approx(math.log1p(-(2**-20)), rel=1e-6)


@pytest.mark.parametrize("heads", WORKED["balanced_alibi_slopes"])
def test_slopes_are_those_worked_out(heads):
    expected = torch.tensor(WORKED["balanced_alibi_slopes"][heads])
    assert torch.allclose(balanced_slopes(int(heads)), expected, rtol=1e-6)


def test_a_single_head_has_a_negative_slope():
    assert balanced_slopes(1).tolist() == [-(2**-8)]


def test_windows_adapt_as_worked_out():
    found = {length: adaptive_window(int(length), 7) for length in WORKED["adaptive_window"]}
    assert found == WORKED["adaptive_window"]
    assert adaptive_window(50, None) == 50


def test_the_mask_is_the_one_worked_out():
    expected = torch.tensor(WORKED["axis_16_shifted"]["allowed"]).bool()
    assert torch.equal(window_mask_reference(16, 7, 3), expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation must be one of softmax, sigmoid, not 'relu'"),
        ({"decay": "none"}, "decay must be one of additive, multiplicative, not 'none'"),
        ({"window": (0, 2)}, "at least one row and one column, not 0x2"),
        ({"window": (2, 2), "shift": (0, 2)}, r"from 0 to below the window 2x2, not \(0, 2\)"),
        ({"log_decay": torch.zeros(3)}, r"log_decay must have one entry per head, \(2,\), not shape \(3,\)"),
        ({"slopes": torch.zeros(2, 1)}, r"slopes must have one entry per head, \(2,\), not shape \(2, 1\)"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        decayed_window_attention(*make(), **options)


@pytest.mark.untyped
@pytest.mark.parametrize("function", [decayed_window_attention, manhattan_attention])
def test_maps_that_do_not_fit_together_are_told(function):
    q, k, v = make()
    with pytest.raises(ValueError, match=r"q and k must be \(batch, height, width, heads, head_dim\)"):
        function(q, k[:, 1:], v)
    with pytest.raises(ValueError, match="the same but for its last axis"):
        function(q, k, v[..., :1, :])


@pytest.mark.parametrize("init", [0, -1])
def test_a_decay_that_is_none_is_refused(init):
    with pytest.raises(ValueError, match=f"a positive init, and init . spread too, not {init} and 4"):
        head_log_decay(4, init, 4)
