"""MOAT, beyond what the digests show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gatewise
from gatewise.catalog.checkpoint import export_state, load_checkpoint, load_state
from gatewise.catalog.registry import family_of
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.cost.count import count
from gatewise.errors import CheckpointError
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import build_case
from gatewise.networks.image.moat import MBConv, MoatBlock, MoatConfig, RelativeAttention, Shortcut, Stem
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "tiny_moat_0": {
        "stem_dims": (8, 8),
        "embed_dims": (8, 16, 32, 48),
        "depths": (1, 1, 2, 1),
        "head_dim": 16,
        "position_sizes": (None, None, 3, 2),
        "num_classes": 5,
    },
    "tiny_moat_0+windows": {
        "stem_dims": (8, 8),
        "embed_dims": (8, 16, 32, 48),
        "depths": (1, 1, 2, 1),
        "head_dim": 16,
        "windows": (None, None, (3, 2), (2, 2)),
        "pad_windows": True,
        "global_at_end": True,
        "position_sizes": (None, None, (4, 3), None),
        "pool_size": 3,
        "num_classes": 5,
    },
}

CARDS = {
    "tiny_moat_0": (3_355_348, 1_040_734_208),
    "tiny_moat_1": (5_122_895, 1.5755e9),
    "tiny_moat_2": (9_772_741, 2.9746e9),
    "tiny_moat_3": (19_534_390, 5.897e9),
    "moat_0": (27_846_892, 5.638e9),
    "moat_1": (41_598_448, 9.001e9),
    "moat_2": (73_422_408, None),
    "moat_3": (189_958_040, None),
    "moat_4": (483_214_184, None),
    "tiny_moat_0_no_position": (3_332_232, 1_040_734_208),
    "tiny_moat_1_no_position": (5_094_000, 1.5755e9),
    "tiny_moat_2_no_position": (9_732_288, 2.9746e9),
    "tiny_moat_3_no_position": (19_476_600, 5.897e9),
    "moat_0_no_position": (27_777_544, 5.638e9),
    "moat_1_no_position": (41_467_864, 9.001e9),
    "moat_2_no_position": (73_248_296, None),
    "moat_3_no_position": (189_536_280, None),
    "moat_4_no_position": (482_539_368, None),
}
"""Parameters (exact, with and without positions) and MACs (exact where an integer) at the published sizes."""

PAGE_FLOPS = {"moat_2": 54.3e9, "moat_3": 271.0e9, "moat_4": 648.5e9}


def built_on_meta(name, **overrides):
    with torch.device("meta"):
        return gatewise.create_model(name, **overrides).eval()


@pytest.mark.parametrize("name", PAGE_FLOPS)
def test_large_models_cost_what_the_model_page_says(name):
    pixels = family_of(name).variants[name].input_size[1]
    cost = count(built_on_meta(name), torch.empty(1, 3, pixels, pixels, device="meta"))
    # The page's counter has more than products in it: some 2 % of them at 384 and 512 pixels.
    assert 0.97 < cost.macs / PAGE_FLOPS[name] < 1
    assert cost.parameters == CARDS[name][0]


def test_moat_2_costs_17_gigamacs_at_224():
    cost = count(built_on_meta("moat_2"), torch.empty(1, 3, 224, 224, device="meta"))
    assert cost.macs == pytest.approx(17.045e9, rel=5e-4)


def test_input_gradient_of_the_windowed_network_equals_the_references():
    """The record holds the gradient of one output of eight."""
    record = json.loads((FINGERPRINTS / "moat" / "small_custom_window.json").read_text())
    case = build_case(record)
    assert case.module.config.windows == (None, None, (4, 4), (2, 2))
    assert case.module.config.global_at_end
    x = make_input(**record["inputs"]["input"]).requires_grad_()
    output = case.run(case.module.eval(), x)[record["grads_of"]]
    (gradient,) = torch.autograd.grad((output * make_input("cotangent", output.shape)).sum(), x)
    assert relative_error(gradient, record["grads"]["input"]) < 1e-4


def test_a_record_without_positions_or_with_sizes_from_the_map_is_understood():
    record = json.loads((FINGERPRINTS / "moat" / "small_custom.json").read_text())
    config = record["config"] | {"position_embedding_size": [None] * 4}
    assert build_case(record | {"config": config}).module.config.position_sizes == (None, None, (3, 3), (2, 2))
    plain = {key: shape for key, shape in record["keys"].items() if "relative_position" not in key}
    config = record["config"] | {"relative_position_embedding_type": None}
    assert not build_case(record | {"config": config, "keys": plain}).module.config.relative_position
    assert build_case(record | {"config": config | {"layers": 3}}) is None


def same_padding(length, kernel, stride):
    """By the definition: ceil(length / stride) positions, the smaller half of the padding first."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize("pool_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 5), (7, 6), (9, 9)])
def test_pooling_averages_over_real_pixels_alone(size, pool_size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    (top, bottom), (left, right) = (same_padding(n, pool_size, 2) for n in size)

    def sums(x):
        padded = F.pad(x, (left, right, top, bottom))
        return padded.unfold(2, pool_size, 2).unfold(3, pool_size, 2).sum(dim=(4, 5))

    pooled = Shortcut(3, 3, 2, pool_size)(x)
    assert pooled.shape[2:] == tuple(-(-n // 2) for n in size)
    assert torch.allclose(pooled, sums(x) / sums(torch.ones_like(x)))


def test_pooling_of_half_precision_is_done_in_float32():
    x = torch.randn(1, 4, 9, 8).bfloat16()
    assert torch.equal(Shortcut(4, 4, 2, 3)(x), Shortcut(4, 4, 2, 3)(x.float()).bfloat16())


@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 9)])
def test_strided_convolutions_pad_as_tensorflow_does(size):
    stem = Stem(3, (4, 6)).eval()
    x = torch.randn(1, 3, *size)
    (top, bottom), (left, right) = (same_padding(n, 3, 2) for n in size)
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), stem.first.conv.weight, stem.first.conv.bias, stride=2)
    expected = stem.second(F.gelu(stem.first.norm(y)))
    assert torch.allclose(stem(x), expected, atol=1e-6)
    symmetric = F.conv2d(x, stem.first.conv.weight, stem.first.conv.bias, stride=2, padding=1)
    assert torch.allclose(y, symmetric) == (size == (9, 9))


def test_hidden_widths_follow_the_width_that_comes_out():
    block = MBConv(16, 24, 2, se_ratio=0.25)
    assert block.expand.conv.out_channels == 96
    assert block.se.reduce.out_channels == 6
    assert MBConv(4, 2, se_ratio=0.25).se.reduce.out_channels == 1


def test_merging_leaves_no_norm_in_front_and_the_same_output():
    block = small_model("tiny_moat_0").stages[2][0].mbconv
    x = torch.randn(2, 16, 9, 8)
    merged = block.merged()
    assert isinstance(merged.pre_norm, torch.nn.Identity)
    assert torch.allclose(merged(x), block(x), rtol=1e-4, atol=1e-5)


def test_only_stages_without_attention_squeeze_and_excite():
    model = small_model("tiny_moat_0")
    gated = [name for name, module in model.named_modules() if hasattr(module, "read_gates")]
    assert gated == ["stages.0.0.se", "stages.1.0.se"]
    x = torch.randn(2, 32, 5, 4)
    gates = model.stages[0][0].se.read_gates(x)["channels"]
    assert gates.shape == (2, 32)
    assert torch.equal(model.stages[0][0].se(x), x * gates[:, :, None, None])


def test_survival_falls_linearly_towards_a_block_that_is_not_there():
    model = built_on_meta("moat_0")
    rates = [block.drop_path.rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.2 * i / 14 for i in range(14)])
    inner = [block.mbconv.drop_path.rate for stage in list(model.stages)[2:] for block in stage]
    assert inner == rates[5:]


def attention(window, table_window=None, dim=32):
    module = RelativeAttention(dim, 16, window, table_window).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


@pytest.mark.parametrize("window", [(6, 4), (7, 9), (6, 100)])
def test_a_window_as_large_as_the_map_is_global(window):
    local, overall = (attention(shape, (3, 5)) for shape in (window, None))
    overall.load_state_dict(local.state_dict())
    x = torch.randn(2, 6, 4, 32, dtype=torch.float64)
    assert torch.allclose(local(x), overall(x), atol=1e-12)


def test_attention_stays_in_its_window_and_convolutions_do_not():
    layer = attention((4, 4), (4, 4))
    x = torch.randn(1, 8, 8, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, :4, :4].sum(), x)
    assert gradient[:, :4, :4].abs().min() > 0
    assert gradient[:, 4:].abs().sum() == gradient[:, :, 4:].abs().sum() == 0
    blocks = torch.nn.Sequential(*(MoatBlock(MBConv(32, 32), attention((4, 4), (4, 4))) for _ in range(2)))
    blocks.double().eval()
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(blocks(x)[0, :, 0, 0].sum(), x)
    assert gradient[..., 7, 7].abs().max() > 0


def test_padding_takes_any_map_and_changes_nothing_where_windows_fit():
    windows = (None, None, (3, 2), (2, 2))
    padded, exact = (small_model("tiny_moat_0", windows=windows, pad_windows=pad) for pad in (True, False))
    padded.load_state_dict(exact.state_dict())
    assert padded(torch.randn(2, 3, 75, 50)).shape == (2, 5)
    x = torch.randn(2, 3, 192, 64)
    assert torch.equal(padded(x), exact(x))


@pytest.mark.parametrize(
    ("windows", "size", "message"),
    [
        (
            (14, 14),
            (400, 544),
            "stage 3 map 25x34 is not divisible by window 14x14; pad the input to a multiple of 224",
        ),
        (
            (14, 7),
            (448, 400),
            "stage 3 map 28x25 is not divisible by window 14x7; pad the input to a multiple of 224x112",
        ),
    ],
)
def test_maps_that_windows_do_not_divide_are_refused(windows, size, message):
    model = small_model("tiny_moat_0", windows=(None, None, windows, None))
    with pytest.raises(ValueError, match=f"{message} or enable window padding"):
        model(torch.zeros(1, 3, *size))


def test_the_last_block_of_a_stage_may_be_global():
    model = small_model("tiny_moat_0", windows=(None, None, (2, 2), (2, 2)), global_at_end=True)
    assert [block.attention.window for stage in list(model.stages)[2:] for block in stage] == [(2, 2), None, None]


def test_endpoints_have_their_published_names():
    model = small_model("tiny_moat_0", num_classes=0, features_only=True)
    assert isinstance(model.norm, torch.nn.Identity)
    x = torch.randn(1, 3, 64, 96)
    endpoints = model.forward_endpoints(x)
    assert sorted(endpoints) == sorted(f"{kind}{i}" for kind in ("stage", "res") for i in range(1, 6))
    assert endpoints["stage1"].shape == (1, 8, 32, 48)
    assert torch.equal(endpoints["res5"], F.gelu(endpoints["stage5"]))
    levels = model.forward_pyramid(x)
    assert all(torch.equal(level, endpoints[f"res{i}"]) for i, level in enumerate(levels, start=2))


def test_strides_and_levels_may_be_chosen():
    model = small_model("tiny_moat_0", stage_strides=(2, 2, 2, 1), out_indices=(1, 3))
    assert model.feature_info == [(16, 8), (48, 16)]
    assert [level.shape for level in model.forward_pyramid(torch.randn(1, 3, 64, 32))] == [(1, 16, 8, 4), (1, 48, 4, 2)]


def test_checkpointed_attention_gives_the_same_gradients_and_keeps_less():
    models = [small_model("tiny_moat_0", checkpoint_attention=enable).train() for enable in (False, True)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 64, 96)
    kept, gradients = [], []
    for model in models:
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert kept[1] < kept[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def tensorflow_variables(model):
    """Names and axes of TensorFlow's variables, written out independently of the layout under test."""
    found = {}
    for key, tensor in export_state(model, "official").items():
        place, _, leaf = key.rpartition(".")
        name = "moat/" + place.replace(".", "/")
        if leaf == "num_batches_tracked":
            continue
        if place.endswith(("norm", "norm_0")):
            leaf = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean"}.get(leaf, "moving_variance")
        elif ".attention." in f"{place}." and place[-2:] in (".q", ".k", ".v"):
            tensor = tensor.T.reshape(tensor.shape[1], -1, 16) if leaf == "weight" else tensor.reshape(-1, 16)
        elif place.endswith("attention.o"):
            tensor = tensor.T.reshape(-1, 16, tensor.shape[0]) if leaf == "weight" else tensor
        elif place.endswith("depthwise_conv"):
            leaf, tensor = "depthwise_kernel", tensor.permute(2, 3, 0, 1)
        elif leaf == "weight":
            kernel = tensor if tensor.ndim == 4 else tensor[:, :, None, None]
            leaf, tensor = "kernel", kernel.permute(2, 3, 1, 0)
        found[f"{name}/{leaf}"] = tensor.contiguous()
    return found


def assert_same_weights(model, other):
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "num_batches" not in key)


def test_tensorflow_variables_load_from_an_archive(tmp_path):
    source, target = small_model("tiny_moat_0"), gatewise.create_model("tiny_moat_0", **SMALL["tiny_moat_0"])
    variables = tensorflow_variables(source)
    assert variables["moat/block_02_01/attention/q/weight"].shape == (32, 2, 16)
    assert variables["moat/block_02_00/attention/relative_position_embedding"].shape == (2, 5, 5)
    assert variables["moat/block_00_00/depthwise_conv/depthwise_kernel"].shape == (3, 3, 32, 1)
    assert variables["moat/logits_head/kernel"].shape == (1, 1, 48, 5)
    averages = {f"{key}/ExponentialMovingAverage": torch.zeros_like(value) for key, value in variables.items()}
    path = tmp_path / "moat.npz"
    np.savez(path, global_step=7, **{key: value.numpy() for key, value in (variables | averages).items()})
    assert load_checkpoint(target, path).name == "tensorflow"
    assert_same_weights(target, source)


def test_moving_averages_serve_where_there_is_nothing_else():
    source, target = small_model("tiny_moat_0"), gatewise.create_model("tiny_moat_0", **SMALL["tiny_moat_0"])
    averages = {
        key if "/moving_" in key else f"{key}/ExponentialMovingAverage": value
        for key, value in tensorflow_variables(source).items()
    }
    assert load_state(target, averages).name == "tensorflow averages"
    assert_same_weights(target, source)


@pytest.mark.parametrize("layout", ["official", "tensorflow"])
def test_layouts_are_written_as_they_are_read(layout):
    source, target = small_model("tiny_moat_0"), gatewise.create_model("tiny_moat_0", **SMALL["tiny_moat_0"])
    written = export_state(source, layout)
    if layout == "tensorflow":
        expected = tensorflow_variables(source)
        assert {key: value.shape for key, value in written.items() if "num_batches" not in key} == {
            key: value.shape for key, value in expected.items()
        }
        assert all(torch.equal(written[key], value) for key, value in expected.items())
    assert load_state(target, written).name == layout
    assert_same_weights(target, source)


def test_a_checkpoint_with_a_missing_key_says_which():
    state = export_state(small_model("tiny_moat_0"), "official")
    del state["block_02_00.attention.k.bias"]
    with pytest.raises(CheckpointError, match=r"unfilled \(1\): stages.2.0.attention.qkv.bias"):
        load_state(small_model("tiny_moat_0"), state)


def test_a_classifiers_weights_fill_the_form_without_head():
    source = small_model("tiny_moat_0")
    target = small_model("tiny_moat_0", num_classes=0, features_only=True)
    load_state(target, source.state_dict(), replace_head=True)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(target.forward_features(x), source.forward_features(x))


def test_tables_adapt_to_other_sizes_and_to_networks_without_them():
    source = small_model("tiny_moat_0")
    torch.nn.init.normal_(source.stages[2][0].attention.table, std=3)
    larger = small_model("tiny_moat_0", position_sizes=(None, None, 4, 3))
    load_state(larger, source.state_dict(), adapt=True)
    x = torch.randn(1, 3, 64, 64)
    resized = F.interpolate(source.stages[2][0].attention.table[None], (7, 7), mode="bilinear")[0]
    assert torch.equal(larger.stages[2][0].attention.table, resized)
    without = small_model("tiny_moat_0", relative_position=False)
    load_state(without, source.state_dict(), adapt=True)
    again = small_model("tiny_moat_0")
    load_state(again, without.state_dict(), adapt=True)
    assert torch.allclose(again(x), without(x), atol=1e-5)
    assert not torch.allclose(again(x), source(x), atol=1e-4)


def test_weights_start_as_published():
    model = gatewise.create_model("tiny_moat_0")
    attention = model.stages[2][0].attention
    for weight in (attention.qkv.weight, attention.table, model.stages[3][0].mbconv.shrink.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attention.qkv.bias.abs().max() == 0
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_one_value_per_channel_cannot_be_normalized_in_training():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        small_model("tiny_moat_0").train()(torch.randn(1, 3, 32, 32))


def test_published_weights_know_their_normalization():
    variants = family_of("moat_2").variants
    assert variants["moat_2"].weights.mean == (0.5, 0.5, 0.5)
    assert variants["moat_1"].weights.std == (0.229, 0.224, 0.225)
    assert variants["moat_2"].weights.source.endswith("/moat2_imagenet_22k_and_1k_384_w_position_embedding.tar.gz")
    assert variants["tiny_moat_3_no_position"].weights.source.endswith(
        "/tiny_moat3_imagenet_1k_256_wo_position_embedding.tar.gz"
    )


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dims": (96, 192, 400, 768)}, "multiples of head_dim 32, not 400"),
        ({"windows": (None, (7, 7))}, r"windows must have one entry per stage \(4\), not"),
        ({"windows": (None, None, (7,), None)}, r"two positive numbers \(rows, columns\), not \(7,\)"),
        ({"windows": (None, None, (7, 0), None)}, r"two positive numbers \(rows, columns\), not \(7, 0\)"),
        ({"position_sizes": (None,) * 4}, "stage 3 attends globally and needs an entry in position_sizes"),
        ({"block_types": ("mbconv", "mbconv", "moat", "mlp")}, "block_types must be of mbconv, moat, not"),
        ({"stage_strides": (2, 2, 2, 4)}, "stage_strides must be 1 or 2, not"),
        ({"pool_size": 0}, "must be positive, not 0"),
        ({"out_indices": (0, 4)}, r"stages 0..3, not \(0, 4\)"),
        ({"features_only": True}, "pass num_classes=0"),
        ({"drop_rate": 0.1}, "drop_rate must be 0, not 0.1"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MoatConfig(**fields)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "size"), [({"pool_size": 3}, (75, 50)), ({"windows": (None, None, (3, 2), None)}, (64, 96))]
)
def test_onnxruntime_gives_the_same(tmp_path, options, size):
    model = small_model("tiny_moat_0", pad_windows=True, **options)
    report = export_onnx(model, tmp_path / "moat.onnx", torch.randn(1, 3, *size))
    assert report.error < 1e-5
    assert report.batch_sizes == (1, 2)
