"""ConViT, beyond what the digests of whole networks show."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.catalog.keys import KeyLayout
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.fidelity.case import Case
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import fill_case
from gatewise.networks.image.convit import Convit, ConvitConfig, GatedPositionalSelfAttention, non_locality
from gatewise.ops.gated_positional_attention import offsets, position_weights
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "convit_tiny": {
        "image_size": (32, 48),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 3,
        "local_up_to_layer": 2,
        "num_classes": 5,
    },
    "convit_tiny+plain": {
        "patch_size": 16,
        "embed_dim": 18,
        "num_heads": 9,
        "depth": 2,
        "local_up_to_layer": 0,
        "use_pos_embed": False,
        "qkv_bias": True,
        "num_classes": 5,
    },
}

# The published code counts a linear map of all offsets per image, 0.13 to 0.5 % less in all than the two products
# along rows and columns that stand in for it here.
CARDS = {
    "convit_tiny": (5_710_512, 1_258_287_360),
    "convit_tiny_plus": (9_972_912, 2_140_531_712),
    "convit_small": (27_777_322, 5_759_899_200),
    "convit_small_plus": (48_979_882, 10_022_867_712),
    "convit_base": (86_540_040, 17_529_160_704),
    "convit_base_plus": (153_134_856, 30_777_257_984),
}

SIZES = {
    "convit_tiny": [(32, 48), (48, 32), (8, 8), (64, 40)],
    "convit_tiny+plain": [(64, 32), (16, 16), (48, 80)],
}

STRIDES = {"convit_tiny": (8,), "convit_tiny+plain": (16,)}

WORKED = json.loads((FINGERPRINTS / "convit" / "gpsa_worked.json").read_text())


@pytest.fixture
def worked():
    """The layer of the worked example."""
    config = WORKED["config"]
    layer = GatedPositionalSelfAttention(
        config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"], locality_strength=config["locality_strength"]
    ).eval()
    fill_case(Case(layer, KeyLayout("official")), WORKED["keys"])
    gates = layer.gating_param.detach().clone()
    layer.start_local()
    with torch.no_grad():
        layer.gating_param.copy_(gates)
    return layer


@torch.no_grad()
def test_the_worked_example(worked):
    x = make_input("tokens", [1, 25, 36]).unflatten(1, (5, 5))
    assert worked.pos_proj.weight.tolist() == WORKED["pos_proj_weight"]
    assert offsets((5, 5))[0].tolist() == WORKED["rel_indices_first_row"]
    assert offsets((5, 5))[12].tolist() == WORKED["rel_indices_query12"]
    gates = worked.read_gates(x)["position"][0]
    torch.testing.assert_close(gates, torch.tensor(WORKED["sigmoid_gate"]))
    center = position_weights(worked.pos_proj.weight, (5, 5))[:, 12]
    torch.testing.assert_close(center, torch.tensor(WORKED["pos_attention_center_query"]), rtol=1e-5, atol=1e-8)
    attention = worked.attention(x)
    torch.testing.assert_close(non_locality(attention, (5, 5)), torch.tensor(WORKED["nonlocality"]))
    assert relative_error(attention, WORKED["outputs"]["attention"]) < 1e-5
    assert relative_error(worked(x).flatten(1, 2), WORKED["outputs"]["output"]) < 1e-5


def test_four_heads_start_at_the_corners_of_a_square():
    layer = GatedPositionalSelfAttention(8, 4, locality_strength=2.0)
    assert layer.pos_proj.weight.tolist() == [[-2, -2, -2], [-2, 2, -2], [2, -2, -2], [2, 2, -2]]
    torch.testing.assert_close(layer.center_distance(), torch.full((4,), 0.5**0.5))
    assert torch.equal(layer.v.weight, torch.eye(8))


def test_heads_beyond_a_square_start_at_random_with_a_warning():
    with pytest.warns(UserWarning, match="5 heads do not form a square filter: the last 1 start at random"):
        layer = GatedPositionalSelfAttention(10, 5)
    assert layer.pos_proj.weight[3].tolist() == [1, 1, -1]


def test_nine_strong_heads_are_a_convolution():
    layer = GatedPositionalSelfAttention(9, 9, locality_strength=20.0).double().eval()
    with torch.no_grad():
        layer.gating_param.fill_(50.0)
        layer.proj.weight.copy_(torch.eye(9))
        layer.proj.bias.zero_()
        x = torch.randn(1, 6, 7, 9, dtype=torch.float64)
        y = layer(x)
    for head in range(9):
        row, column = head % 3 - 1, head // 3 - 1
        shifted = x[0, 1 + row : 5 + row, 1 + column : 6 + column, head]
        assert (y[0, 1:5, 1:6, head] - shifted).abs().max() < 1e-3


def test_a_fresh_network_looks_near():
    model = gatewise.create_model("convit_tiny", depth=3, local_up_to_layer=3 - 1).eval()
    with torch.no_grad():
        attention = model.blocks[0].get_submodule("mixer").attention(torch.randn(1, 14, 14, 192))
    found = non_locality(attention, (14, 14))
    assert ((found > 2.5) & (found < 2.9)).all()
    uniform = non_locality(torch.full((1, 1, 196, 196), 1 / 196), (14, 14)).item()
    assert uniform == pytest.approx(7.28, abs=0.01)
    assert torch.allclose(model.blocks[0].mixer.gating_param.sigmoid(), torch.tensor(0.731), atol=1e-3)


@pytest.mark.parametrize("of_embedding", [False, True])
def test_non_locality_covers_all_layers(of_embedding):
    model = small_model("convit_tiny")
    found = model.non_locality(torch.randn(2, 3, 32, 48), of_embedding=of_embedding)
    assert found.shape == (3, 4)
    assert (found > 0).all()


def test_layers_see_their_own_input_or_the_embedding():
    model = small_model("convit_tiny")
    x = torch.randn(2, 3, 32, 48)
    own, embedded = model.non_locality(x), model.non_locality(x, of_embedding=True)
    assert torch.equal(own[0], embedded[0])
    assert not torch.allclose(own[1:], embedded[1:])


def test_dropped_attention_is_the_blended_one():
    layer = GatedPositionalSelfAttention(8, 4, attn_drop_rate=0.5).train()
    x = torch.randn(1, 3, 4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.attn_drop.p = 1e-9
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_the_class_token_joins_behind_the_local_layers():
    model = small_model("convit_tiny")
    tokens = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: tokens.append(tuple(inputs[0].shape)))
    model(torch.randn(1, 3, 32, 48))
    assert tokens == [(1, 4, 6, 16), (1, 4, 6, 16), (1, 25, 16)]


def test_positions_come_from_other_sizes():
    model = small_model("convit_tiny", image_size=32)
    state = export_state(model, "official")
    assert state["pos_embed"].shape == (1, 16, 16)
    other = gatewise.create_model("convit_tiny", **{**SMALL["convit_tiny"], "image_size": (48, 64)}).eval()
    load_state(other, state, adapt=True)
    x = torch.randn(1, 3, 48, 64)
    torch.testing.assert_close(other(x), model(x))


def test_weights_go_both_ways_under_the_published_names():
    model, other = small_model("convit_tiny"), small_model("convit_tiny")
    state = export_state(model, "official")
    assert {"blocks.1.attn.gating_param", "blocks.2.attn.qkv.weight", "patch_embed.proj.bias"} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(other(x), model(x))


def test_timms_networks_exchange_weights():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(
        "convit_tiny", img_size=32, patch_size=8, embed_dim=32, depth=3, local_up_to_layer=2, num_heads=4, num_classes=5
    ).eval()
    fields = {**SMALL["convit_tiny"], "image_size": 32, "embed_dim": theirs.embed_dim}
    ours = gatewise.create_model("convit_tiny", **fields).eval()
    load_state(ours, theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_positions_and_class_token_do_not_decay():
    assert small_model("convit_tiny").no_weight_decay() == {"positions", "cls_token"}


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("convit_tiny"), tmp_path / "network.onnx", torch.randn(2, 3, 32, 48))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvitConfig(embed_dim=190), "multiple of the number of heads, not 190 with 4 heads"),
        (lambda: ConvitConfig(local_up_to_layer=12), r"local_up_to_layer must be in 0..11, .* not 12"),
        (lambda: ConvitConfig(image_size=230), "image_size 230 is not a multiple of patch size 16"),
        (lambda: ConvitConfig(attn_drop_rate=1.0), "attn_drop_rate must be in"),
        (lambda: ConvitConfig(depth=0), "must be positive, not 0"),
        (
            lambda: small_model("convit_tiny")(torch.zeros(1, 3, 230, 32)),
            "height 230 is not a multiple of patch size 8",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_values_start_as_they_are_after_all_other_initial_weights():
    model = Convit(ConvitConfig(embed_dim=16, depth=2, local_up_to_layer=1, image_size=32))
    assert torch.equal(model.blocks[0].mixer.v.weight, torch.eye(16))
    assert isinstance(model.blocks[1].mixer.qkv, nn.Linear)
