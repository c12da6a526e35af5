"""Names, networks and their cards."""

from __future__ import annotations

import pytest

import gatewise
from gatewise.catalog.factory import override
from gatewise.catalog.papers import papers
from gatewise.catalog.registry import families, family_of, implemented, register, registered_names
from gatewise.errors import UnknownNameError, UserError
from gatewise.networks.image.focalnet import FocalNetConfig


def test_card_tells_paper_and_weights():
    card = gatewise.model_card("focalnet_tiny_srf")
    assert (card.paper, card.arxiv, card.num_classes) == ("focalnet", "2203.11926", 1000)
    assert card.weights.license == "MIT"
    assert "82.1" in card.weights.score


def test_names_read_from_the_source_are_those_that_get_registered():
    live = {name for family in families() for name in family.variants}
    assert set(registered_names()) == live
    assert all(registered_names()[name].paper == family_of(name).paper for name in live)


def test_every_family_belongs_to_a_paper_of_the_catalog():
    assert {family.paper for family in families()} <= {paper.id for paper in papers()}
    # EvoNorm has a MobileNetV2 of its own.
    named = [name for name in gatewise.list_models("*mobilenetv2*") if "evonorm" not in name]
    assert implemented("mobilenetv2").networks == tuple(named)
    assert implemented("lina").networks == ()


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
        )


@pytest.mark.parametrize("overrides", [{"num_classes": -1}, {"in_chans": 0}, {"drop_path_rate": 1.0}])
def test_values_out_of_range_are_refused(overrides):
    with pytest.raises(ValueError, match=next(iter(overrides))):
        gatewise.create_model("inception_next_atto", **overrides)
