"""HER-Seg's CE-Encoder, beyond what the digest of the network shows."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.cost.count import count
from gatewise.fidelity.case import Case
from gatewise.fidelity.cases.herseg import attention_case
from gatewise.fidelity.fingerprint import make_input
from gatewise.fidelity.verify import fill_case
from gatewise.networks.image.herseg import CEEncoderConfig, ConvBlock, TokenBlock
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "herseg_encoder_24": {"embed_dim": 16, "depths": (1, 1, 2), "num_heads": (2, 4), "num_classes": 5},
    "herseg_encoder_192_neck": {
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (4,),
        "neck_dim": 8,
        "patch_size": 8,
        "num_classes": 5,
    },
}

CARDS = {
    "herseg_encoder_24": (78_708, None),
    "herseg_encoder_48": (264_552, None),
    "herseg_encoder_96": (957_648, 3_935_305_728),
    "herseg_encoder_192": (3_629_472, None),
    "herseg_encoder_384": (14_115_648, None),
    "herseg_encoder_192_neck": (4_269_472, None),
}

SIZES = {
    "herseg_encoder_24": [(64, 64), (32, 80), (16, 16)],
    "herseg_encoder_192_neck": [(32, 64), (64, 40)],
}

STRIDES = {"herseg_encoder_24": (16,), "herseg_encoder_192_neck": (8,)}


def test_attention_matches_its_worked_example():
    record = json.loads((FINGERPRINTS / "herseg" / "worked_dla.json").read_text())
    case = attention_case(record["config"])
    assert isinstance(case, Case)
    fill_case(case, record["keys"])
    module = case.module.double().eval()
    x = make_input("dla", record["inputs"]["x"]["shape"]).double()
    found = case.run(module, x)
    torch.testing.assert_close(found, torch.tensor(record["outputs"]["y"], dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_the_fourier_of_the_published_neck_and_encoder_add_up():
    with torch.device("meta"):
        neck = gatewise.create_model("herseg_encoder_96", neck_dim=256)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in neck.named_children()}
    assert counts["neck"] == 615_424
    assert sum(counts.values()) - counts["neck"] == 957_648


def test_cost_is_linear_in_the_pixels():
    with torch.device("meta"):
        model = gatewise.create_model("herseg_encoder_96").eval()
        macs = [count(model, torch.empty(1, 3, side, side)).macs for side in (256, 512, 1024)]
    assert macs[1] == pytest.approx(4 * macs[0], rel=1e-3)
    assert macs[2] == pytest.approx(4 * macs[1], rel=1e-3)


def test_a_block_follows_its_equation():
    block = TokenBlock(16, 4, 2.0)
    x = torch.randn(2, 3, 4, 16)
    u = block.norm1(x)
    first = x + block.project(block.attention(u) * nn.functional.silu(block.gate(u)))
    torch.testing.assert_close(block(x), first + block.mlp(block.norm2(first)))
    torch.testing.assert_close(block.merged()(x), block(x))


def test_convolutional_blocks_start_as_an_activation():
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(ConvBlock(8, 16).eval()(x), nn.functional.gelu(x))


def test_drop_path_leaves_the_convolutional_blocks_out():
    model = gatewise.create_model("herseg_encoder_24", drop_path_rate=0.11)
    rates = [block.drop_path.rate for stage in model.stages[1:] for block in stage]
    assert rates == pytest.approx([0.01 * i for i in range(2, 12)])


def test_weights_go_both_ways_under_the_published_names():
    model, other = (small_model("herseg_encoder_24", num_classes=0) for _ in range(2))
    state = export_state(model, "official")
    expected = {
        "image_encoder.layers.0.blocks.0.conv3.bn.weight",
        "image_encoder.layers.2.blocks.1.attn.up_proj.weight",
        "image_encoder.layers.1.blocks.0.act_proj.bias",
    }
    assert expected <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    # Published files hold a table of rotations per layer, and the parts behind the encoder.
    state["image_encoder.layers.1.blocks.0.attn.rope.rotations"] = torch.zeros(4, 4, 8, 2)
    state |= {"neck.0.weight": torch.zeros(1), "mask_decoder.iou_token.weight": torch.zeros(1)}
    load_state(other, state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_the_neck_comes_with_its_encoder():
    model, other = (small_model("herseg_encoder_192_neck", num_classes=0) for _ in range(2))
    state = export_state(model, "official")
    assert {"neck.0.weight", "neck.3.bias"} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(other(x), model(x))


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["herseg_encoder_24", "herseg_encoder_192_neck"])
def test_exports_to_onnx(name, tmp_path):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(2, 3, 32, 48))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CEEncoderConfig(embed_dim=100), "embed_dim 100 is not a multiple of 6 heads"),
        (lambda: CEEncoderConfig(embed_dim=30, num_heads=(2,), depths=(1, 1)), "multiple of 4"),
        (lambda: CEEncoderConfig(depths=(2, 2)), "depths has one positive entry"),
        (
            lambda: small_model("herseg_encoder_24")(torch.zeros(1, 3, 64, 50)),
            "width 50 is not a multiple of patch size 16",
        ),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
