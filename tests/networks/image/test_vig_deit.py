"""DeiT, which ViG is compared with, against timm's."""

from __future__ import annotations

import pytest
import torch

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.networks.image.vig import DeitConfig
from tests.conftest import small_model

SMALL = {
    "deit_tiny": {
        "image_size": (32, 48),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "num_heads": 2,
        "num_classes": 5,
    }
}

CARDS = {
    "deit_tiny": (5_717_416, 1_253_683_200),
    "deit_small": (22_050_664, 4_598_882_304),
    "deit_base": (86_567_656, 17_563_828_224),
}

SIZES = {"deit_tiny": [(32, 48), (48, 32), (8, 8), (64, 40)]}

STRIDES = {"deit_tiny": (8,)}


def test_timms_networks_exchange_weights():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5
    ).eval()
    ours = gatewise.create_model("deit_tiny", **{**SMALL["deit_tiny"], "image_size": 32}).eval()
    load_state(ours, theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    back = export_state(ours, "official")
    assert set(back) == set(theirs.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", CARDS)
def test_parameters_are_timms(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model(f"{name}_patch16_224")
    assert sum(parameter.numel() for parameter in theirs.parameters()) == CARDS[name][0]


def test_positions_come_from_other_sizes():
    model = small_model("deit_tiny", image_size=32)
    state = export_state(model, "official")
    assert state["pos_embed"].shape == (1, 17, 16)
    other = gatewise.create_model("deit_tiny", **{**SMALL["deit_tiny"], "image_size": (48, 64)}).eval()
    load_state(other, state, adapt=True)
    x = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(other(x), model(x))


def test_positions_and_class_token_do_not_decay():
    model = small_model("deit_tiny")
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("deit_tiny"), tmp_path / "network.onnx", torch.randn(2, 3, 32, 48))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeitConfig(embed_dim=190), "multiple of the number of heads, not 190 with 3 heads"),
        (lambda: DeitConfig(image_size=230), "image_size 230 is not a multiple of patch size 16"),
        (lambda: DeitConfig(depth=0), "must be positive, not 0"),
        (lambda: small_model("deit_tiny")(torch.zeros(1, 3, 33, 32)), "height 33 is not a multiple of patch size 8"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
