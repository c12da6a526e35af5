"""TVConv networks for faces, beyond what the digests show."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gatewise
from gatewise.catalog.checkpoint import export_state, load_checkpoint, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.errors import CheckpointError
from gatewise.fidelity.fingerprint import fill, make_input
from gatewise.fidelity.verify import build_case
from gatewise.layers.tvconv import FixedTVConv, TVConv, TVConvOptions
from gatewise.networks.image.tvconv import (
    CosineClassifier,
    ShuffleUnit,
    TVConvMobileNetV2,
    TVConvMobileNetV2Config,
    TVConvShuffleNetV2Config,
)
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "tvconv_mobilenet_v2_x0_1": {
        "num_classes": 5,
        "input_size": (32, 32),
        "rows": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2), (6, 64, 1, 2), (6, 96, 1, 1), (6, 160, 1, 2)),
        "head_channels": 32,
        "embed_dim": 32,
        "operator": {"hidden": 4, "hidden_layers": 1},
    },
    "tvconv_mobilenet_v2_x0_1_base": {
        "num_classes": 5,
        "rows": ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2), (6, 64, 1, 2), (6, 96, 1, 1), (6, 160, 1, 2)),
        "head_channels": 32,
        "embed_dim": 32,
    },
    "tvconv_shufflenet_v2_x0_5": {
        "num_classes": 5,
        "input_size": (32, 32),
        "widths": (8, 8, 12, 16, 32),
        "depths": (1, 2, 2),
        "embed_dim": 32,
        "operator": {"hidden": 4, "hidden_layers": 0, "bias": True},
    },
}

SIZES = {
    "tvconv_mobilenet_v2_x0_1": [(32, 32)],
    "tvconv_shufflenet_v2_x0_5": [(32, 32), (29, 31)],
}

STRIDES = {
    "tvconv_mobilenet_v2_x0_1": (2, 4, 8, 16),
    "tvconv_mobilenet_v2_x0_1_base": (2, 4, 8, 16),
    "tvconv_shufflenet_v2_x0_5": (2, 4, 8, 16),
}

CARDS = {
    "tvconv_mobilenet_v2_x0_1": (16_369_368, 18_023_680),
    "tvconv_mobilenet_v2_x0_2": (19_678_248, 23_187_520),
    "tvconv_mobilenet_v2_x0_3": (23_816_352, 38_127_232),
    "tvconv_mobilenet_v2_x0_5": (30_079_264, 66_260_224),
    "tvconv_mobilenet_v2_x1_0": (49_708_576, 211_451_392),
    "tvconv_mobilenet_v2_x0_1_base": (324_672, 18_023_680),
    "tvconv_mobilenet_v2_x0_2_base": (404_352, 23_187_520),
    "tvconv_mobilenet_v2_x0_3_base": (526_656, 38_127_232),
    "tvconv_mobilenet_v2_x0_5_base": (827_968, 66_260_224),
    "tvconv_mobilenet_v2_x1_0_base": (2_241_280, 211_451_392),
    "tvconv_shufflenet_v2_x0_5": (10_602_984, 29_509_760),
    "tvconv_shufflenet_v2_x1_0": (18_904_696, 106_234_976),
    "tvconv_shufflenet_v2_x1_5": (26_650_216, 217_064_576),
    "tvconv_shufflenet_v2_x0_5_base": (869_664, 29_509_760),
    "tvconv_shufflenet_v2_x1_0_base": (1_781_476, 106_234_976),
    "tvconv_shufflenet_v2_x1_5_base": (3_006_496, 217_064_576),
    "tvconv_deeplabv3plus": (36_944_610, 4_526_864_512),
    "tvconv_deeplabv3plus_depthwise": (6_401_634, 4_526_864_512),
    "tvconv_deeplabv3plus_base": (5_220_834, 4_230_477_952),
}
"""Parameters and MACs. What a TVConv network costs once, to make its kernels, stands below."""

KERNELS = {
    "tvconv_mobilenet_v2_x0_1": (4_238_770_176, 18_023_680, 4_084_992),
    "tvconv_mobilenet_v2_x0_2": (4_516_466_688, 23_187_520, 4_567_104),
    "tvconv_mobilenet_v2_x0_3": (5_498_855_424, 38_127_232, 6_272_640),
    "tvconv_mobilenet_v2_x0_5": (6_627_557_376, 66_260_224, 8_232_192),
    "tvconv_mobilenet_v2_x1_0": (10_652_663_808, 211_451_392, 15_220_224),
    "tvconv_shufflenet_v2_x0_5": (1_262_158_848, 29_509_760, 1_337_472),
    "tvconv_shufflenet_v2_x1_0": (2_252_012_544, 106_234_976, 3_055_968),
    "tvconv_shufflenet_v2_x1_5": (3_125_412_864, 217_064_576, 4_572_288),
    "tvconv_deeplabv3plus": (12_244_416_640 - 4_526_864_512 + 13_271_040, 4_526_864_512, 13_271_040),
}
"""MACs of making the kernels, of an image with kernels kept, and numbers in the kernels."""


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_paid_once(name):
    making, per_image, numbers = KERNELS[name]
    with torch.device("meta"):
        model = gatewise.create_model(name).eval()
        x = torch.empty(1, 3, *model.config.input_size)
    operators = [module for module in model.modules() if isinstance(module, TVConv)]
    with FlopCounterMode(display=False) as counter:
        for operator in operators:
            operator.kernels()
    assert counter.get_total_flops() // 2 == making
    assert count(model, x).macs == per_image
    assert all(operator.is_cached for operator in operators)
    assert sum(operator.merged().weight.numel() for operator in operators) == numbers


def test_map_sizes_and_widths_are_the_published_ones():
    with torch.device("meta"):
        model = gatewise.create_model("tvconv_mobilenet_v2_x0_1")
    found = [(m.channels, m.stride, m.map_size[0]) for m in model.modules() if isinstance(m, TVConv)]
    expected = [(8, 1, 96), (48, 2, 48), (48, 1, 48), (48, 2, 24), (48, 1, 24), (48, 1, 24), (48, 2, 12)]
    expected += [*[(48, 1, 12)] * 4, *[(96, 1, 12)] * 2, (96, 2, 6), *[(96, 1, 6)] * 3]
    assert found == expected
    assert all(m.map_size[0] == m.map_size[1] for m in model.modules() if isinstance(m, TVConv))


def test_shuffling_lets_the_halves_take_turns():
    unit = ShuffleUnit(6, 6, 1, None, (4, 4)).eval()
    x = torch.randn(2, 6, 4, 4)
    y = unit(x)
    assert torch.equal(y[:, ::2], x[:, :3])
    assert torch.equal(y[:, 1::2], unit.branch(x[:, 3:]))


def test_a_unit_of_stride_two_makes_both_halves_from_the_whole():
    unit = ShuffleUnit(6, 10, 2, TVConvOptions(hidden=4, hidden_layers=0), (4, 3)).eval()
    x = torch.randn(2, 6, 8, 5)
    y = unit(x)
    assert y.shape == (2, 10, 4, 3)
    assert torch.allclose(y[:, ::2], unit.shortcut(x))
    assert torch.allclose(y[:, 1::2], unit.branch(x))
    with pytest.raises(ValueError, match="keeps its 6 channels, not 8"):
        ShuffleUnit(6, 8, 1, None, (4, 4))


def test_embeddings_are_not_normalized():
    model = small_model("tvconv_mobilenet_v2_x0_1_base", num_classes=0)
    embedding = model(torch.randn(2, 3, 32, 32))
    assert embedding.shape == (2, 32)
    assert not torch.allclose(embedding.norm(dim=1), torch.ones(2), atol=0.1)


def test_additive_margin_as_in_the_worked_example():
    example = json.loads((FINGERPRINTS / "tvconv" / "worked_examples.json").read_text())["am_softmax"]
    classifier = CosineClassifier(example["feat_dim"], example["classnum"], example["scale"])
    classifier.weight.data = fill(example["weight_key"], example["weight_shape"]).t()
    labels = torch.tensor(example["labels"])
    feats = make_input(**example["feats"])
    logits = classifier.with_margin(classifier(feats), labels, example["margin"])
    assert torch.allclose(logits, torch.tensor(example["logits"]), atol=1e-4)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(example["cross_entropy"], rel=1e-5)


def test_networks_for_other_sizes_take_interpolated_weights():
    source = small_model("tvconv_shufflenet_v2_x0_5")
    wide = small_model("tvconv_shufflenet_v2_x0_5", input_size=(48, 33))
    with pytest.raises(CheckpointError, match="affinity"):
        load_state(wide, source.state_dict())
    load_state(wide, source.state_dict(), adapt=True)
    assert wide(torch.randn(2, 3, 48, 33)).shape == (2, 5)
    official = export_state(source, "official")
    load_state(wide, official, adapt=True)
    again = small_model("tvconv_shufflenet_v2_x0_5")
    load_state(again, official, adapt=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), source(x))


def test_non_square_networks():
    model = small_model("tvconv_mobilenet_v2_x0_1", input_size=(40, 23))
    x = torch.randn(2, 3, 40, 23)
    assert model(x).shape == (2, 5)
    assert [tuple(level.shape[2:]) for level in model.forward_pyramid(x)] == [(20, 12), (10, 6), (5, 3), (3, 2)]
    assert torch.allclose(fold(model)(x), model(x), atol=1e-4 * model(x).abs().max().item())


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("name", "size"), [("tvconv_mobilenet_v2_x0_1", (33, 32)), ("tvconv_shufflenet_v2_x0_5", (33, 32))]
)
def test_images_of_another_size_are_refused_with_advice(name, size):
    message = r"TVConv built for 32x32 images, got 33x32: .* input_size=\(33, 32\), .* adapt=True"
    with pytest.raises(ValueError, match=message):
        small_model(name)(torch.zeros(1, 3, *size))


def test_folded_networks_hold_kernels_alone():
    model = small_model("tvconv_mobilenet_v2_x0_1")
    folded = fold(model)
    assert sum(isinstance(module, FixedTVConv) for module in folded.modules()) == 7
    assert not any(isinstance(module, TVConv | nn.BatchNorm1d) for module in folded.modules())
    with torch.device("meta"):
        published = gatewise.create_model("tvconv_mobilenet_v2_x0_1").eval()
    stored = sum(tensor.numel() for tensor in fold(published).state_dict().values())
    # 4.1 million numbers of kernels and a seventh of a million of the rest, where training has 16 million.
    assert stored < 5_000_000


def test_eval_mode_makes_kernels_once_per_network():
    model = small_model("tvconv_mobilenet_v2_x0_1")
    calls = []
    for module in model.modules():
        if isinstance(module, TVConv):
            module.generator.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 7


@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
@pytest.mark.parametrize("name", ["tvconv_mobilenet_v2_x0_1", "tvconv_shufflenet_v2_x0_5"])
def test_published_layouts_are_written_and_read(name, drop_rate, tmp_path):
    source, x = small_model(name, drop_rate=drop_rate), torch.randn(2, 3, 32, 32)
    expected = source(x)
    for layout, prefix in (("official", ""), ("lightning", "model.")):
        written = export_state(source, layout)
        assert written["head.weight"].shape == (32, 5)
        norm = "output_layer.layer1.0.weight" if drop_rate else "output_layer.layer1.weight"
        assert prefix + norm in written
        assert all(key.startswith(prefix) for key in written if not key.startswith("head."))
        path = tmp_path / f"{layout}.ckpt"
        torch.save({"state_dict": {key: tensor.contiguous() for key, tensor in written.items()}, "epoch": 3}, path)
        other = gatewise.create_model(name, **SMALL[name], drop_rate=drop_rate).eval()
        load_checkpoint(other, path)
        assert torch.equal(other(x), expected)


def test_keys_are_those_of_the_published_code():
    record = json.loads((FINGERPRINTS / "tvconv" / "mobilenet_v2_x0_1_tvconv.json").read_text())
    with torch.device("meta"):
        model = gatewise.create_model("tvconv_mobilenet_v2_x0_1")
    written = export_state(model, "official")
    numbers = {"TVConv_k", "TVConv_k_square", "stride", "channels", "h", "w"}
    beside = {key for key in written if key.rsplit(".", 1)[-1] in {*numbers, "num_batches_tracked"}}
    assert set(written) - beside == set(record["keys"])
    first = {key: int(written[f"features.2.conv.1.0.{key}"]) for key in numbers}
    assert first == {"TVConv_k": 3, "TVConv_k_square": 9, "stride": 2, "channels": 48, "h": 48, "w": 48}
    assert all(list(written[key].shape) == shape for key, shape in record["keys"].items())


def test_numbers_that_contradict_the_network_are_told():
    source = small_model("tvconv_mobilenet_v2_x0_1")
    written = export_state(source, "official")
    written["features.2.conv.1.0.stride"] = torch.tensor(1)
    with pytest.raises(CheckpointError, match=r"stages\.1\.0\.spatial\.conv\.stride is 1, not 2"):
        load_state(source, written)
    for key in [key for key in written if key.endswith((".stride", ".TVConv_k"))]:
        del written[key]
    load_state(source, written)


def test_a_network_without_classifier_leaves_out_that_of_a_training_checkpoint():
    source = small_model("tvconv_mobilenet_v2_x0_1")
    embedder = small_model("tvconv_mobilenet_v2_x0_1", num_classes=0)
    assert load_state(embedder, export_state(source, "lightning")).name == "lightning"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(embedder(x), source.embedding(source.forward_features(x)))


def filled(config: dict, keys: dict, source: str = "face_recognition/model/mobilenetv2.py"):
    return build_case({"system": "tvconv", "source": source, "config": config, "keys": keys, "inputs": {}})


@pytest.mark.parametrize("factory", ["mobilenet_v2_x0_2", "shufflenet_v2_x0_5"])
@pytest.mark.parametrize("atom", ["base", "TVConv"])
def test_the_published_factories_are_understood(factory, atom):
    config = {"factory": factory, "input_size": [32, 32], "atom": atom, "drop_ratio": 0.2, "TVConv_inter_chans": 8}
    with torch.device("meta"):
        ours = gatewise.create_model(
            f"tvconv_{factory}{'_base' if atom == 'base' else ''}",
            input_size=(32, 32),
            drop_rate=0.2,
            operator=None if atom == "base" else {"hidden": 8, "hidden_layers": 1},
        )
    keys = {key: list(t.shape) for key, t in export_state(ours, "official").items() if t.ndim}
    case = filled(config, keys)
    assert case.module.config == ours.config
    assert case.tap_path("output_layer.layer2.0")[0] == "embedding.project"


@pytest.mark.parametrize("cls", ["InvertedResidual", "TVConvInvertedResidual"])
def test_published_shuffle_units_are_understood(cls):
    operator = TVConvOptions(hidden=16, hidden_layers=1) if cls.startswith("TV") else None
    unit = ShuffleUnit(8, 12, 2, operator, (5, 5))
    config = {"cls": cls, "inp": 8, "oup": 12, "stride": 2, "h_w": 5}
    record = {"system": "tvconv", "source": "model/shufflenetv2.py", "config": config, "keys": {}, "inputs": {}}
    from gatewise.fidelity.cases.tvconv import shufflenet_case

    case = shufflenet_case(record)
    ours = [key for key in unit.state_dict() if "num_batches" not in key]
    theirs = [case.layout.to_theirs(key) for key in ours]
    assert [case.to_ours(key) for key in theirs] == ours
    assert {key.split(".")[0] for key in theirs} == {"branch1", "branch2"}
    assert set(case.module.state_dict()) == set(unit.state_dict())


def test_weights_start_as_published():
    torch.manual_seed(0)
    config = TVConvMobileNetV2Config(input_size=(16, 16), operator=TVConvOptions(hidden=16, hidden_layers=1))
    model = TVConvMobileNetV2(config)
    weight = model.head_conv.conv.weight
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.02)
    made = model.stages[5][1].spatial.conv.generator.project.weight
    assert made.std().item() == pytest.approx((2 / (9 * made.shape[0])) ** 0.5, rel=0.02)
    assert model.embedding.project.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (model.stages[0][0].spatial.conv.affinity == 1).all()


@pytest.mark.untyped
def test_onnx_agrees(tmp_path):
    model = small_model("tvconv_mobilenet_v2_x0_1", rows=((1, 16, 1, 1), (6, 24, 1, 2)))
    report = export_onnx(model, tmp_path / "network.onnx", torch.randn(1, 3, 32, 32))
    assert report.error < 1e-4


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (TVConvMobileNetV2Config, {"input_size": (0, 96)}, r"positive height and width, not \(0, 96\)"),
        (TVConvMobileNetV2Config, {"embed_dim": 0}, "embed_dim must be positive, not 0"),
        (TVConvMobileNetV2Config, {"width_mult": 0.0}, "width_mult must be positive, not 0.0"),
        (TVConvShuffleNetV2Config, {"widths": (24, 49, 96, 192, 1024)}, "those of the stages even"),
        (TVConvShuffleNetV2Config, {"depths": (4, 8)}, r"three positive numbers, not \(4, 8\)"),
    ],
)
def test_impossible_options_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_plain_networks_take_any_size():
    model = small_model("tvconv_mobilenet_v2_x0_1_base")
    assert model(torch.randn(1, 3, 1, 7)).shape == (1, 5)
