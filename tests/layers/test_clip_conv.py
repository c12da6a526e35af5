"""Convolutions of clips over space alone and over time alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.layers.clip_conv import FrameConv, TemporalConv, as_clips, as_frames, channels_last, halve_time
from tests.conftest import _moved

sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


def clips(size, channels=4):
    return torch.randn(size[0], channels, *size[1:], dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(size=sizes, kernel=st.sampled_from([1, 3, 5]), stride=st.sampled_from([1, 2]), last=st.booleans())
def test_every_frame_is_convolved_by_itself(size, kernel, stride, last):
    torch.manual_seed(0)
    unit = _moved(FrameConv(4, 3, kernel, stride, act=nn.ReLU)).double()
    x = clips(size)
    expected = F.conv3d(
        x, unit.conv.weight[:, :, None], stride=(1, stride, stride), padding=(0, kernel // 2, kernel // 2)
    )
    norm = unit.norm
    expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.allclose(unit(channels_last(x) if last else x), F.relu(expected), rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(size=sizes, kernel=st.sampled_from([1, 3, 5]), last=st.booleans())
def test_every_position_is_convolved_over_time(size, kernel, last):
    torch.manual_seed(0)
    unit = _moved(TemporalConv(4, 3, kernel, act=None)).double()
    x = clips(size)
    expected = F.conv3d(x, unit.conv.weight[..., None], padding=(kernel // 2, 0, 0))
    norm = unit.norm
    expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.allclose(unit(channels_last(x) if last else x), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", [FrameConv(4, 4, 3, act=nn.ReLU), TemporalConv(4, 4)])
def test_statistics_are_those_of_clips(unit):
    unit = unit.double().train()
    x = clips((3, 4, 5, 6))
    y = unit.conv(as_frames(x)) if isinstance(unit, FrameConv) else unit.conv(x.flatten(3))
    values = y.transpose(0, 1).flatten(1)
    unit(x)
    assert torch.allclose(unit.norm.running_mean, 0.1 * values.mean(dim=1))
    assert torch.allclose(unit.norm.running_var, 0.9 + 0.1 * values.var(dim=1))


@pytest.mark.parametrize("make", [lambda: FrameConv(4, 3, 3, 2, act=nn.ReLU), lambda: TemporalConv(4, 3)])
def test_merged_units_have_no_norm_and_give_the_same(make):
    unit, x = _moved(make()).double(), clips((2, 3, 6, 5))
    merged = unit.merged()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    assert isinstance(unit.norm, nn.BatchNorm2d)
    assert torch.allclose(merged(x), unit(x), rtol=1e-9, atol=1e-12)
    assert torch.equal(merged.merged()(x), merged(x))


def test_in_channels_last_memory_nothing_is_copied():
    x = channels_last(torch.randn(2, 4, 3, 5, 6))
    frames = as_frames(x)
    assert frames.data_ptr() == x.data_ptr()
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert x.flatten(3).data_ptr() == x.data_ptr()
    assert x.flatten(3).is_contiguous(memory_format=torch.channels_last)
    assert channels_last(x).data_ptr() == x.data_ptr()
    for unit in (FrameConv(4, 8, 3, act=nn.ReLU), TemporalConv(4, 8)):
        assert unit(x).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("shape", [(1, 4, 3, 5, 6), (1, 4, 1, 5, 6), (1, 4, 3, 1, 1), (2, 4, 2, 5, 6)])
def test_the_layout_lasts_through_any_chain_of_units(shape):
    chain = nn.Sequential(FrameConv(4, 8, 3, 1, act=nn.ReLU), TemporalConv(8, 8), FrameConv(8, 6, 1, act=None))
    y = chain.eval()(channels_last(torch.randn(shape)))
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@settings(max_examples=20, deadline=None)
@given(size=sizes.filter(lambda size: size[1] > 1), last=st.booleans())
def test_halving_time_is_max_pooling(size, last):
    torch.manual_seed(0)
    x = clips(size).requires_grad_()
    expected = F.max_pool3d(x, (2, 1, 1))
    found = halve_time(channels_last(x) if last else x)
    assert torch.equal(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad((y * cotangent).sum(), x)[0] for y in (found, expected)]
    assert torch.equal(*gradients)


def test_frames_and_clips_are_inverse():
    x = torch.randn(2, 4, 3, 5, 6)
    assert as_frames(x).shape == (6, 4, 5, 6)
    assert torch.equal(as_frames(x)[4], x[1, :, 1])
    assert torch.equal(as_clips(as_frames(x), 3), x)


@pytest.mark.parametrize("kernel", [0, 2, -1])
def test_an_even_kernel_over_time_is_refused(kernel):
    with pytest.raises(ValueError, match=f"odd, positive kernel size, not {kernel}"):
        TemporalConv(2, 2, kernel)
