"""MobileNetV2, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.mobilenetv2 import MobileNetV2Config, round_channels
from tests.conftest import small_model

SMALL = {
    "mobilenetv2_035": {"num_classes": 5},
}

CARDS = {
    "mobilenetv2_035": (1_677_128, 59_285_808),
    "mobilenetv2_050": (1_968_680, 97_131_840),
    "mobilenetv2_075": (2_636_424, 209_069_792),
    "mobilenetv2_100": (3_504_872, 300_774_272),
    "mobilenetv2_130": (5_386_792, 509_374_560),
    "mobilenetv2_140": (6_108_776, 582_195_824),
    "mobilenetv2_110d": (4_516_520, 430_516_080),
    "mobilenetv2_120d": (5_831_144, 668_857_568),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published tables."""

MACS_AT_SMALLER_INPUTS = {
    "mobilenetv2_035": (43_896_512, 30_874_800, 20_220_672, 11_934_128),
    "mobilenetv2_050": (71_701_760, 50_184_000, 32_578_560, 18_885_440),
    "mobilenetv2_075": (153_941_888, 107_295_200, 69_129_728, 39_445_472),
    "mobilenetv2_100": (221_316_608, 154_083_200, 99_074_048, 56_289_152),
    "mobilenetv2_130": (374_675_840, 260_700_000, 167_447_040, 94_916_960),
    "mobilenetv2_140": (428_211_136, 297_916_400, 191_311_616, 108_396_784),
}
"""MACs at 192, 160, 128 and 96 pixels."""


@pytest.mark.parametrize("name", MACS_AT_SMALLER_INPUTS)
def test_macs_at_smaller_inputs(name):
    with torch.device("meta"):
        model = gatewise.create_model(name).eval()
        macs = [count(model, torch.empty(1, 3, size, size)).macs for size in (192, 160, 128, 96)]
    assert tuple(macs) == MACS_AT_SMALLER_INPUTS[name]


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
    assert sum(parameter.numel() for parameter in model.head.parameters()) == 0


def test_every_level_from_stride_two_on_can_be_had():
    model = small_model("mobilenetv2_035", out_indices=(0, 1, 2, 3, 4))
    assert [info.stride for info in model.feature_info] == [2, 4, 8, 16, 32]
    assert len(model.forward_pyramid(torch.randn(1, 3, 64, 64))) == 5


def test_weights_start_as_published():
    model = type(small_model("mobilenetv2_035"))(MobileNetV2Config(num_classes=50))
    weight = model.head_conv.conv.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.05)
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
