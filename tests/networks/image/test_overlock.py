"""OverLoCK's blocks, merged forms, key layout and options, beyond what the digests show."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import build_case
from gatewise.gates.capture import capture
from gatewise.networks.image.overlock import (
    AUXILIARY_WEIGHT,
    Affine,
    ContextMixingBlock,
    FocusBlock,
    OverLoCK,
    OverLoCKConfig,
    RepConvBlock,
)
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "overlock_xt": {
        "embed_dims": (8, 16, 16, 24),
        "depths": (1, 1, 1, 1),
        "focus_depths": (2, 1),
        "kernel_sizes": (9, 7, 5, 5),
        "small_kernel_size": 3,
        "focus_num_heads": (2, 3),
        "mlp_ratios": (2, 2, 2, 2),
        "projection_dim": 32,
        "auxiliary_head": False,
        "num_classes": 5,
    },
    "overlock_xt+deploy_branch_scales": {
        "embed_dims": (8, 16, 16, 24),
        "depths": (1, 1, 1, 1),
        "focus_depths": (1, 2),
        "kernel_sizes": (11, 5, 7, 5),
        "focus_num_heads": (1, 2),
        "scale_identity": False,
        "layer_scale_inits": (0.5, None, 0.5, 0.5),
        "projection_dim": 32,
        "auxiliary_head": False,
        "deploy": True,
        "num_classes": 5,
    },
}

CARDS = {
    "overlock_xt": (17_307_272, 2.832e9),
    "overlock_t": (34_990_472, 5.932e9),
    "overlock_s": (58_309_772, 10.337e9),
    "overlock_b": (98_012_968, 17.812e9),
}
"""Parameters (exact) and MACs of the training form, weighted sums of context mixing apart, as in the tables."""

DEPLOY_CARDS = {
    "overlock_xt": (16_791_384, 16_453_712, 2.671e9),
    "overlock_t": (33_981_064, 33_467_040, 5.585e9),
    "overlock_s": (56_670_476, 56_156_452, 9.794e9),
    "overlock_b": (95_520_680, 94_942_528, 16.946e9),
}
"""Parameters of the merged form with the auxiliary classifier and without it, which is the published figure; MACs."""

DIGESTS = FINGERPRINTS / "overlock"


def record(name):
    return json.loads((DIGESTS / f"{name}.json").read_text())


def random(module, dtype=torch.float64):
    """The module in eval mode with every parameter and statistic away from its initial value."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for key, buffer in module.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand_like(buffer))
    return module.to(dtype).eval()


@pytest.mark.parametrize("name", DEPLOY_CARDS)
def test_the_merged_form_has_the_published_size(name):
    with_auxiliary, published, macs = DEPLOY_CARDS[name]
    with torch.device("meta"):
        image = torch.empty(1, 3, 224, 224)
        deploy = gatewise.create_model(name, deploy=True).eval()
        cost = gatewise.efficiency.count(gatewise.create_model(name, deploy=True, auxiliary_head=False).eval(), image)
    assert sum(parameter.numel() for parameter in deploy.parameters()) == with_auxiliary
    assert cost.parameters == published
    # The table counts scales and norms of some kinds as convolutions.
    assert cost.macs == pytest.approx(macs, rel=1e-3)


@pytest.mark.parametrize("name", ["small", "small_96x128", "small_no_res_scale"])
def test_the_merged_form_has_the_references_size_and_outputs(name):
    stored = record(name)
    case = build_case(stored)
    merged = case.module.eval().merged()
    assert sum(parameter.numel() for parameter in merged.parameters()) == stored["deploy_params"]
    with torch.no_grad():
        found = merged(make_input(**stored["inputs"]["x"]))
    assert relative_error(found, stored["outputs"]["output"]) < 1e-5


@pytest.mark.parametrize("name", ["op_neighbourhood_av_k5", "op_neighbourhood_av_k7"])
def test_sums_over_windows_are_the_references(name):
    stored = record(name)
    specs = [{k: v for k, v in spec.items() if k != "then"} for spec in stored["inputs"].values()]
    case = build_case(stored)
    found = case.run(case.module, *(make_input(**spec) for spec in specs))
    assert relative_error(found, stored["outputs"]["output"]) < 1e-6


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("blocks4.0.", {"dim": 96, "kernel_size": 7, "ls_init_value": 1, "res_scale": True}),
        ("blocks4.0.proj.1.", {"channels": 96, "kernel_size": 7}),
    ],
)
def test_parts_by_themselves_take_their_keys(part, config):
    keys = {key.removeprefix(part): shape for key, shape in record("small")["keys"].items() if key.startswith(part)}
    stored = {"system": "overlock", "variant": "part", "config": config, "inputs": {"x": {}}, "keys": keys}
    assert sum(tensor.numel() for tensor in build_case(stored).module.state_dict().values()) > 0


@pytest.mark.parametrize("name", ["small_main_and_aux", "small", "small_backbone", "small_no_res_scale"])
def test_the_key_layout_goes_both_ways(name):
    stored = record(name)
    case = build_case(stored)
    prefix = "net." if name == "small_main_and_aux" else ""
    saved = {prefix + key: list(value.shape) for key, value in export_state(case.module, "official").items()}
    saved = {key: shape for key, shape in saved.items() if not key.endswith("num_batches_tracked")}
    assert set(saved) == set(stored["keys"])
    # Linear maps are stored as 1x1 convolutions by them.
    assert all(saved[key] == shape[:2] for key, shape in stored["keys"].items() if key.endswith("head.4"))


def mix(block, query, key, value):
    """The mixing branch by its equations, with the operator's definition by loops over positions."""
    mixer = block.mixer
    heads = mixer.small_table.shape[0]
    small, large = ((table.shape[1] + 1) // 2 for table in (mixer.small_table, mixer.large_table))
    height, width = value.shape[2:]
    q = mixer.query.norm(mixer.query.conv(query)) * (value.shape[1] / heads) ** -0.5
    k = mixer.key.norm(mixer.key.conv(F.adaptive_avg_pool2d(key, 7))).flatten(2)
    y = torch.zeros_like(value)
    per_head = value.shape[1] // 2 // heads
    for head in range(heads):
        channels = slice(head * q.shape[1] // heads, (head + 1) * q.shape[1] // heads)
        affinity = torch.einsum("bchw,bcl->bhwl", q[:, channels], k[:, channels])
        logits = affinity @ mixer.kernels.weight.T + mixer.kernels.bias
        for half, (size, table) in enumerate(((small, mixer.small_table), (large, mixer.large_table))):
            own = logits[..., : small**2] if half == 0 else logits[..., small**2 :]
            start = half * value.shape[1] // 2 + head * per_head
            v = value[:, start : start + per_head]
            for i in range(height):
                for j in range(width):
                    top, left = min(max(i - size // 2, 0), height - size), min(max(j - size // 2, 0), width - size)
                    rows = slice(top - i + size - 1, top - i + 2 * size - 1)
                    columns = slice(left - j + size - 1, left - j + 2 * size - 1)
                    kernel = (own[:, i, j] + table[head, rows, columns].flatten()).softmax(-1)
                    window = v[:, :, top : top + size, left : left + size].flatten(2)
                    y[:, start : start + per_head, i, j] = torch.einsum("bt,bct->bc", kernel, window)
    return y


def affine(module, x):
    return x * module.weight.flatten()[:, None, None] + module.bias[:, None, None]


def depthwise_residual(conv, x):
    return x + F.conv2d(x, conv.weight, conv.bias, padding=1, groups=x.shape[1])


def mlp(module, x):
    y = depthwise_residual(module.depthwise, F.gelu(module.expand(x)))
    return module.project(module.grn(y))


def by_the_equations(block, z, overview):
    """A focus block with scales on its identities, in plain functions."""
    dims = block.dims
    x, h = z.split(dims, dim=1)
    z = torch.cat([x, affine(block.kept_scale, h) + affine(block.overview_scale, overview)], dim=1)
    z = depthwise_residual(block.depthwise, z)
    n = F.layer_norm(z.movedim(1, -1), (sum(dims),), block.norm.weight, block.norm.bias, 1e-6).movedim(-1, 1)
    fusion, gated = block.fusion, block.mixing
    f = F.gelu(fusion.norm(F.conv2d(n, fusion.depthwise.weight, fusion.depthwise.bias, padding=1, groups=sum(dims))))
    f = fusion.grn(fusion.project(f))
    gate = F.silu(gated.gate.norm(gated.gate.conv(f)))
    y = gated.mixed.norm(gated.mixed.conv(mix(gated, n[:, : dims[0]], n[:, dims[0] :], f)))
    y = y + gated.local_norm(gated.local(f))
    squeezed = F.gelu(gated.se.reduce(y.mean(dim=(2, 3), keepdim=True)))
    y = gate * (y * torch.sigmoid(gated.se.expand(squeezed)))
    y = gated.project(gated.norm(y))
    z = depthwise_residual(block.refine.depthwise, affine(block.refine.residual1.affine, z) + y)
    norm = block.refine.norm
    n = F.layer_norm(z.movedim(1, -1), (sum(dims),), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
    return affine(block.refine.residual2.affine, z) + mlp(block.refine.mlp, n)


def test_a_focus_block_follows_the_equations():
    block = random(FocusBlock(16, 6, 7, 5, num_heads=2, mlp_ratio=2, scale_init=1, scale_identity=True))
    z, overview = torch.randn(2, 22, 9, 8, dtype=torch.float64), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = by_the_equations(block, z, overview)
    assert torch.allclose(block(z, overview), expected, rtol=1e-9, atol=1e-9)


BLOCKS = {
    "focus, identity scaled": lambda: FocusBlock(16, 6, 7, 5, 2, 3, 1.0, True),
    "focus, branch scaled": lambda: FocusBlock(16, 6, 7, 3, 2, 3, 0.5, False),
    "first focus": lambda: FocusBlock(16, 6, 5, 5, 1, 3, None, True, is_first=True),
    "mixing": lambda: ContextMixingBlock(16),
    "mixing, scaled": lambda: ContextMixingBlock(16, 13, 5, 4, 3, 1.0, True),
    "large kernel": lambda: RepConvBlock(16, 17, 4, 1.0, True),
    "large kernel, branch scaled": lambda: RepConvBlock(16, 19, 2, 0.5, False),
    "large kernel, merged": lambda: RepConvBlock(16, 11, 2, deploy=True),
}


def run_block(block, size, dtype=torch.float64):
    draw = torch.Generator().manual_seed(5)
    width = 22 if isinstance(block, FocusBlock) else 16
    inputs = [torch.randn(2, width, *size, generator=draw, dtype=torch.float64).to(dtype)]
    if isinstance(block, FocusBlock):
        inputs.append(torch.randn(2, 6, *size, generator=draw, dtype=torch.float64).to(dtype))
    return block(*inputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_merge_exactly_and_keep_no_norm_that_could_go(name):
    block = random(BLOCKS[name]())
    merged = block.merged()
    for size in ((9, 8), (3, 5), (1, 1)):
        assert torch.allclose(run_block(merged, size), run_block(block, size), rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in merged.modules())
    again = merged.merged()
    assert torch.allclose(run_block(again, (9, 8)), run_block(block, (9, 8)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        block.train().merged()


def test_scales_of_branches_go_and_those_of_identities_stay():
    def scales(name):
        return sum(isinstance(module, Affine) for module in BLOCKS[name]().eval().merged().modules())

    # The overview's two scales stand before a norm over channels and cannot go.
    assert scales("focus, identity scaled") == 4
    assert scales("focus, branch scaled") == 2
    assert scales("large kernel") == 1
    assert scales("large kernel, branch scaled") == 0


def test_half_precision_blocks_are_merged_in_float64():
    block = random(BLOCKS["focus, branch scaled"](), torch.float16)
    merged, exact = block.merged(), block.double().merged()
    for key, value in exact.state_dict().items():
        assert torch.allclose(merged.state_dict()[key].double(), value, rtol=1e-3, atol=1e-6), key


def test_folding_merges_all_and_keeps_the_answer():
    model = small_model("overlock_xt", auxiliary_head=True)
    folded = fold(model)
    assert folded.config.deploy
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(
        folded.forward_with_auxiliary(x).values(), model.forward_with_auxiliary(x).values(), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def test_both_classifiers_are_trained_together():
    model = small_model("overlock_xt", auxiliary_head=True).train()
    logits = model.forward_with_auxiliary(torch.randn(2, 3, 64, 64))
    assert {name: one.shape for name, one in logits.items()} == {"main": (2, 5), "aux": (2, 5)}
    target = torch.tensor([1, 3])
    loss = F.cross_entropy(logits["main"], target) + AUXILIARY_WEIGHT * F.cross_entropy(logits["aux"], target)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_forward_gives_one_tensor_in_training_too():
    model, x = small_model("overlock_xt", auxiliary_head=True), torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), model.forward_with_auxiliary(x)["main"])
    assert isinstance(model.train()(x), torch.Tensor)
    with pytest.raises(ValueError, match="no auxiliary classifier"):
        small_model("overlock_xt").forward_with_auxiliary(x)


def test_the_second_classifier_follows_the_first():
    model = small_model("overlock_xt", auxiliary_head=True)
    model.reset_classifier(7)
    assert model.forward_with_auxiliary(torch.randn(1, 3, 64, 64))["aux"].shape == (1, 7)
    model.reset_classifier(0)
    assert model.auxiliary is None


def test_dense_prediction_has_a_norm_for_each_level_and_no_head():
    fresh = gatewise.create_model("overlock_xt", **{**SMALL["overlock_xt"], "num_classes": 0, "pyramid_norm": True})
    model = fresh.eval()
    load_state(model, export_state(small_model("overlock_xt", auxiliary_head=True), "official"), replace_head=True)
    assert [info.channels for info in model.feature_info] == [8, 16, 16 + 6, 24 + 6]
    levels = model.forward_pyramid(torch.randn(1, 3, 96, 64))
    for level in levels:
        assert torch.allclose(level.mean(dim=1), torch.zeros(()), atol=1e-5)
    assert not [key for key in model.state_dict() if key.startswith(("head.", "auxiliary.", "project."))]


def test_pyramid_and_features_are_of_one_network():
    model, x = small_model("overlock_xt"), torch.randn(1, 3, 70, 96)
    assert torch.equal(model.project(model.forward_pyramid(x)[3]), model.forward_features(x))


def test_the_overview_guides_features_and_kernels():
    model, x = small_model("overlock_xt"), torch.randn(1, 3, 64, 64)
    expected = model(x)
    with torch.no_grad():
        model.context.bias += 1
    assert not torch.allclose(model(x), expected)


def test_a_checkpoint_of_the_merged_form_fills_the_deploy_network():
    model = small_model("overlock_xt")
    merged = model.merged()
    saved = export_state(merged, "official")
    assert "blocks1.0.proj.1.lk_origin.bias" in saved
    assert "sub_blocks4.0.lepe.0.lk_origin.bias" in saved
    assert not [key for key in saved if "dil_conv" in key or "origin_bn" in key]
    fresh = gatewise.create_model("overlock_xt", **{**SMALL["overlock_xt"], "deploy": True}).eval()
    load_state(fresh, saved)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(fresh(x), model(x), rtol=1e-4, atol=1e-4)


def test_scales_are_decayed_as_published_unless_excluded():
    assert small_model("overlock_xt").no_weight_decay() == set()
    model = small_model("overlock_xt", decay_scales=False)
    parameters = dict(model.named_parameters())
    excluded = model.no_weight_decay()
    assert excluded == {name for name, one in parameters.items() if one.shape[1:] == (1, 1, 1)} - {
        name for name in parameters if name.endswith("conv.weight")
    }
    assert len(excluded) > 0


def test_gates_of_the_focus_net_are_read():
    readings = {
        reading.path: reading.maps for reading in capture(small_model("overlock_xt"), torch.randn(2, 3, 64, 96))
    }
    assert readings["focus.0.blocks.1.mixing"]["positions"].shape == (2, 4, 6)
    assert readings["stages.0.blocks.0.se"]["channels"].shape == (2, 8)


def test_weights_start_as_published():
    model = OverLoCK(replace(OverLoCKConfig(), depths=(1, 1, 1, 1), focus_depths=(1, 1)))
    assert model.stages[0].blocks[0].mlp.expand.weight.std().item() == pytest.approx(0.02, rel=0.1)
    mixer = model.focus[0].blocks[0].mixing.mixer
    assert not mixer.large_table.any()
    assert not mixer.kernels.bias.any()
    assert model.stages[0].blocks[0].residual.affine is None
    assert torch.equal(model.stages[2].blocks[0].residual.affine.weight, torch.ones(256, 1, 1, 1))
    assert ContextMixingBlock(16).mixing.mixer.small_table.std().item() == pytest.approx(0.02, rel=0.2)


def test_stochastic_depth_grows_over_all_three_parts():
    model = OverLoCK(replace(OverLoCKConfig(), depths=(1, 1, 1, 1), focus_depths=(2, 1), drop_path_rate=0.6))
    rates = [stage.blocks[0].residual.drop_path.rate for stage in model.stages]
    rates += [block.refine.residual2.drop_path.rate for stage in model.focus for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"drop_rate": 0.1}, "drop_rate must be 0, not 0.1"),
        ({"depths": (2, 2, 2)}, "depths must have 4 entries"),
        ({"focus_depths": (0, 2)}, "every stage needs a block"),
        ({"embed_dims": (55, 112, 256, 336)}, "the stem halves the first width"),
        ({"embed_dims": (56, 112, 256, 334)}, "the overview quarters the last"),
        ({"kernel_sizes": (17, 15, 12, 7)}, "kernel_sizes must be of 5, 7, 9, 11, 13, 15, 17, 19, not"),
        ({"embed_dims": (56, 112, 250, 336)}, r"multiple of 4 times num_heads \(4\), not 250"),
        ({"focus_num_heads": (0, 6)}, "at least one head, not 0"),
        ({"small_kernel_size": 4}, "odd, and the small one no larger than the large one, not 4 and 13"),
        ({"small_kernel_size": 9}, "not 9 and 7"),
        ({"pyramid_norm": True}, "pass num_classes=0"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        OverLoCKConfig(**fields)


@pytest.mark.untyped
def test_onnx_gives_the_same(tmp_path):
    # Maps of 6x10, as they are, and of 3x5, enlarged to windows of 5.
    report = export_onnx(small_model("overlock_xt"), tmp_path / "network.onnx", torch.randn(1, 3, 96, 160))
    assert report.error < 1e-4
    assert report.dynamic_batch
