"""PfLayer's transformers, beyond what the digests show."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.errors import CheckpointError
from gatewise.fidelity.verify import build_case
from gatewise.networks.image.pflayer import (
    PfPiT,
    PfPiTConfig,
    PfViT,
    PfViTConfig,
    PoolMixer,
    SelfAttention,
    resize_positions,
)
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "vit_ti_max": {"image_size": 64, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5},
    "pit_ti_max": {
        "image_size": 64,
        "head_dims": (8, 8, 8),
        "num_heads": (1, 2, 4),
        "depths": (2, 1, 2),
        "num_classes": 5,
    },
}

STRIDES = {"vit_ti_max": (16,), "pit_ti_max": (8, 16, 32)}

UNPADDED = {"pit_ti_max": True}

CARDS = {
    "vit_ti_max": (6_159_400, 1_244_757_504),
    "vit_s_max": (23_819_368, 4_743_822_336),
    "vit_b_max": (93_644_008, 18_504_873_984),
    "vit_s_attention": (22_049_896, 4_574_026_752),
    "pit_ti_max": (5_174_504, 631_512_960),
    "pit_s_max": (25_119_784, 2_813_372_640),
    "pit_b_max": (79_005_928, 12_428_636_160),
    "pit_s_attention": (23_253_544, 2_845_539_072),
}
"""Parameters and MACs at 224 pixels of the published code, exact."""


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (5, 5)])
def test_the_pool_mixer_follows_its_equation(size):
    mixer = PoolMixer(6).double()
    x = torch.randn(2, *size, 6, dtype=torch.float64)
    hidden = F.gelu(x @ mixer.qkv.weight.T + mixer.qkv.bias)
    padded = F.pad(hidden, (0, 0, 1, 1, 1, 1), value=-torch.inf)
    pooled = padded.unfold(1, 3, 1).unfold(2, 3, 1).amax(dim=(4, 5))
    expected = F.gelu(pooled) @ mixer.proj.weight.T + mixer.proj.bias
    torch.testing.assert_close(mixer(x), expected)


def test_tokens_are_pooled_with_their_neighbors_in_the_map():
    """On 4 x 9 tokens too, which a square of 6 x 6 would tear apart."""
    mixer = PoolMixer(4)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.abs_()
    x = torch.zeros(1, 4, 9, 4)
    seen = x.clone()
    seen[0, 2, 8] = 10.0
    changed = (mixer(seen) != mixer(x)).any(-1)[0]
    assert changed[1:4, 7:9].all()
    assert changed.sum() == 6


def test_attention_follows_its_equation():
    attention = SelfAttention(12, 3).double()
    x = torch.randn(2, 3, 4, 12, dtype=torch.float64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).flatten(1, 2).unflatten(-1, (3, 3, 4)).unbind(2)
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    expected = (y @ attention.proj.weight.T + attention.proj.bias).unflatten(1, (3, 4))
    torch.testing.assert_close(attention(x), expected)


def test_dropout_of_attention_acts_in_training_alone():
    attention = SelfAttention(8, 2, attn_drop_rate=0.5)
    x = torch.randn(1, 3, 3, 8)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


@pytest.mark.parametrize("name", SMALL)
def test_odd_blocks_of_every_stage_pool(name):
    for stage in small_model(name).stages:
        kinds = [type(block.mixer) for block in stage]
        assert kinds == [PoolMixer if i % 2 else SelfAttention for i in range(len(kinds))]
    plain = small_model(name, odd_mixer="attention")
    assert not any(isinstance(module, PoolMixer) for module in plain.modules())


@pytest.mark.parametrize("name", SMALL)
def test_positions_are_resized_bicubically(name):
    model, x = small_model(name), torch.randn(1, 3, 80, 150)
    patches = model.stem.proj(x)
    positions = F.interpolate(
        model.stem.positions.permute(0, 3, 1, 2), patches.shape[2:], mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(model.stem(x).permute(0, 3, 1, 2), patches + positions)
    fitting = torch.randn(1, 3, 64, 64)
    expected = model.stem.proj(fitting).permute(0, 2, 3, 1) + model.stem.positions
    assert torch.equal(model.stem(fitting), expected)


def test_positions_of_half_precision_are_resized_in_float32():
    positions = torch.randn(1, 7, 5, 3)
    half = resize_positions(positions.bfloat16(), (4, 9))
    assert half.dtype == torch.float32
    assert torch.equal(half, resize_positions(positions.bfloat16().float(), (4, 9)))


def test_positions_of_oblong_images():
    model = PfViT(PfViTConfig(image_size=(64, 96), embed_dim=8, depth=1, num_heads=2, num_classes=2))
    assert model.stem.positions.shape == (1, 4, 6, 8)
    model = PfPiT(PfPiTConfig(image_size=(64, 33), head_dims=(8,) * 3, depths=(1, 1, 1), num_classes=2))
    assert model.stem.positions.shape == (1, 7, 3, 24)


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_another_size_of_image_adapt(name):
    source, wide = small_model(name), small_model(name, image_size=(96, 64))
    state = export_state(source, "official")
    with pytest.raises(CheckpointError, match="other shape"):
        load_state(wide, state)
    load_state(wide, state, adapt=True)
    x = torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(wide(x), source(x))


@pytest.mark.parametrize("file", ["vit_max_small", "pit_max_small"])
def test_weights_go_out_under_the_published_names(file):
    record = json.loads((FINGERPRINTS / "pflayer" / f"{file}.json").read_text())
    model = build_case(record).module
    theirs = export_state(model, "official")
    assert {key: list(value.shape) for key, value in theirs.items()} == record["keys"]
    other = type(model)(model.config)
    assert load_state(other, theirs).name == "official"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in other.state_dict().items())


def test_attention_does_not_take_weights_of_pooling():
    state = export_state(small_model("vit_ti_max"), "official")
    with pytest.raises(CheckpointError, match=r"blocks.1.attn.proj.weight \(16, 48\)"):
        load_state(small_model("vit_ti_max", odd_mixer="attention"), state)


def test_weights_of_a_vit_start_as_published():
    model = PfViT(PfViTConfig(image_size=64, embed_dim=64, depth=2, num_heads=2))
    for weight in (model.stages[0][1].mixer.qkv.weight, model.head.weight, model.stem.positions):
        # Two thousand and more draws of a standard deviation of 0.02, cut where it does not show.
        assert weight.std().item() == pytest.approx(0.02, rel=0.08)
    assert model.stages[0][0].mixer.qkv.bias.abs().max() == 0
    bound = 1 / (3 * 16**2) ** 0.5
    assert 0.9 * bound < model.stem.proj.weight.abs().max() <= bound


def test_weights_of_a_pit_start_as_pytorch_starts_them():
    model = PfPiT(PfPiTConfig(image_size=64, head_dims=(16, 16, 16), num_heads=(4, 8, 16), depths=(1, 1, 1)))
    weight = model.stages[0][0].mixer.qkv.weight
    assert 0.9 / 8 < weight.abs().max() <= 1 / 8
    assert model.stem.positions.std().item() == pytest.approx(0.02, rel=0.1)


def test_stochastic_depth_grows_as_published():
    vit = PfViT(PfViTConfig(image_size=64, embed_dim=8, depth=5, num_heads=1, drop_path_rate=0.4))
    assert [block.drop_path.rate for block in vit.stages[0]] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    pit = PfPiT(PfPiTConfig(image_size=64, head_dims=(8,) * 3, depths=(2, 1, 2), drop_path_rate=0.4))
    rates = [block.drop_path.rate for stage in pit.stages for block in stage]
    assert rates == pytest.approx([0.0, 0.08, 0.16, 0.24, 0.32])


def test_chosen_levels_of_a_pit():
    model = small_model("pit_ti_max", out_indices=(0, 2))
    assert model.feature_info == [(8, 8), (32, 32)]
    x = torch.randn(1, 3, 64, 64)
    levels = model.forward_pyramid(x)
    assert [tuple(level.shape) for level in levels] == [(1, 8, 7, 7), (1, 32, 2, 2)]
    assert torch.equal(levels[-1], model.forward_features(x))


@pytest.mark.parametrize(("patch", "stride", "grids"), [(16, 8, (27, 14, 7)), (14, 7, (31, 16, 8))])
def test_resolutions_of_the_published_pits(patch, stride, grids):
    config = PfPiTConfig(patch_size=patch, stride=stride, head_dims=(8,) * 3, num_heads=(1, 1, 1), depths=(1, 1, 1))
    with torch.no_grad():
        levels = PfPiT(config).eval().forward_pyramid(torch.randn(1, 3, 224, 224))
    assert tuple(level.shape[2] for level in levels) == grids


@pytest.mark.untyped
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 64), (80, 48)])
def test_exports_to_onnx(name, size, tmp_path):
    """Also where positions are resized."""
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(2, 3, *size))
    assert report.error < 1e-5
    import onnx

    assert "MaxPool" in {node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (PfViTConfig, {"odd_mixer": "min"}, "max, attention, not 'min'"),
        (PfViTConfig, {"num_heads": 7}, "multiple of the number of heads, not 768 with 7 heads"),
        (PfViTConfig, {"depth": 0}, "depth must be positive, not 0"),
        (PfViTConfig, {"image_size": 15}, "image_size 15 is smaller than a patch of 16"),
        (PfViTConfig, {"image_size": (224, 8)}, r"image_size \(224, 8\) is smaller"),
        (PfViTConfig, {"patch_size": 0}, "must be positive, not 0 and 0"),
        (PfViTConfig, {"attn_drop_rate": 1.0}, r"attn_drop_rate must be in \[0, 1\), not 1.0"),
        (PfPiTConfig, {"stride": 0}, "must be positive, not 16 and 0"),
        (PfPiTConfig, {"num_heads": (3, 6)}, r"num_heads must have one entry per stage \(3\), not \(3, 6\)"),
        (PfPiTConfig, {"depths": (2, 0, 4)}, "every stage needs a block"),
        (PfPiTConfig, {"num_heads": (2, 3, 6)}, "multiple of the one before in width, not 144 after 96"),
        (PfPiTConfig, {"out_indices": (3,)}, r"stages 0..2, not \(3,\)"),
    ],
)
def test_impossible_options_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def reference_record(name, config, **options):
    """A record as the published code would leave it, for one of our networks."""
    model = gatewise.create_model(name, **config)
    keys = {key: list(value.shape) for key, value in export_state(model, "official").items()}
    return {"system": "pflayer", "variant": "other", "config": options, "keys": keys}


@pytest.mark.parametrize("attn_type", ["attention", "self", None])
def test_plain_transformers_of_the_published_code_are_known_by_their_shapes(attn_type):
    ours = {"image_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "odd_mixer": "attention"}
    theirs = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
    options = theirs | ({} if attn_type is None else {"attn_type": attn_type})
    assert build_case(reference_record("vit_s_max", ours, **options)).module.config.odd_mixer == "attention"


def test_options_of_the_published_code_are_understood():
    ours = {"num_classes": 3, "in_chans": 1, "head_dims": (8, 8, 8), "depths": (1, 2, 1), "image_size": 64}
    options = {
        "factory": "pit_s_max",
        "num_classes": 3,
        "in_chans": 1,
        "base_dims": [8, 8, 8],
        "depth": [1, 2, 1],
        "image_size": 64,
        "representation_size": None,
        "drop_rate": 0.1,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.3,
    }
    config = build_case(reference_record("pit_s_max", ours, **options)).module.config
    assert (config.num_heads, config.stride, config.drop_rate) == ((3, 6, 12), 8, 0.1)
    assert (config.attn_drop_rate, config.drop_path_rate, config.odd_mixer) == (0.2, 0.3, "max")


def test_mixers_that_only_look_like_max_pooling_are_not_taken_for_it():
    ours = {"image_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2}
    theirs = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "attn_type": "avg"}
    assert build_case(reference_record("vit_s_max", ours, **theirs)) is None


def test_biases_of_mixers_can_be_left_out():
    model = small_model("vit_ti_max", qkv_bias=False)
    assert all(block.mixer.qkv.bias is None for block in model.stages[0])
    assert isinstance(model.head, nn.Linear)


@pytest.mark.parametrize("name", SMALL)
def test_positions_are_spared_weight_decay(name):
    model = small_model(name)
    assert model.no_weight_decay() < dict(model.named_parameters()).keys()
