"""The Inception networks, beyond what the digests show."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.inceptionv4 import Builder, InceptionConfig, ResidualBranches
from tests.conftest import small_model

SMALL = {
    "inception_v4": {"width": 0.0625, "depths": (1, 1, 1), "num_classes": 5},
    "inception_resnet_v2": {"width": 0.0625, "depths": (1, 2, 1), "num_classes": 5},
    "inception_resnet_v2_paper": {"width": 0.0625, "depths": (1, 1, 1), "num_classes": 5},
}

SIZES = {
    "inception_v4": [(75, 75), (80, 96), (107, 75)],
    "inception_resnet_v2": [(75, 75), (80, 96), (107, 75)],
    "inception_resnet_v2_paper": [(75, 75), (80, 96), (107, 75)],
}

STRIDES = {
    "inception_v4": (2, 4, 8, 16, 32),
    "inception_resnet_v2": (2, 4, 8, 16, 32),
    "inception_resnet_v2_paper": (2, 4, 8, 16, 32),
}

UNPADDED = {"inception_v4": True, "inception_resnet_v2": True, "inception_resnet_v2_paper": True}

CARDS = {
    "inception_v4": (42_679_816, 12_253_974_624),
    "inception_resnet_v2": (55_843_464, 13_155_794_016),
    "inception_resnet_v1_face": (23_482_624, 1_417_662_304),
    "inception_resnet_v1_paper": (22_756_328, 6_206_361_696),
    "inception_resnet_v2_paper": (32_433_928, 9_257_953_632),
}


@pytest.mark.parametrize(
    ("name", "size", "macs"),
    [
        ("inception_v4", 224, 6_121_894_752),
        ("inception_v4", 160, 2_762_066_784),
        ("inception_resnet_v2", 224, 6_468_961_120),
        ("inception_resnet_v1_face", 299, 6_307_723_360),
    ],
)
def test_macs_at_other_sizes(name, size, macs):
    with torch.device("meta"):
        model = gatewise.create_model(name).eval()
        assert count(model, torch.empty(1, 3, size, size)).macs == macs


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (299, {0: 149, 1: 147, 3: 73, 4: 71, 5: 35, 7: 17, 9: 8}),
        (224, {0: 111, 1: 109, 3: 54, 4: 52, 5: 25, 7: 12, 9: 5}),
        (160, {0: 79, 1: 77, 3: 38, 4: 36, 5: 17, 7: 8, 9: 3}),
        (75, {0: 37, 1: 35, 3: 17, 4: 15, 5: 7, 7: 3, 9: 1}),
    ],
)
def test_map_sizes_of_unpadded_kernels(size, expected):
    model = small_model("inception_v4")
    x = torch.randn(1, 3, size, size)
    for index, module in enumerate(model.stages):
        x = module(x)
        if index in expected:
            assert x.shape[2:] == (expected[index],) * 2


def test_mean_pool_leaves_padding_out():
    module, _ = Builder(InceptionConfig())._branch("mean, 1x1 4", 3)
    ones = torch.ones(1, 3, 5, 5)
    torch.testing.assert_close(module[0](ones), ones)


def test_scale_acts_on_the_branches_alone():
    block = small_model("inception_resnet_v2").stages[8][0]
    assert isinstance(block, ResidualBranches)
    x = torch.randn(1, block.project.out_channels, 6, 6)
    y = block.project(block.branches(x))
    torch.testing.assert_close(block(x), torch.relu(x + 0.17 * y))
    merged = block.merged()
    assert merged.branch_scale == 1
    torch.testing.assert_close(merged(x), block(x))


def test_the_last_block_is_neither_scaled_nor_rectified():
    last = small_model("inception_resnet_v2").stages[13]
    assert (last.branch_scale, last.act) == (1.0, False)


@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2"])
def test_weights_are_exchanged_with_timm(name):
    theirs = timm.create_model(name, num_classes=7).eval()
    ours = gatewise.create_model(name, num_classes=7).eval()
    assert load_state(ours, theirs.state_dict()).name == "official"
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    written = export_state(ours, "official")
    assert set(written) == set(theirs.state_dict())


def test_the_background_class_of_older_files_is_left_out():
    model = small_model("inception_resnet_v2")
    state = export_state(model, "cadene")
    for key in ("last_linear.weight", "last_linear.bias"):
        state[key] = torch.cat([torch.full_like(state[key][:1], 9.0), state[key]])
    other = small_model("inception_resnet_v2")
    for parameter in other.parameters():
        parameter.data.zero_()
    assert load_state(other, state).name == "cadene"
    assert torch.equal(other.head.weight, model.head.weight)


def test_faces_embed_to_length_one_and_classify_on_request():
    fields = {"width": 0.0625, "depths": (1, 1, 1), "embed_dim": 8}
    face = gatewise.create_model("inception_resnet_v1_face", **fields).eval()
    x = torch.randn(3, 3, 80, 80)
    torch.testing.assert_close(face(x).norm(dim=1), torch.ones(3))
    classifier = gatewise.create_model("inception_resnet_v1_face", num_classes=4, **fields).eval()
    assert classifier(x).shape == (3, 4)
    state = export_state(classifier, "official")
    assert {"last_linear.weight", "last_bn.running_var", "logits.bias"} <= set(state)
    # A file with a classifier fits the network without one.
    load_state(face, state)
    torch.testing.assert_close(
        face(x),
        nn.functional.normalize(
            classifier.embed_norm(classifier.embed(classifier.forward_features(x).mean(dim=(2, 3)))), dim=1
        ),
    )


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["inception_v4", "inception_resnet_v2"])
def test_exports_to_onnx(name, tmp_path):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(2, 3, 80, 80))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "v3"}, "architecture must be one of v4, resnet_v2, .*, not 'v3'"),
        ({"depths": (4, 0, 3)}, "depths must be three positive numbers"),
        ({"scales": (0.1, 0.1)}, "scales must be three numbers"),
        ({"width": 0.0}, "width must be positive, not 0.0"),
    ],
)
def test_impossible_sizes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InceptionConfig(**fields)
