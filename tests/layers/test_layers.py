"""Modules that networks share."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.layers.conv import ConvNormAct
from gatewise.layers.drop_path import DropPath, drop_path_rates
from gatewise.layers.fold_norm import fold_into_next, fold_into_previous, scale_outputs
from gatewise.layers.grn import GlobalResponseNorm
from gatewise.layers.inverted_residual import InvertedResidual, SplitInvertedResidual
from gatewise.layers.norm import LayerNorm2d
from gatewise.layers.squeeze_excite import SqueezeExcite


def with_statistics(module: nn.Module) -> nn.Module:
    """Batch norms as after training: statistics and affine parameters away from their initial values."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias)
    return module.eval()


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    layer = DropPath(0.25).train()
    y = layer(torch.ones(4000, 3, 2))
    per_sample = y[:, 0, 0]
    assert set(per_sample.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y, per_sample[:, None, None].expand_as(y))
    assert per_sample.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(layer.eval()(y), y)
    with pytest.raises(ValueError, match=r"in \[0, 1\), not 1.0"):
        DropPath(1.0)


def test_drop_path_rates_grow_over_all_blocks():
    assert drop_path_rates(0.3, (1, 2, 1)) == [[0.0], pytest.approx([0.1, 0.2]), [pytest.approx(0.3)]]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 20), kernel=st.sampled_from([1, 3, 5]), stride=st.integers(1, 3), dilation=st.integers(1, 2))
def test_same_padding_is_tensorflows(size, kernel, stride, dilation):
    torch.manual_seed(0)
    unit = ConvNormAct(2, 3, kernel, stride, dilation=dilation, padding="same", act=None).eval()
    x = torch.randn(1, 2, size, size + 3)
    out = unit(x)
    assert tuple(out.shape[2:]) == (-(-size // stride), -(-(size + 3) // stride))
    margins = []
    for length in (size + 3, size):
        total = max((-(-length // stride) - 1) * stride + dilation * (kernel - 1) + 1 - length, 0)
        margins += [total // 2, total - total // 2]
    expected = F.conv2d(F.pad(x, margins), unit.conv.weight, stride=stride, dilation=dilation)
    assert torch.allclose(out, unit.norm(expected), atol=1e-6)


@pytest.mark.untyped
def test_an_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="padding must be one of symmetric, same"):
        ConvNormAct(1, 1, padding="valid")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_norm_folds_into_the_convolution_before_it(bias, groups):
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=groups, bias=bias).double()
    norm = with_statistics(nn.BatchNorm2d(12)).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    expected = norm(conv(x))
    fold_into_previous(conv, norm)
    assert torch.allclose(conv(x), expected, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 12, 2, stride=2), nn.Conv2d(8, 12, 1, bias=False)])
def test_a_norm_folds_into_the_convolution_behind_it(layer):
    norm = with_statistics(nn.BatchNorm2d(8)).double()
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    layer = layer.double()
    expected = layer(norm(x))
    fold_into_next(norm, layer)
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_a_norm_folds_in_two_parts_into_what_is_before_and_behind_it():
    norm = with_statistics(nn.BatchNorm2d(8)).double()
    conv, layer = nn.Conv2d(3, 3, 3, padding=1).double(), nn.Conv2d(8, 12, 1).double()
    untouched, x = torch.randn(2, 5, 6, 6).double(), torch.randn(2, 3, 6, 6).double()
    expected = layer(norm(torch.cat([untouched, conv(x)], dim=1)))
    fold_into_previous(conv, norm, slice(5, 8))
    fold_into_next(norm, layer, slice(5))
    assert torch.allclose(layer(torch.cat([untouched, conv(x)], dim=1)), expected, atol=1e-12)


def test_a_norm_does_not_fold_into_padding_or_groups():
    norm = with_statistics(nn.BatchNorm2d(8))
    for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, groups=8)):
        with pytest.raises(ValueError, match="without groups and without padding"):
            fold_into_next(norm, layer)
    with pytest.raises(ValueError, match="without running statistics"):
        fold_into_previous(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False))


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 1), nn.LayerNorm(6)])
def test_a_scale_folds_into_the_layer_before_it(layer):
    shape, axes = {nn.Linear: ((3, 4), 0), nn.LayerNorm: ((3, 6), 0), nn.Conv2d: ((3, 4, 5, 5), 2)}[type(layer)]
    scale, x = torch.randn(6), torch.randn(shape)
    expected = layer(x) * scale.reshape(-1, *[1] * axes)
    scale_outputs(layer, scale)
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_a_split_block_computes_the_same(parts, stride, padding):
    block = with_statistics(InvertedResidual(8, 8, stride, 6, padding=padding)).double()
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        error = (SplitInvertedResidual(block, parts)(x) - block(x)).abs().max() / block(x).std()
    assert error < 1e-12


def test_a_split_block_leaves_the_block_alone():
    block = with_statistics(InvertedResidual(8, 8, 1, 6))
    before = {key: value.clone() for key, value in block.state_dict().items()}
    SplitInvertedResidual(block, 2)
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="no hidden tensor to split"):
        SplitInvertedResidual(InvertedResidual(8, 8, 1, 1), 2)
    with pytest.raises(ValueError, match="parts must be 1 to 48"):
        SplitInvertedResidual(InvertedResidual(8, 8, 1, 6), 49)
    with pytest.raises(ValueError, match="stride must be 1 or 2, not 3"):
        InvertedResidual(8, 8, 3, 6)


def test_layer_norm_over_channels():
    norm, x = LayerNorm2d(6), torch.randn(2, 6, 3, 4)
    nn.init.normal_(norm.weight)
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    expected = (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None]
    assert torch.allclose(norm(x), expected, atol=1e-6)


@pytest.mark.parametrize("channels", ["first", "last"])
def test_global_response_norm_is_its_definition(channels):
    norm = GlobalResponseNorm(6, channels)
    x = torch.randn(2, 6, 4, 5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    energy = x.square().sum(dim=(2, 3)).sqrt()
    relative = energy / (energy.mean(dim=1, keepdim=True) + 1e-6)
    expected = (norm.weight.flatten() * relative + 1)[:, :, None, None] * x + norm.bias.flatten()[:, None, None]
    found = norm(x) if channels == "first" else norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)


def test_global_response_norm_starts_as_an_identity_and_survives_half_precision():
    norm = GlobalResponseNorm(4)
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(norm(x), x)
    nn.init.ones_(norm.weight)
    large = torch.full((1, 4, 300, 300), 100.0, dtype=torch.float16)
    torch.testing.assert_close(norm.half()(large), 2 * large)


def test_squeeze_excite_scales_channels_by_the_mean():
    layer = SqueezeExcite(6, 3)
    x = torch.randn(2, 6, 4, 5)
    hidden = (x.mean(dim=(2, 3)) @ layer.reduce.weight[:, :, 0, 0].T + layer.reduce.bias).relu()
    gate = (hidden @ layer.expand.weight[:, :, 0, 0].T + layer.expand.bias).sigmoid()
    torch.testing.assert_close(layer(x), x * gate[:, :, None, None])
    torch.testing.assert_close(layer.read_gates(x)["channels"], gate)
    with pytest.raises(ValueError, match="at least one hidden channel, not 0"):
        SqueezeExcite(6, 0)
