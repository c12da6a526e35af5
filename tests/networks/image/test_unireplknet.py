"""UniRepLKNet's block, its merged form and its options, beyond what the digests show."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.fidelity.fingerprint import relative_error
from gatewise.fidelity.verify import build_case
from gatewise.gates.capture import capture
from gatewise.layers.dilated_reparam import DilatedReparam
from gatewise.networks.image.unireplknet import SCHEDULES, UniRepLKNetBlock, UniRepLKNetConfig
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "unireplknet_a": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "kernel_sizes": ((3,), (7,), (13, 3), (17,)),
        "num_classes": 5,
    },
    "unireplknet_a+deploy": {
        "embed_dims": (16, 32, 48, 64),
        "depths": (1, 1, 2, 1),
        "kernel_sizes": ((5,), (13,), (13, 0), (13,)),
        "deploy": True,
        "num_classes": 5,
    },
}

CARDS = {
    "unireplknet_a": (4_649_060, 674_684_480),
    "unireplknet_f": (6_489_328, 0.947e9),
    "unireplknet_p": (11_080_520, 1.629e9),
    "unireplknet_n": (18_818_880, 2.849e9),
    "unireplknet_t": (31_693_420, 5.004e9),
    "unireplknet_s": (56_456_704, 9.219e9),
    "unireplknet_b": (99_089_416, 16.22e9),
    "unireplknet_l": (220_076_056, 36.13e9),
    "unireplknet_xl": (388_690_984, 63.90e9),
    "unireplknet_s_in22k": (56_456_704, 9.219e9),
    "unireplknet_s_384": (56_456_704, 27.09e9),
    "unireplknet_b_384": (99_089_416, 47.67e9),
    "unireplknet_l_384": (220_076_056, 106.2e9),
    "unireplknet_xl_384": (388_690_984, 187.8e9),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the training form."""

DEPLOY_CARDS = {
    "unireplknet_a": (4_437_300, 0.640e9),
    "unireplknet_f": (6_235_216, 0.905e9),
    "unireplknet_p": (10_741_704, 1.573e9),
    "unireplknet_n": (18_318_560, 2.767e9),
    "unireplknet_t": (31_037_980, 4.899e9),
    "unireplknet_s": (55_645_984, 9.094e9),
    "unireplknet_b": (98_008_456, 16.06e9),
    "unireplknet_l": (218_454_616, 35.88e9),
    "unireplknet_xl": (386_529_064, 63.57e9),
    "unireplknet_s_384": (55_645_984, 26.72e9),
    "unireplknet_b_384": (98_008_456, 47.18e9),
    "unireplknet_l_384": (218_454_616, 105.4e9),
    "unireplknet_xl_384": (386_529_064, 186.8e9),
}
"""The same of the merged form, which is the published one."""

DIGESTS = FINGERPRINTS / "unireplknet"


def record(name):
    return json.loads((DIGESTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", DEPLOY_CARDS)
def test_the_merged_form_has_the_published_size(name):
    parameters, macs = DEPLOY_CARDS[name]
    with torch.device("meta"):
        model = gatewise.create_model(name, deploy=True).eval()
        image = torch.empty(1, *gatewise.model_card(name).input_size)
    cost = gatewise.efficiency.count(model, image)
    assert cost.parameters == parameters
    # The table has three or four digits.
    assert cost.macs == pytest.approx(macs, rel=8e-4)


@pytest.mark.parametrize("kernel", [7, 9, 13, 17])
def test_merged_kernels_are_the_references(kernel):
    stored = record(f"op_dilated_reparam_k{kernel}")
    module = build_case(stored).module.eval().merged()
    # Rounding of float32 in the reference's own merge.
    assert relative_error(module.large.weight, stored["merged"]["kernel"]) < 1e-5
    assert relative_error(module.large.bias, stored["merged"]["bias"]) < 1e-5


@pytest.mark.parametrize("name", ["op_block_k3", "op_block_k13", "small", "small_other_kernels", "unireplknet_a"])
def test_the_merged_form_has_the_references_keys_and_outputs(name):
    stored = record(name)
    case = build_case(stored)
    merged = case.module.eval().merged()
    assert sum(parameter.numel() for parameter in merged.parameters()) == stored["deploy_params"]
    prefix = case.layout.to_ours(case.prefix.rstrip(".")) + "." if case.prefix else ""
    theirs = {
        case.layout.to_theirs(prefix + key).removeprefix(case.prefix): list(value.shape)
        for key, value in merged.state_dict().items()
    }
    assert theirs == stored["deploy_keys"]
    x = gatewise.fidelity.fingerprint.make_input(**stored["inputs"]["x"])
    with torch.no_grad():
        assert relative_error(merged(x), stored["outputs"]["output"]) < 1e-5


def block(kernel_size=13, dtype=torch.float64, **options):
    """A block with every parameter and statistic away from its initial value, in eval mode."""
    made = UniRepLKNetBlock(16, kernel_size, layer_scale_init=0.5, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for key, buffer in made.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer))
    return made.to(dtype).eval()


def by_the_equations(made, x):
    """The block's definition in plain functions, after its convolution over positions."""

    def batch_norm(norm, y):
        if isinstance(norm, nn.Identity):
            return y
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)

    y = batch_norm(made.norm, made.depthwise(x))
    mean = y.mean(dim=(2, 3))
    hidden = torch.relu(mean @ made.se.reduce.weight[:, :, 0, 0].T + made.se.reduce.bias)
    gate = torch.sigmoid(hidden @ made.se.expand.weight[:, :, 0, 0].T + made.se.expand.bias)
    y = F.gelu(
        torch.einsum("bchw,dc->bdhw", gate[:, :, None, None] * y, made.expand.weight) + made.expand.bias[:, None, None]
    )
    energy = y.square().sum(dim=(2, 3)).sqrt()
    relative = energy / (energy.mean(dim=1, keepdim=True) + 1e-6)
    weight, bias = made.grn.weight.flatten(), made.grn.bias.flatten()
    y = (weight * relative + 1)[:, :, None, None] * y + bias[:, None, None]
    y = batch_norm(made.project_norm, torch.einsum("bdhw,cd->bchw", y, made.project.weight))
    return x + made.scale[:, None, None] * y


@pytest.mark.parametrize("kernel_size", [0, 3, 5, 7, 9, 11, 13, 15, 17])
def test_a_block_follows_the_equations_and_merges_exactly(kernel_size):
    made = block(kernel_size)
    for size in ((7, 5), (1, 1), (14, 19)):
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        expected = by_the_equations(made, x)
        assert torch.allclose(made(x), expected, rtol=1e-10, atol=1e-10)
        assert torch.allclose(made.merged()(x), expected, rtol=1e-10, atol=1e-10)


def test_only_large_kernels_have_branches():
    assert [isinstance(block(size).depthwise, DilatedReparam) for size in (0, 3, 5, 7)] == [False, False, False, True]


def test_merging_is_idempotent_and_refused_in_training_mode():
    merged = block().merged()
    again = merged.merged()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in merged.state_dict().items())
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        block().train().merged()
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        small_model("unireplknet_a").train().merged()


def test_half_precision_blocks_are_merged_in_float64():
    made = block(dtype=torch.float16)
    merged, exact = made.merged(), made.double().merged()
    assert all(torch.equal(merged.state_dict()[key], value.half()) for key, value in exact.state_dict().items())


def test_a_merged_block_without_scale_or_norms_needs_no_more():
    merged = block(3).merged()
    assert isinstance(merged.norm, nn.Identity)
    assert isinstance(merged.project_norm, nn.Identity)
    assert merged.scale is None
    assert merged.grn.bias is None


def test_a_checkpoint_of_the_merged_form_fills_the_deploy_network():
    model = small_model("unireplknet_a")
    merged = model.merged()
    assert merged.config.deploy
    saved = export_state(merged, "official")
    assert "stages.1.0.dwconv.lk_origin.bias" in saved
    assert "stages.0.0.dwconv.bias" in saved
    deploy = gatewise.create_model("unireplknet_a", **SMALL["unireplknet_a"], deploy=True).eval()
    assert load_state(deploy, saved).name == "official"
    x = torch.randn(2, 3, 40, 56)
    assert torch.equal(deploy(x), merged(x))
    assert torch.allclose(deploy(x), model(x), rtol=1e-4, atol=1e-5)


def test_checkpoints_of_the_training_form_go_both_ways():
    model, other = small_model("unireplknet_a"), small_model("unireplknet_a")
    saved = {f"backbone.{key}": value + 1 for key, value in export_state(model, "official").items()}
    assert {key for key in saved if ".stages.1.0.dwconv." in key and key.endswith("k3_3.weight")} == {
        "backbone.stages.1.0.dwconv.dil_conv_k3_3.weight",
        "backbone.stages.1.0.dwconv.dil_bn_k3_3.weight",
    }
    load_state(other, gatewise.catalog.checkpoint.peel({"model": saved}))
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value + 1)


def test_a_checkpoint_of_one_form_does_not_fill_the_other():
    deploy = gatewise.create_model("unireplknet_a", **SMALL["unireplknet_a"], deploy=True)
    with pytest.raises(gatewise.errors.CheckpointError, match="lk_origin.bias|large.bias"):
        load_state(deploy, export_state(small_model("unireplknet_a"), "official"))


def test_folding_gives_the_merged_form():
    model = small_model("unireplknet_a")
    folded, merged = fold(model), model.merged()
    assert {key: value.shape for key, value in folded.state_dict().items()} == {
        key: value.shape for key, value in merged.state_dict().items()
    }


def test_dense_prediction_has_a_norm_for_each_level_and_no_head():
    model = small_model("unireplknet_a", num_classes=0, pyramid_norm=True, out_indices=(1, 3))
    assert list(model.level_norms) == ["1", "3"]
    assert {type(model.norm), type(model.head)} == {nn.Identity}
    levels = model.forward_pyramid(torch.randn(1, 3, 50, 77))
    assert [tuple(level.shape) for level in levels] == [(1, 32, 7, 10), (1, 64, 2, 3)]


def test_sizes_are_rounded_up_down_to_one_pixel():
    model = small_model("unireplknet_a")
    assert [tuple(level.shape[2:]) for level in model.forward_pyramid(torch.randn(1, 3, 33, 1))] == [
        (9, 1),
        (5, 1),
        (3, 1),
        (2, 1),
    ]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model.train()(torch.randn(1, 3, 32, 32))


def test_gates_of_every_block_are_read():
    readings = capture(small_model("unireplknet_a"), torch.randn(2, 3, 64, 64))
    assert [reading.path.rpartition(".")[2] for reading in readings] == ["se"] * 5
    assert readings[2].maps["channels"].shape == (2, 48)


def test_wide_maps_do_not_overflow_half_precision():
    made = block(3, dtype=torch.float16).to(torch.float16)
    with torch.no_grad():
        made.grn.weight.fill_(1)
        y = made(torch.full((1, 16, 300, 300), 4.0, dtype=torch.float16))
    assert y.isfinite().all()


def test_published_schedules():
    kernels = {depths: [size for stage in stages for size in stage] for depths, stages in SCHEDULES.items()}
    assert all(len(sizes) == sum(depths) for depths, sizes in kernels.items())
    assert {depths: sizes.count(13) for depths, sizes in kernels.items()} == {
        (2, 2, 6, 2): 10,
        (2, 2, 8, 2): 12,
        (3, 3, 18, 3): 15,
        (3, 3, 27, 3): 15,
    }
    assert SCHEDULES[(3, 3, 18, 3)][2][:4] == (13, 3, 13, 3)
    assert SCHEDULES[(3, 3, 27, 3)][2][:4] == (13, 3, 3, 13)
    assert all(stages[0] == (3,) * len(stages[0]) for stages in SCHEDULES.values())


def test_weights_start_as_published():
    config = UniRepLKNetConfig(
        depths=(1, 1, 1, 1),
        kernel_sizes=((3,), (13,), (13,), (13,)),
        embed_dims=(32, 64, 64, 64),
        head_init_scale=0.001,
    )
    torch.manual_seed(0)
    model = gatewise.networks.image.unireplknet.UniRepLKNet(config)
    first = model.stages[1].blocks[0]
    assert first.expand.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert first.depthwise.branches["k5_1"].conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first.scale, torch.full((64,), 1e-6))
    assert first.grn.weight.abs().max() == first.grn.bias.abs().max() == first.expand.bias.abs().max() == 0
    assert model.head.weight.std().item() == pytest.approx(0.02e-3, rel=0.05)
    model.reset_classifier(7)
    assert model.head.weight.std().item() == pytest.approx(0.02e-3, rel=0.1)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 2, 3, 4)}, r"depths \(1, 2, 3, 4\) have no published kernel schedule .*kernel_sizes is None"),
        ({"depths": (1, 1), "embed_dims": (8, 16), "kernel_sizes": ((3,), (13, 13))}, r"\(1, 1\), not \(1, 2\)"),
        ({"embed_dims": (8, 16)}, r"embed_dims must have one entry per stage \(4\)"),
        ({"embed_dims": (7, 16, 32, 64)}, "must be even, not 7"),
        ({"embed_dims": (8, 18, 32, 64)}, "multiples of 4 .* not 18"),
        ({"depths": (1,), "embed_dims": (8,), "kernel_sizes": ((8,),)}, "of 0, 3, 5, 7, 9, 11, 13, 15, 17, not 8"),
        ({"depths": (1,), "embed_dims": (8,), "kernel_sizes": ((19,),)}, "not 19"),
        ({"out_indices": (4,)}, "out_indices must be stages 0..3"),
        ({"pyramid_norm": True}, "pass num_classes=0"),
        ({"drop_rate": 0.1}, "no dropout: drop_rate must be 0, not 0.1"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        UniRepLKNetConfig(**fields)


@pytest.mark.untyped
def test_onnx_gives_the_same(tmp_path):
    report = export_onnx(small_model("unireplknet_a"), tmp_path / "network.onnx", torch.randn(1, 3, 45, 64))
    assert report.error < 1e-4
    assert math.isfinite(report.error)
