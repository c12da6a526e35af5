"""Networks with EvoNorm, beyond what the digests show."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.catalog.registry import family_of
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.fidelity.cases.evonorm import norm_of_reference, resnet_case
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import fill_case
from gatewise.layers.evonorm import EvoNorm, EvoNormB0
from gatewise.networks.image.evonorm import EvoNormMobileConfig, EvoNormResNet, EvoNormResNetConfig, Pool
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "resnetv2_50d_evos": {
        "depths": (1, 2, 1, 1),
        "channels": (32, 64, 96, 128),
        "stem_channels": 32,
        "norm_groups": 4,
        "num_classes": 5,
    },
    "resnet50_evonorm_b0": {
        "depths": (1, 2, 1, 1),
        "channels": (32, 64, 96, 128),
        "stem_channels": 16,
        "num_classes": 5,
    },
    "regnetz_d8_evos": {
        "rows": ((3, 4, 16, 2, 1), (3, 4, 24, 2, 2), (3, 4, 32, 2, 2), (3, 4, 40, 2, 2)),
        "stem_channels": 16,
        "head_channels": 64,
        "norm_group_size": 8,
        "num_classes": 5,
    },
    "efficientnet_b0_evonorm_s0": {
        "width_mult": 0.25,
        "norm_groups": 4,
        "head_channels": 64,
        "num_classes": 5,
    },
    "ese_vovnet39b_evos": {
        "stem_channels": (8, 8, 16),
        "layer_channels": (8, 8, 8, 16),
        "channels": (16, 24, 32, 40),
        "depths": (1, 1, 3, 3),
        "layers": 2,
        "norm_groups": 4,
        "num_classes": 5,
    },
}

CARDS = {
    "resnetv2_50d_evos": (25_591_368, 4_328_824_832),
    "regnetz_b16_evos": (9_736_824, 1.43e9),
    "regnetz_c16_evos": (13_487_816, 2_475_491_328),
    "regnetz_d8_evos": (23_464_296, 4_503_459_840),
    "ese_vovnet39b_evos": (24_579_144, 7.074e9),
    # With batch norm 25,557,032; v adds a parameter for each of the 7,616 channels with an activation.
    "resnet50_evonorm_s0": (25_564_648, 4_089_184_256),
    "resnet50_evonorm_b1": (25_557_032, 4_089_184_256),
    # With batch norm 3,504,872 and 5,288,548.
    "mobilenetv2_evonorm_s0": (3_520_424, 300_774_272),
    "efficientnet_b0_evonorm_s2": (5_288_548, 385_814_752),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published tables."""

RECORDS = sorted((FINGERPRINTS / "evonorm").glob("layer_*.json"))


@pytest.mark.parametrize(
    "name", ["regnetz_b16_evos", "regnetz_c16_evos", "regnetz_d8_evos", "ese_vovnet39b_evos", "resnetv2_50d_evos"]
)
def test_weights_are_exchanged_with_timm(name):
    theirs = timm.create_model(name, num_classes=7).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif key.endswith("conv3.weight"):
                # Branches start with nothing, which would hide them.
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    ours = gatewise.create_model(name, num_classes=7).eval()
    assert load_state(ours, theirs.state_dict()).name == "timm"
    x = torch.randn(1, 3, 64, 75)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    assert {key: value.shape for key, value in export_state(ours, "timm").items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", ["resnet50_evonorm_b0", "resnet50_evonorm_s0", "resnet101_evonorm_b0"])
@pytest.mark.parametrize("layout", ["torchvision", "tensorflow"])
def test_layouts_of_the_form_with_the_activation_last_read_what_they_write(name, layout):
    fields = SMALL["resnet50_evonorm_b0"]
    source = gatewise.create_model(name, **fields)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    written = export_state(source, layout)
    target = gatewise.create_model(name, **fields)
    assert load_state(target, written).name == layout
    assert all(torch.equal(target.state_dict()[key], value) for key, value in source.state_dict().items())


def test_tensorflow_variables_have_the_official_names_and_shapes():
    written = export_state(gatewise.create_model("resnet50_evonorm_b0"), "tensorflow")
    assert written["conv2d/kernel"].shape == (7, 7, 3, 64)
    # The first block's shortcut is made before the rest of it.
    assert written["conv2d_1/kernel"].shape == (1, 1, 64, 256)
    assert written["evonorm/v"].shape == (1, 1, 1, 64)
    assert written["evonorm_2/moving_variance"].shape == (1, 1, 1, 64)
    assert written["dense/kernel"].shape == (2048, 1000)
    assert "evonorm_1/moving_variance" not in written
    assert len([key for key in written if key.endswith("/kernel")]) == 54


def test_baselines_have_the_names_and_parameters_of_timm():
    ours = gatewise.create_model("resnet50_evonorm_s0", norm_layer="BN-ReLU", pool_padding="symmetric").eval()
    theirs = timm.create_model("resnet50").eval()
    assert load_state(ours, theirs.state_dict()).name == "torchvision"
    x = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs", "layer"),
    [
        ("efficientnet_b0_evonorm_s0", "efficientnet_b0", "BN-SiLU"),
        ("mobilenetv2_evonorm_s0", "mobilenetv2_100", "BN-ReLU6"),
    ],
)
def test_with_batch_norm_the_mobile_networks_are_timms(name, theirs, layer):
    reference = timm.create_model(theirs, num_classes=7).eval()
    ours = gatewise.create_model(name, norm_layer=layer, num_classes=7).eval()
    assert load_state(ours, reference.state_dict()).name == "timm_efficientnet"
    x = torch.randn(1, 3, 64, 75)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), reference(x), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_layers_train_as_the_reference(path):
    record = json.loads(path.read_text())
    case = resnet_case(record)
    fill_case(case, record["keys"])
    layer = case.module
    # The record's gradients of parameters have those of its pass in eval mode in them, which came first.
    for training in (False, True):
        layer.train(training)
        x = make_input(**record["inputs"]["x"]).requires_grad_()
        y = layer(x)
        (y * make_input("cotangent", y.shape)).sum().backward()
    found = {"output": y, "grad_input": x.grad}
    found |= {f"grad_{name}": parameter.grad for name, parameter in layer.named_parameters()}
    found |= {f"{name}_after": buffer for name, buffer in layer.named_buffers()}
    assert found.keys() == record["train"].keys()
    for name, stored in record["train"].items():
        assert relative_error(found[name], stored) < 1e-5, name


@pytest.mark.parametrize("size", [(1, 1), (7, 33), (31, 64)])
@pytest.mark.parametrize("name", ["resnetv2_50d_evos", "resnet50_evonorm_b0", "regnetz_d8_evos"])
def test_every_size_from_one_pixel_up_runs_and_rounds_up(name, size):
    features = small_model(name).forward_features(torch.randn(1, 3, *size))
    assert tuple(features.shape[2:]) == tuple(-(-length // 32) for length in size)


def test_branches_start_closed():
    for name in ("resnetv2_50d_evos", "resnet50_evonorm_b0"):
        model = gatewise.create_model(name, **SMALL[name]).eval()
        block = model.stages[0][0]
        inner = block.conv3 if name.startswith("resnetv2") else block.expand
        assert inner(torch.randn(1, 8, 4, 4)).abs().max() == 0
        x = torch.randn(1, 64, 4, 4)
        assert torch.equal(model.stages[1][1](x), x if name.startswith("resnetv2") else x.relu())


def test_official_pooling_pads_at_the_right_and_bottom():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Pool("same")(x).flatten().tolist() == [10, 11, 14, 15]
    assert Pool("symmetric")(x).flatten().tolist() == [5, 7, 13, 15]
    odd = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert torch.equal(Pool("same")(odd), Pool("symmetric")(odd))


def test_layers_without_activation_go_into_their_convolution():
    for name in ("resnet50_evonorm_b0", "efficientnet_b0_evonorm_s0"):
        model = small_model(name)
        folded = fold(model)
        assert any(isinstance(module, EvoNorm) and module.is_affine for module in model.modules())
        assert not any(isinstance(module, EvoNorm) and module.is_affine for module in folded.modules())


def test_dividing_layers_stay_where_they_divide():
    model = small_model("regnetz_d8_evos")
    kept, layers = ([m for m in one.modules() if isinstance(m, EvoNorm)] for one in (fold(model), model))
    assert len(kept) == len(layers)


def test_running_variances_follow_the_batches():
    model = gatewise.create_model("resnet50_evonorm_b0", **SMALL["resnet50_evonorm_b0"]).train()
    layers = {key: module for key, module in model.named_modules() if isinstance(module, EvoNormB0)}
    model(torch.randn(4, 3, 64, 64))
    moved = {key: not torch.equal(layer.running_var, torch.ones(layer.dim)) for key, layer in layers.items()}
    assert moved == {key: layer.act for key, layer in layers.items()}


def test_s_series_is_blind_to_the_rest_of_the_batch():
    model = small_model("resnetv2_50d_evos").train()
    x = torch.randn(3, 3, 64, 64)
    alone = model(x[:1])
    assert torch.allclose(model(x)[:1], alone, rtol=1e-4, atol=1e-5)
    batch = small_model("resnet50_evonorm_b0").train()
    assert not torch.allclose(batch(x)[:1], batch(x[:1]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("EvoNorm2dS0 (32 groups, eps 1e-5)", {"norm_layer": "S0", "norm_groups": 32, "norm_eps": 1e-5}),
        ("EvoNorm2dS0a (group size 16, eps 1e-3)", {"norm_layer": "S0a", "norm_group_size": 16, "norm_eps": 1e-3}),
        ("EvoNorm2dB0", {"norm_layer": "B0"}),
        ("BatchNorm2d", None),
    ],
)
def test_a_layer_in_words_is_understood(text, expected):
    assert norm_of_reference(text) == expected


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (EvoNormResNetConfig, {"depths": (1, 1)}, "every stage needs a depth"),
        (EvoNormResNetConfig, {"pool_padding": "valid"}, "pool_padding must be one of symmetric, same, not 'valid'"),
        (EvoNormResNetConfig, {"preact": True}, "pass deep_stem=True"),
        (EvoNormMobileConfig, {"width_mult": 0.0}, "multipliers must be positive"),
        (EvoNormMobileConfig, {"se_ratio": 2.0}, "se_ratio must be from 0"),
        (EvoNormMobileConfig, {"se_act": "gelu"}, "se_act must be one of relu, silu, not 'gelu'"),
        (EvoNormMobileConfig, {"rows": ((2, 1, 8, 1, 1),)}, "odd kernels and strides of 1 or 2"),
        (EvoNormMobileConfig, {"norm_layer": "S3"}, "layer must be one of B0, B1"),
    ],
)
def test_impossible_options_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_macs_do_not_depend_on_the_layer():
    with torch.device("meta"):
        macs = {
            count(
                gatewise.create_model("mobilenetv2_evonorm_s0", norm_layer=layer).eval(), torch.empty(1, 3, 96, 96)
            ).macs
            for layer in ("S0", "B1", "BN-ReLU6", "GN-ReLU")
        }
    assert len(macs) == 1


def test_official_networks_have_official_settings():
    config = family_of("resnet50_evonorm_b0").variants["resnet50_evonorm_b0"].config
    layer = EvoNormResNet(config).stem[0].norm
    assert (layer.eps, layer.momentum, layer.unbiased) == (1e-5, 0.1, False)
    assert isinstance(EvoNormResNet(config).head, nn.Linear)


@pytest.mark.untyped
@pytest.mark.parametrize("name", ["resnetv2_50d_evos", "resnet50_evonorm_b0", "regnetz_d8_evos"])
def test_exports_to_onnx(name, tmp_path):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(2, 3, 64, 64))
    assert report.error < 1e-4
