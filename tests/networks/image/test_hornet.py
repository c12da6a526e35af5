"""HorNet's options, forms, checkpoints and errors, beyond what the digests show."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state, peel
from gatewise.catalog.registry import registered_config
from gatewise.efficiency import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.errors import CheckpointError
from gatewise.fidelity.cases.hornet import reference_case
from gatewise.gates.capture import capture
from gatewise.layers.gnconv import GlobalLocalFilter, GnConv
from gatewise.networks.image.hornet import HorNet, HorNetConfig
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "hornet_tiny_7x7": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "orders": (2, 3, 4, 5),
        "num_classes": 5,
    },
    "hornet_tiny_gf": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "orders": (2, 3, 3, 4),
        "grids": (None, None, (4, 3), (2, 2)),
        "num_classes": 5,
    },
    "hornet_small_iso_gf": {"embed_dims": (32,), "depths": (3,), "grids": ((4, 3),), "num_classes": 5},
}

SIZES = {"hornet_small_iso_gf": [(64, 64), (64, 96), (75, 50), (16, 161)]}

STRIDES = {"hornet_small_iso_gf": (16,)}

CARDS = {
    "hornet_tiny_7x7": (22_409_512, 3_968_389_312),
    "hornet_tiny_gf": (22_991_848, 3_888_705_120),
    "hornet_small_7x7": (49_528_264, 8.814e9),
    "hornet_small_gf": (50_401_768, 8.694e9),
    "hornet_base_7x7": (87_256_680, 15.567e9),
    "hornet_base_gf": (88_421_352, 15.408e9),
    "hornet_base_gf_img384": (92_099_560, 45.278e9),
    "hornet_large_7x7": (194_542_504, 34.796e9),
    "hornet_large_gf": (196_289_512, 34.557e9),
    "hornet_large_gf_img384": (201_806_824, 101.553e9),
    "hornet_small_iso_7x7": (21_811_816, 4_183_745_280),
    "hornet_small_iso_gf": (22_420_936, 4_108_387_200),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published table; of the isotropic
form, which has none, by the formulas of its parts. Fourier transforms count nothing."""

DIGESTS = FINGERPRINTS / "hornet"


def record(name):
    return json.loads((DIGESTS / f"{name}.json").read_text())


def macs_per_position(dim, order):
    """A gnConv with 7x7 kernels: projections in and out, gates, and the chain in closed form."""
    widths = [dim // 2 ** (order - 1 - i) for i in range(order)]
    return 3 * dim**2 + 49 * sum(widths) + 2 * dim**2 * (1 - 4 ** (1 - order)) / 3


@pytest.mark.parametrize(("order", "macs"), [(1, 15_424), (2, 19_040), (3, 20_336), (4, 20_856), (5, 21_084)])
def test_higher_orders_cost_hardly_more(order, macs):
    assert count(GnConv(64, order), torch.zeros(1, 64, 5, 7)).macs == 35 * macs
    assert macs_per_position(64, order) == macs


def test_a_block_is_two_residual_branches():
    block = small_model("hornet_tiny_gf").stages[2].blocks[0]
    x = torch.randn(2, 48, 5, 6)
    branch = block.gnconv(F.layer_norm(x.permute(0, 2, 3, 1), (48,), *affine(block.norm1), 1e-6).permute(0, 3, 1, 2))
    y = x + block.scale1[:, None, None] * branch
    hidden = F.gelu(
        F.linear(F.layer_norm(y.permute(0, 2, 3, 1), (48,), *affine(block.norm2), 1e-6), *affine(block.mlp.fc1))
    )
    expected = y + (block.scale2 * F.linear(hidden, *affine(block.mlp.fc2))).permute(0, 3, 1, 2)
    assert torch.allclose(block(x), expected, rtol=1e-5, atol=1e-6)


def affine(module):
    return module.weight, module.bias


def test_folding_leaves_no_scale_on_gates_or_branches():
    folded = fold(small_model("hornet_tiny_gf"))
    assert all(block.scale1 is None and block.gnconv.scale is None for stage in folded.stages for block in stage.blocks)


def test_without_layer_scale_there_is_none():
    model = small_model("hornet_tiny_7x7", layer_scale_init=None)
    assert not any("scale" in key for key in model.state_dict())
    assert model(torch.randn(1, 3, 40, 40)).shape == (1, 5)


def test_gate_scales_may_differ_between_stages():
    model = small_model("hornet_tiny_7x7", gate_scale=(1.0, 0.5, 0.25, 0.125))
    assert [stage.blocks[0].gnconv.scale for stage in model.stages] == [None, 0.5, 0.25, 0.125]


def test_global_filters_stand_where_there_is_a_grid():
    model = small_model("hornet_tiny_gf")
    has_filter = [isinstance(stage.blocks[0].gnconv.spatial, GlobalLocalFilter) for stage in model.stages]
    assert has_filter == [False, False, True, True]
    assert model.stages[2].blocks[1].gnconv.spatial.spectrum.shape == (42, 4, 3, 2)


@pytest.mark.parametrize(
    ("name", "grids"), [("hornet_base_gf", ((14, 8), (7, 4))), ("hornet_large_gf_img384", ((24, 13), (12, 7)))]
)
def test_published_grids_fit_the_published_image_size(name, grids):
    assert registered_config(name).grids == (None, None, *grids)
    pixels = gatewise.model_card(name).input_size[1]
    assert grids == tuple((pixels // stride, pixels // stride // 2 + 1) for stride in (16, 32))


def test_at_the_size_of_its_grids_the_later_stages_see_the_whole_map():
    model = small_model("hornet_tiny_gf")
    x = torch.randn(1, 64, 2, 9, requires_grad=True)
    model.stages[3].blocks[0].gnconv(x)[0, :, 0, 0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_spectra_resized_once_give_what_spectra_resized_in_every_pass_give():
    source = small_model("hornet_tiny_gf")
    larger = small_model("hornet_tiny_gf", grids=(None, None, (6, 4), (3, 2)))
    load_state(larger, export_state(source, "official"), adapt=True)
    x = torch.randn(2, 3, 96, 97)
    assert larger.stages[2].blocks[0].gnconv.spatial.spectrum.shape == (42, 6, 4, 2)
    assert torch.allclose(larger(x), source(x), rtol=1e-5, atol=1e-6)


def test_other_grids_are_refused_without_adaptation():
    larger = small_model("hornet_tiny_gf", grids=(None, None, (6, 4), (3, 2)))
    with pytest.raises(CheckpointError, match=r"complex_weight \(42, 4, 3, 2\)"):
        load_state(larger, export_state(small_model("hornet_tiny_gf"), "official"))


@pytest.mark.parametrize("name", SMALL)
def test_checkpoints_go_both_ways_in_the_official_layout(name):
    model, other = small_model(name), small_model(name)
    saved = {f"module.{key}": value + 1 for key, value in export_state(model, "official").items()}
    load_state(other, peel({"model": saved}))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value + 1)


def test_official_keys_are_those_of_the_published_network():
    stored = record("hornet_tiny_gf")
    with torch.device("meta"):
        model = gatewise.create_model("hornet_tiny_gf")
    exported = {key: list(value.shape) for key, value in export_state(model, "official").items()}
    assert exported == stored["keys"]


def test_averaged_weights_are_preferred():
    model, other = small_model("hornet_tiny_7x7"), small_model("hornet_tiny_7x7")
    state = export_state(model, "official")
    load_state(other, peel({"model": state, "model_ema": {key: value + 1 for key, value in state.items()}}))
    assert torch.equal(other.head.bias, model.head.bias + 1)


def test_a_classification_checkpoint_fills_a_dense_prediction_network():
    source = small_model("hornet_tiny_7x7")
    dense = small_model("hornet_tiny_7x7", num_classes=0, pyramid_norm=True)
    load_state(dense, export_state(source, "official"), replace_head=True)
    assert torch.equal(dense.stages[2].blocks[1].mlp.fc1.weight, source.stages[2].blocks[1].mlp.fc1.weight)
    assert list(dense.level_norms) == ["0", "1", "2", "3"]


def test_pre_trained_large_networks_bring_the_width_of_their_head():
    for name in ("hornet_large_7x7", "hornet_large_gf", "hornet_large_gf_img384"):
        assert gatewise.model_card(name).weights.num_classes == 10450


def test_chosen_levels_have_a_norm_each_and_no_other():
    model = small_model("hornet_tiny_7x7", num_classes=0, pyramid_norm=True, out_indices=(1, 3))
    assert list(model.level_norms) == ["1", "3"]
    levels = model.forward_pyramid(torch.randn(1, 3, 70, 64))
    assert [tuple(level.shape[1:]) for level in levels] == [(32, 8, 8), (64, 2, 2)]


def test_sizes_round_down():
    levels = small_model("hornet_tiny_gf").forward_pyramid(torch.randn(1, 3, 63, 32))
    assert [tuple(level.shape[2:]) for level in levels] == [(15, 8), (7, 4), (3, 2), (1, 1)]


def test_gates_of_every_block_are_read_by_order():
    readings = capture(small_model("hornet_tiny_7x7"), torch.randn(2, 3, 64, 64))
    assert [len(reading.maps) for reading in readings] == [2, 3, 4, 4, 5]
    assert readings[2].maps["order 4"].shape == (2, 4, 4)


def test_weights_start_as_published():
    torch.manual_seed(0)
    config = replace(small_model("hornet_tiny_gf").config, head_init_scale=0.001, num_classes=50)
    model = HorNet(config)
    block = model.stages[3].blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.gnconv.spatial.spectrum.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.gnconv.project_in.bias.abs().max() == 0
    assert torch.equal(block.scale1, torch.full((64,), 1e-6))
    assert model.head.weight.std().item() == pytest.approx(0.02e-3, rel=0.05)
    uniform = HorNet(replace(config, uniform_init=True)).stages[3].blocks[0].mlp.fc1.weight
    limit = (6 / (64 + 256)) ** 0.5
    assert 0.99 * limit < uniform.abs().max() <= limit


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layer_scale_init_value": 0}, {"layer_scale_init": None}),
        ({"layer_scale_init_value": 0.5, "head_init_scale": 0.1}, {"layer_scale_init": 0.5, "head_init_scale": 0.1}),
        (
            {"gnconv": [{"order": 2, "s": 0.5}] * 4},
            {"orders": (2,) * 4, "gate_scale": (0.5,) * 4, "grids": (None,) * 4},
        ),
        ({"gnconv": [{"order": 1, "filter": "global_local"}] * 4}, {"grids": ((14, 8),) * 4, "gate_scale": (1.0,) * 4}),
        ({"drop_path_rate": 0.3, "uniform_init": True}, {"drop_path_rate": 0.3, "uniform_init": True}),
    ],
)
def test_the_references_options_are_ours(change, expected):
    stored = record("small_7x7")
    config = reference_case(stored | {"config": stored["config"] | change}).module.config
    assert {name: getattr(config, name) for name in expected} == expected


def test_parts_of_the_reference_are_recognized():
    def module(config, keys=()):
        found = reference_case({"config": config, "keys": dict.fromkeys(keys), "variant": "part", "source": "x"})
        return found and found.module

    assert module({"dim": 8, "h": 5, "w": 4}, ["complex_weight"]).spectrum.shape == (4, 5, 4, 2)
    assert module({"dim": 32}).widths == [2, 4, 8, 16, 32]
    block = module({"dim": 16, "gnconv": {"order": 3}, "layer_scale_init_value": 0.1})
    assert (len(block.gnconv.widths), block.scale1[0].item()) == (3, pytest.approx(0.1))
    neck = {"in_channels": 8, "out_channels": 8, "order": 2, "norm_cfg": None, "act_cfg": None}
    unit = module(neck | {"type": "gngf"}, ["proj_out.weight"])
    assert unit.spatial.spectrum.shape == (6, 32, 17, 2)
    assert {type(unit.norm), type(unit.act)} == {nn.Identity}
    assert isinstance(module(neck).project_out, nn.Identity)
    assert isinstance(module(neck | {"act_cfg": {"type": "ReLU"}}).act, nn.ReLU)


@pytest.mark.parametrize(
    "config",
    [
        {"dim": 16, "order": 2, "filter": "wavelet"},
        {"dim": 16, "order": 2, "heads": 2},
        {"depths": [1, 1, 1, 1], "windows": 7},
        {"gnconv": [{"order": 2, "filter": "wavelet"}]},
        {"dim": 16, "gnconv": {"window": 7}},
        {"in_channels": 8, "out_channels": 8, "type": "wavelet"},
    ],
)
def test_what_the_reference_does_not_have_has_no_case(config):
    assert reference_case({"config": config, "keys": {}, "variant": "x", "source": "x"}) is None


def test_taps_on_stages_listen_to_their_last_block():
    case = reference_case(record("small_gf"))
    x = torch.randn(1, 3, 64, 64)
    heard = []
    path, lay_out = case.tap_path("stages.2")
    case.module.get_submodule(path).register_forward_hook(lambda *call: heard.append(lay_out(call[2])))
    level = case.module.forward_pyramid(x)[2]
    assert torch.equal(heard[0], level)
    assert case.tap_path("downsample_layers.0")[0] == "stem"
    assert case.tap_path("stages.2.0.gnconv.dwconv")[0] == "stages.2.blocks.0.gnconv.spatial"


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dims": (64, 128, 252, 512)}, r"order 4 .* 2\^3 = 8, not 252; the nearest is"),
        ({"embed_dims": (64, 128)}, r"embed_dims must have one entry per stage \(4\)"),
        ({"orders": (2, 3, 4)}, r"orders must have one entry per stage \(4\)"),
        ({"grids": (None, (14, 8))}, r"grids must have one entry per stage \(4\)"),
        ({"gate_scale": (1.0,)}, r"gate_scale must have one entry per stage \(4\)"),
        ({"out_indices": (4,)}, "out_indices must be stages 0..3"),
        ({"pyramid_norm": True}, "pass num_classes=0"),
        ({"drop_rate": 0.1}, "no dropout: drop_rate must be 0, not 0.1"),
        (
            {"embed_dims": (8,), "depths": (1,), "orders": (4,), "grids": ((2, 2),), "out_indices": (0,)},
            "with a global filter = 16, not 8",
        ),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HorNetConfig(**fields)


@pytest.mark.untyped
@pytest.mark.parametrize(("name", "size"), [("hornet_tiny_7x7", (64, 96)), ("hornet_tiny_gf", (75, 50))])
def test_onnx_gives_the_same(tmp_path, name, size):
    report = export_onnx(small_model(name), tmp_path / "network.onnx", torch.randn(1, 3, *size))
    # Float32 through another library.
    assert report.error < 1e-5
