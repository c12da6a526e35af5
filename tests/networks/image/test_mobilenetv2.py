"""MobileNetV2, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch

from gatewise.networks.image.mobilenetv2 import MobileNetV2Config, round_channels
from tests.conftest import small_model


@pytest.mark.parametrize(
    ("value", "rounded"), [(44.8, 48), (33.6, 32), (22.4, 24), (11.2, 16), (4, 8), (8.4, 8), (134.4, 136), (1792, 1792)]
)
def test_channels_round_to_eight_and_never_lose_a_tenth(value, rounded):
    assert round_channels(value) == rounded


@pytest.mark.parametrize(
    ("output_stride", "strides", "dilations"),
    [
        (32, (1, 2, 2, 2, 1, 2, 1), ((1,), (1, 1), (1, 1, 1), (1,) * 4, (1,) * 3, (1, 1, 1), (1,))),
        (16, (1, 2, 2, 2, 1, 1, 1), ((1,), (1, 1), (1, 1, 1), (1,) * 4, (1,) * 3, (1, 2, 2), (2,))),
        (8, (1, 2, 2, 1, 1, 1, 1), ((1,), (1, 1), (1, 1, 1), (1, 2, 2, 2), (2,) * 3, (2, 4, 4), (4,))),
    ],
)
def test_dilation_takes_the_place_of_stride(output_stride, strides, dilations):
    plan = MobileNetV2Config(output_stride=output_stride).plan()
    assert tuple(row[0][0] for row in plan) == strides
    assert tuple(tuple(dilation for _, dilation in row) for row in plan) == dilations


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_levels_keep_the_output_stride(output_stride):
    model = small_model("mobilenetv2_035", output_stride=output_stride)
    levels = model.forward_pyramid(torch.randn(1, 3, 65, 97))
    assert [info.stride for info in model.feature_info] == [min(s, output_stride) for s in (4, 8, 16, 32)]
    for level, info in zip(levels, model.feature_info, strict=True):
        assert tuple(level.shape[2:]) == (-(-65 // info.stride), -(-97 // info.stride))


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (31, 64)])
def test_every_size_from_one_pixel_up_runs_and_rounds_up(size):
    model = small_model("mobilenetv2_035")
    features = model.forward_features(torch.randn(1, 3, *size))
    assert tuple(features.shape[2:]) == tuple(-(-length // 32) for length in size)


def test_depth_multiplier_leaves_the_ends_alone():
    assert MobileNetV2Config(depth_mult=1.2).repeats == (1, 3, 4, 5, 4, 4, 1)
    assert MobileNetV2Config(depth_mult=1.4).repeats == (1, 3, 5, 6, 5, 5, 1)


def test_the_form_for_features_has_neither_last_convolution_nor_classifier():
    model = small_model("mobilenetv2_035", features_only=True, num_classes=0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 112)
    assert sum(parameter.numel() for parameter in model.classifier.parameters()) == 0


def test_every_level_from_stride_two_on_can_be_had():
    model = small_model("mobilenetv2_035", out_indices=(0, 1, 2, 3, 4))
    assert [info.stride for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert len(model.forward_pyramid(torch.randn(1, 3, 64, 64))) == 5


def test_weights_start_as_published():
    model = type(small_model("mobilenetv2_035"))(MobileNetV2Config(num_classes=50))
    weight = model.head_conv.conv.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.stem.norm.eps == 1e-5


def test_narrow_networks_warn_of_the_minimum():
    with pytest.warns(UserWarning, match="width_mult 0.25 is below 0.35"):
        MobileNetV2Config(width_mult=0.25)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, not 4"),
        ({"padding": "valid"}, "padding must be one of symmetric, same, not 'valid'"),
        ({"width_mult": 0.0}, "multipliers must be positive"),
        ({"features_only": True}, "pass num_classes=0"),
        ({"out_indices": (5,)}, "out_indices must be levels 0..4"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2Config(**fields)
