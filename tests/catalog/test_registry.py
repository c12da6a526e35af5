"""Names, networks and their cards."""

from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.catalog.factory import override
from gatewise.catalog.papers import papers
from gatewise.catalog.registry import families, family_of, implemented, register, registered_names
from gatewise.errors import UnknownNameError, UserError
from gatewise.networks.image.focalnet import FocalNetConfig

TABLE = {
    "focalnet_tiny_srf": (28_427_116, 4_403_335_680),
    "focalnet_tiny_lrf": (28_647_928, 4.475e9),
    "focalnet_small_srf": (49_891_216, 8.599e9),
    "focalnet_small_lrf": (50_342_440, 8.715e9),
    "focalnet_base_srf": (88_148_144, 15.241e9),
    "focalnet_base_lrf": (88_749_768, 15.397e9),
    "focalnet_tiny_iso": (5_880_280, 1.109e9),
    "focalnet_small_iso": (22_376_344, 4.299e9),
    "focalnet_base_iso": (87_237_400, 16.92e9),
    "focalnet_base_iso_preln": (87_218_968, 16.92e9),
    "focalnet_large_fl3": (207_100_744, 35.69e9),
    "focalnet_large_fl4": (207_281_248, 35.73e9),
    "focalnet_xlarge_fl3": (366_082_120, 63.07e9),
    "focalnet_xlarge_fl4": (366_322_784, 63.14e9),
    "focalnet_huge_fl3": (686_564_424, 118.06e9),
    "focalnet_huge_fl4": (689_277_664, 118.76e9),
    "inception_next_atto": (4_156_520, 503_035_040),
    "inception_next_tiny": (28_055_680, 4.189e9),
    "inception_next_small": (49_374_016, 8.356e9),
    "inception_next_base": (86_672_136, 14.841e9),
    "inception_next_base_384": (86_672_136, 43.603e9),
    "convnext_tiny_k5": (28_430_152, 4.404e9),
    "convnext_tiny_k3": (28_324_168, 4.370e9),
    "convnext_tiny_k3_par1_2": (28_291_048, 4.360e9),
    "convnext_tiny_k3_par3_8": (28_282_768, 4.358e9),
    "convnext_tiny_k3_par1_4": (28_274_488, 4.355e9),
    "convnext_tiny_k3_par1_8": (28_266_208, 4.353e9),
    "convnext_tiny_k3_par1_16": (28_262_068, 4.352e9),
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

MOBILENET_MACS = {
    "mobilenetv2_035": (43_896_512, 30_874_800, 20_220_672, 11_934_128),
    "mobilenetv2_050": (71_701_760, 50_184_000, 32_578_560, 18_885_440),
    "mobilenetv2_075": (153_941_888, 107_295_200, 69_129_728, 39_445_472),
    "mobilenetv2_100": (221_316_608, 154_083_200, 99_074_048, 56_289_152),
    "mobilenetv2_130": (374_675_840, 260_700_000, 167_447_040, 94_916_960),
    "mobilenetv2_140": (428_211_136, 297_916_400, 191_311_616, 108_396_784),
}
"""MACs at 192, 160, 128 and 96 pixels."""


@pytest.mark.parametrize("name", TABLE)
def test_card_agrees_with_the_published_table(name):
    card = gatewise.model_card(name)
    parameters, macs = TABLE[name]
    assert card.parameters == parameters
    assert card.macs == (macs if isinstance(macs, int) else pytest.approx(macs, rel=5e-4))


@pytest.mark.parametrize("name", MOBILENET_MACS)
def test_mobilenet_macs_at_smaller_inputs(name):
    from gatewise.efficiency.count import count

    with torch.device("meta"):
        model = gatewise.create_model(name).eval()
        macs = [count(model, torch.empty(1, 3, size, size)).macs for size in (192, 160, 128, 96)]
    assert tuple(macs) == MOBILENET_MACS[name]


def test_card_tells_paper_and_weights():
    card = gatewise.model_card("focalnet_tiny_srf")
    assert (card.paper, card.arxiv, card.num_classes) == ("focalnet", "2203.11926", 1000)
    assert card.weights.licence == "MIT"
    assert "82.1" in card.weights.score


def test_names_read_from_the_source_are_those_that_get_registered():
    live = {name for family in families() for name in family.variants}
    assert set(registered_names()) == live
    assert all(registered_names()[name].paper == family_of(name).paper for name in live)


def test_every_family_belongs_to_a_paper_of_the_catalogue():
    assert {family.paper for family in families()} <= {paper.id for paper in papers()}
    assert implemented("mobilenetv2").networks == tuple(gatewise.list_models("*mobilenetv2*"))
    assert implemented("hornet").networks == ()


def test_patterns_are_shell_style():
    assert gatewise.list_models("focalnet_tiny_[sl]rf") == ["focalnet_tiny_lrf", "focalnet_tiny_srf"]
    assert gatewise.list_models("nothing*") == []


def test_an_unknown_name_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="unknown model 'focalnet_tiny_sfr'; did you mean 'focalnet_tiny_srf'"):
        gatewise.create_model("focalnet_tiny_sfr")


def test_an_unknown_field_suggests_the_closest():
    with pytest.raises(UnknownNameError, match="field of FocalNetConfig .num_class.; did you mean .num_classes."):
        gatewise.create_model("focalnet_tiny_srf", num_class=10)


def test_overrides_take_lists_as_yaml_has_them():
    config = override(FocalNetConfig(), {"depths": [1, 1, 1, 1]})
    assert config.depths == (1, 1, 1, 1)


def test_pretrained_without_weights_is_a_users_mistake():
    with pytest.raises(UserError, match="no weights are published for 'mobilenetv2_035'"):
        gatewise.create_model("mobilenetv2_035", pretrained=True)


def test_a_name_cannot_be_registered_twice():
    family = family_of("mobilenetv2_035")
    with pytest.raises(ValueError, match="registered twice: mobilenetv2_035"):
        register(
            family.network,
            paper=family.paper,
            variants={"mobilenetv2_035": family.variants["mobilenetv2_035"]},
            layouts=family.layouts,
            reference_case=family.reference_case,
            reference_system=family.reference_system,
        )


@pytest.mark.parametrize("overrides", [{"num_classes": -1}, {"in_chans": 0}, {"drop_path_rate": 1.0}])
def test_values_out_of_range_are_refused(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides))):
        gatewise.create_model("inception_next_atto", **overrides)
