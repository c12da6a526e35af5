"""timm's registry and functions take our networks as their own."""

from __future__ import annotations

import pytest
import timm
import torch

import gatewise.integrations.timm  # noqa: F401  (registers the networks)
from gatewise.catalog.registry import families
from gatewise.networks.image._base import ImageNetwork
from tests.conftest import small_model


def test_every_image_network_is_registered():
    names = timm.list_models("gatewise_*")
    images = [family for family in families() if issubclass(family.network, ImageNetwork)]
    assert set(names) == {f"gatewise_{name}" for family in images for name in family.variants}


def test_create_model_passes_configuration_fields():
    model = timm.create_model("gatewise_mobilenetv2_035", num_classes=7, in_chans=1, drop_rate=0.3)
    assert model(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    assert model.config.drop_rate == 0.3


def test_data_config_comes_from_the_published_weights():
    config = timm.data.resolve_model_data_config(
        timm.create_model("gatewise_inception_next_base_384", depths=(1, 1, 1, 1))
    )
    assert config["input_size"] == (3, 384, 384)
    assert config["crop_pct"] == 1.0


def test_features_only_gives_levels_and_their_info():
    model = timm.create_model("gatewise_mobilenetv2_035", features_only=True, out_indices=(0, 2, -1))
    maps = model(torch.randn(1, 3, 64, 64))
    assert [tuple(level.shape[1:]) for level in maps] == [(8, 16, 16), (32, 4, 4), (112, 2, 2)]
    assert model.feature_info.channels() == [8, 32, 112]
    assert model.feature_info.reduction() == [4, 16, 32]
    with pytest.raises(ValueError, match="levels 0..3"):
        timm.create_model("gatewise_mobilenetv2_035", features_only=True, out_indices=(4,))


def test_weights_of_a_file_are_loaded(tmp_path):
    source = small_model("mobilenetv2_035")
    torch.save(source.state_dict(), tmp_path / "x.pth")
    overlay = {"file": str(tmp_path / "x.pth")}
    model = timm.create_model(
        "gatewise_mobilenetv2_035", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5
    )
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), source(x))


def test_timms_optimizer_factory_takes_our_networks():
    from timm.optim import create_optimizer_v2

    model = small_model("focalnet_tiny_srf")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.05}


@pytest.mark.parametrize(
    ("arguments", "message"), [({"cache_dir": "x"}, "TORCH_HOME"), ({"pretrained_cfg": "tag"}, "no tag 'tag'")]
)
def test_what_is_not_supported_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("gatewise_mobilenetv2_035", **arguments)
