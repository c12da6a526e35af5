"""Focal modulation and FocalNet, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewise.catalog.checkpoint import load_state
from gatewise.networks.image.focalnet import FocalModulation, FocalNetConfig, _mean_over_positions
from tests.conftest import small_model

SMALL = {
    "focalnet_tiny_srf": {"embed_dim": 8, "depths": (1, 1, 2, 1), "focal_levels": (2, 1, 2, 0), "num_classes": 5},
}

CARDS = {
    "focalnet_tiny_srf": (28_427_116, 4_403_335_680),
    "focalnet_tiny_lrf": (28_647_928, 4.475e9),
    "focalnet_small_srf": (49_891_216, 8.599e9),
    "focalnet_small_lrf": (50_342_440, 8.715e9),
    "focalnet_base_srf": (88_148_144, 15.241e9),
    "focalnet_base_lrf": (88_749_768, 15.397e9),
    "focalnet_tiny_iso": (5_880_280, 1.109e9),
    "focalnet_small_iso": (22_376_344, 4.299e9),
    "focalnet_base_iso": (87_237_400, 16.92e9),
    "focalnet_base_iso_preln": (87_218_968, 16.92e9),
    "focalnet_large_fl3": (207_100_744, 35.69e9),
    "focalnet_large_fl4": (207_281_248, 35.73e9),
    "focalnet_xlarge_fl3": (366_082_120, 63.07e9),
    "focalnet_xlarge_fl4": (366_322_784, 63.14e9),
    "focalnet_huge_fl3": (686_564_424, 118.06e9),
    "focalnet_huge_fl4": (689_277_664, 118.76e9),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published tables."""


def modulation_by_the_equations(module: FocalModulation, x: torch.Tensor) -> torch.Tensor:
    """Equations of the paper, channel by channel, without the module's layout."""
    dim, levels = module.dim, len(module.levels)
    projected = x @ module.project_in.weight.T + module.project_in.bias
    query, z, gates = projected[..., :dim], projected[..., dim : 2 * dim], projected[..., 2 * dim :]
    context = torch.zeros_like(query)
    for level, conv in enumerate(module.levels):
        kernel = conv.weight.shape[-1]
        padded = F.pad(z.permute(0, 3, 1, 2), [kernel // 2] * 4)
        patches = padded.unfold(2, kernel, 1).unfold(3, kernel, 1)
        z = F.gelu(torch.einsum("bchwij,cij->bhwc", patches, conv.weight[:, 0]))
        context = context + z * gates[..., level, None]
    context = context + F.gelu(z.mean(dim=(1, 2), keepdim=True)) * gates[..., levels, None]
    modulator = (context / module.divisor) @ module.mix_context.weight.T + module.mix_context.bias
    y = query * modulator
    y = y if module.norm is None else module.norm(y)
    return y @ module.project_out.weight.T + module.project_out.bias


@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    level=st.integers(0, 3),
    window=st.sampled_from([1, 3, 5]),
    postln=st.booleans(),
    normalize=st.booleans(),
)
def test_modulation_follows_the_equations(height, width, level, window, postln, normalize):
    torch.manual_seed(0)
    module = FocalModulation(6, level, window, use_postln=postln, normalize_modulator=normalize).double()
    x = torch.randn(2, height, width, 6, dtype=torch.float64)
    assert torch.allclose(module(x), modulation_by_the_equations(module, x), rtol=1e-9, atol=1e-12)


def test_gradients_of_modulation_are_right():
    module = FocalModulation(4, 2, 3, use_postln=True, normalize_modulator=True).double()
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x)


def test_modulation_commutes_with_circular_shifts_under_circular_padding():
    module = FocalModulation(8, 2, 3).double()
    for conv in module.levels:
        conv.padding_mode = "circular"
        conv._reversed_padding_repeated_twice = [conv.padding[0]] * 4
    x = torch.randn(1, 9, 10, 8, dtype=torch.float64)
    shifted = module(x.roll((2, 3), dims=(1, 2)))
    assert torch.allclose(shifted, module(x).roll((2, 3), dims=(1, 2)), atol=1e-12)


def test_global_mean_of_half_precision_does_not_overflow():
    z = torch.full((1, 2, 300, 300), 300.0, dtype=torch.float16)
    assert torch.equal(_mean_over_positions(z), torch.full((1, 1, 1, 2), 300.0, dtype=torch.float16))


def test_gates_are_read_as_they_are_used():
    module = FocalModulation(6, 2, 3)
    x = torch.randn(2, 5, 4, 6)
    maps = module.read_gates(x)
    assert list(maps) == ["level 0", "level 1", "global", "modulator"]
    assert torch.equal(maps["global"], (x @ module.project_in.weight.T + module.project_in.bias)[..., -1])
    module.mix_context.weight.data.zero_()
    module.mix_context.bias.data.fill_(1.0)
    assert torch.allclose(module.read_gates(x)["modulator"], torch.full((2, 5, 4), 6.0).sqrt())


def test_wider_windows_with_adapted_weights_compute_the_same():
    source = small_model("focalnet_tiny_srf", focal_levels=(2, 2, 2, 2))
    wide = small_model("focalnet_tiny_srf", focal_levels=(2, 2, 2, 2), focal_windows=(9, 9, 9, 9))
    load_state(wide, source.state_dict(), adapt=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(wide(x), source(x), rtol=1e-5, atol=1e-5)


def test_narrower_windows_keep_the_middle_of_the_kernel():
    source = small_model("focalnet_tiny_srf", focal_windows=(7, 7, 7, 7))
    narrow = small_model("focalnet_tiny_srf", focal_windows=(3, 3, 3, 3))
    load_state(narrow, source.state_dict(), adapt=True)
    theirs = source.stages[0].blocks[0].modulation.levels[0].weight
    assert torch.equal(narrow.stages[0].blocks[0].modulation.levels[0].weight, theirs[:, :, 2:5, 2:5])


def test_new_levels_start_with_closed_gates_and_the_global_gate_stays_last():
    source = small_model("focalnet_tiny_srf", focal_levels=(2, 2, 2, 2))
    deep = small_model("focalnet_tiny_srf", focal_levels=(3, 3, 3, 3))
    load_state(deep, source.state_dict(), adapt=True)
    ours, theirs = deep.stages[0].blocks[0].modulation, source.stages[0].blocks[0].modulation
    assert torch.equal(ours.project_in.weight[:18], theirs.project_in.weight[:18])
    assert torch.equal(ours.project_in.weight[18], torch.zeros(8))
    assert torch.equal(ours.project_in.weight[-1], theirs.project_in.weight[-1])
    assert ours.project_in.bias[18] == 0


def test_fewer_levels_are_refused():
    source = small_model("focalnet_tiny_srf", focal_levels=(3, 3, 3, 3))
    with pytest.raises(ValueError, match="1 more focal levels than the network"):
        load_state(small_model("focalnet_tiny_srf", focal_levels=(2, 2, 2, 2)), source.state_dict(), adapt=True)


@pytest.mark.parametrize(("frozen", "stages"), [(-1, 0), (0, 0), (1, 0), (2, 1), (4, 3)])
def test_frozen_stages_count_as_the_published_detectors_do(frozen, stages):
    model = small_model("focalnet_tiny_srf")
    model.freeze_stages(frozen)
    model.train()
    assert model.stem.proj.weight.requires_grad == (frozen < 0)
    trained = [all(p.requires_grad for p in stage.parameters()) for stage in model.stages]
    assert trained == [False] * stages + [True] * (4 - stages)
    assert [stage.training for stage in model.stages] == trained


def test_dense_prediction_pads_to_the_right_and_bottom():
    model = small_model("focalnet_tiny_srf", num_classes=0, pyramid_norm=True)
    x = torch.randn(1, 3, 62, 61)
    levels = model.forward_pyramid(x)
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    padded = model.forward_pyramid(F.pad(x, (0, 3, 0, 2)))
    assert all(torch.equal(a, b) for a, b in zip(levels, padded, strict=True))


def test_chosen_levels_have_a_norm_each_and_no_other():
    model = small_model("focalnet_tiny_srf", num_classes=0, pyramid_norm=True, out_indices=(1, 3))
    assert list(model.level_norms) == ["1", "3"]
    levels = model.forward_pyramid(torch.randn(1, 3, 64, 64))
    assert [level.shape[1] for level in levels] == [16, 64] == [info.channels for info in model.feature_info]


def test_isotropic_form_has_one_level():
    model = small_model(
        "focalnet_tiny_srf", patch_size=16, depths=(2,), focal_levels=(2,), focal_windows=(3,), embed_dim=16
    )
    assert model.feature_info == [(16, 16)]
    assert model.forward_pyramid(torch.randn(1, 3, 40, 33))[0].shape == (1, 16, 3, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"focal_levels": (2, 2)}, r"focal_levels must have one entry per stage \(4\)"),
        ({"focal_windows": (3, 3, 4, 3)}, "odd and positive, not 4"),
        ({"focal_levels": (2, 2, -1, 2)}, "0 or more, not -1"),
        ({"focal_factor": 1}, "odd and positive, not 4"),
        ({"use_conv_embed": True, "patch_size": 2}, "needs patch_size=4, not 2"),
        ({"out_indices": (0, 4)}, r"stages 0..3, not \(0, 4\)"),
        ({"pyramid_norm": True}, "pass num_classes=0"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FocalNetConfig(**fields)


def test_weights_start_as_published():
    model = small_model("focalnet_tiny_srf", embed_dim=32, layer_scale_init=1e-4)
    model = type(model)(model.config)
    weight = model.stages[2].blocks[0].mlp.fc1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.stages[0].blocks[0].mlp.fc1.bias.abs().max() == 0
    assert torch.equal(model.stages[0].blocks[0].scale1, torch.full((32,), 1e-4))
