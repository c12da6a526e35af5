"""SpaRTAN, beyond what the digests of whole networks show."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.catalog.keys import KeyLayout
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.errors import CheckpointError
from gatewise.fidelity.case import Case
from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.fidelity.verify import fill_case
from gatewise.networks.image import spartan
from gatewise.networks.image.spartan import ChannelMixer, SpartanConfig, SpatialMixer, strongest_channel, turn_pairs
from tests.conftest import FINGERPRINTS, small_model

SMALL = {
    "spartan_tiny": {"embed_dims": (40, 48, 56, 64), "depths": (1, 1, 2, 1), "num_classes": 5},
    "spartan_tiny+channel": {
        "embed_dims": (64, 48),
        "depths": (1, 2),
        "expand_ratios": (2, 3),
        "norm": "channel",
        "num_classes": 5,
        "out_indices": (0, 1),
    },
}

CARDS = {"spartan_tiny": (3_820_296, 1.044e9)}

STRIDES = {"spartan_tiny+channel": (4, 8)}

MODULES = json.loads((FINGERPRINTS / "spartan" / "modules.json").read_text())
PARTS = {
    "smixer_dense_dim16": ("smixer.", lambda: SpatialMixer(16, depthwise=False)),
    "smixer_depthwise_dim16": ("smixer.", lambda: SpatialMixer(16, depthwise=True)),
    "cmixer_dim16_expand4_early": ("cmixer.", lambda: ChannelMixer(16, 4, depthwise=True)),
    "cmixer_dim16_expand2_late": ("cmixer.", lambda: ChannelMixer(16, 2, depthwise=False)),
    "layernorm_group_dim16": ("", lambda: spartan.NORMS["map"](16)),
    "layernorm_channel_dim16": ("", lambda: spartan.NORMS["channel"](16)),
}


def part_case(name: str) -> Case:
    """A part of the network, filled as the reference's was."""
    prefix, make = PARTS[name]
    layout = spartan.layouts(SpartanConfig())[0] if prefix else KeyLayout("official")
    case = Case(make().eval(), layout, prefix)
    fill_case(case, MODULES["modules"][name]["keys"])
    return case


@pytest.mark.parametrize("name", PARTS)
def test_parts_match_their_digests(name):
    stored = MODULES["modules"][name]
    with torch.no_grad():
        output = part_case(name).module(make_input("feature", stored["input"]["shape"]))
    assert relative_error(output, stored["output"]) < 1e-5


def test_digests_of_parts_are_all_looked_at():
    assert set(PARTS) == set(MODULES["modules"])


def test_waves_multiply_complex_numbers():
    example = MODULES["wave_multiply"]
    wave = torch.tensor(example["complex_param_pairs"])
    x = torch.tensor(example["feature_channels_0_to_3"]).reshape(1, 4, 1, 1)
    assert turn_pairs(x, wave).flatten().tolist() == example["output_channels"]


def test_waves_are_torchs_complex_product():
    x, wave = torch.randn(2, 6, 3, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    pairs = torch.view_as_complex(x.unflatten(1, (3, 2)).movedim(2, -1).contiguous())
    expected = torch.view_as_real(pairs * torch.view_as_complex(wave)[:, None, None]).movedim(-1, 2).flatten(1, 2)
    torch.testing.assert_close(turn_pairs(x, wave), expected)


def test_the_strongest_channel_reinforces_all_at_its_position():
    mixer = ChannelMixer(8, 3, depthwise=True).double()
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    plain = mixer.key(x) * nn.functional.gelu(mixer.theta(x))
    with torch.no_grad():
        found = mixer.reinforced(x, strongest_channel(x))
    for image, row, column in [(0, 0, 0), (1, 3, 4), (1, 2, 1)]:
        here = (image, slice(None), row, column)
        torch.testing.assert_close(found[here], plain[here] + plain[here][x[here].argmax()])


def test_high_pass_leaves_the_mean_and_scales_deviations():
    mixer = SpatialMixer(8, depthwise=True)
    nn.init.constant_(mixer.gamma, 3.0)
    u = torch.randn(2, 4, 5, 6)
    mean = u.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(mixer.reinforce(u), mean + 4 * (u - mean))
    nn.init.constant_(mixer.gamma, -1.0)
    torch.testing.assert_close(mixer.reinforce(u), mean.expand_as(u))


def test_two_receptive_fields():
    mixer = SpatialMixer(8, depthwise=True).double().eval()
    for branch, side in ((mixer.high, 3), (mixer.low, 9)):
        x = torch.zeros(1, 4, 15, 15, dtype=torch.float64, requires_grad=True)
        branch(x)[0, :, 7, 7].sum().backward()
        seen = x.grad[0].abs().sum(0).nonzero()
        assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [side, side]


@pytest.mark.parametrize(
    ("ratio", "depthwise", "folded"), [(2, False, True), (4, False, True), (3, False, False), (4, True, False)]
)
def test_waves_fold_into_kernels_whose_groups_hold_whole_pairs(ratio, depthwise, folded):
    mixer = ChannelMixer(8, ratio, depthwise=depthwise).double().eval()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    merged = mixer.merged()
    assert (merged.wave is None) is folded
    torch.testing.assert_close(merged(x), mixer(x))
    torch.testing.assert_close(merged.merged()(x), mixer(x))


def test_folding_leaves_neither_batch_norms_nor_scales():
    folded = fold(small_model("spartan_tiny"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert folded.stages[0].blocks[0].scale_1 is None


def test_products_stay_finite_in_half_precision():
    mixer = ChannelMixer(8, 2, depthwise=False).eval()
    with torch.no_grad():
        mixer.theta.bias.fill_(300.0)
        mixer.key.bias.fill_(300.0)
        mixer.wave.mul_(1e-3)
    half = mixer.to(torch.float16)
    assert half(torch.randn(1, 8, 4, 4).half()).isfinite().all()


def test_drop_path_stops_one_step_short():
    model = gatewise.create_model("spartan_tiny", **{**SMALL["spartan_tiny"], "drop_path_rate": 0.5})
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_only_the_high_pass_is_kept_from_decay_by_name():
    names = small_model("spartan_tiny").no_weight_decay()
    assert len(names) == 5
    assert all(name.endswith("spatial_mixer.gamma") for name in names)


def test_weights_go_both_ways_under_the_published_names():
    model, other = small_model("spartan_tiny"), small_model("spartan_tiny")
    state = export_state(model, "official")
    assert {"layers.1.conv.weight", "layers.4.cmixer.complex", "layers.7.smixer.l_conv.0.conv.weight"} <= set(state)
    assert state["layers.0.cmixer.complex"].shape == (1, 1, 1, 80, 2)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["spartan_tiny", "spartan_tiny+channel"])
def test_a_checkpoint_tells_its_configuration(name, tmp_path):
    model = small_model(name, norm="map")
    state = {f"module.{key}": tensor for key, tensor in export_state(model, "official").items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "weights.pth")
    found = spartan.spartan_from_checkpoint(tmp_path / "weights.pth")
    assert (found.config.depths, found.config.embed_dims) == (model.config.depths, model.config.embed_dims)
    assert found.config.expand_ratios == model.config.expand_ratios
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(found(x), model(x))


def test_other_weights_are_refused():
    with pytest.raises(CheckpointError, match="not a SpaRTAN's weights"):
        spartan.config_of({"conv.0.conv.weight": torch.zeros(4, 3, 3, 3)})
    state = export_state(small_model("spartan_tiny"), "official")
    without = {key: tensor for key, tensor in state.items() if not key.startswith("layers.2.")}
    with pytest.raises(CheckpointError, match="a stage has no block"):
        spartan.config_of(without)


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("spartan_tiny"), tmp_path / "network.onnx", torch.randn(2, 3, 64, 64))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpartanConfig(embed_dims=(32, 60, 128, 256)), "stage 1: the width must be a multiple of 8, not 60"),
        (lambda: SpartanConfig(expand_ratios=(4, 4, 1, 2)), "stage 2: the channel mixer must expand"),
        (lambda: SpartanConfig(depths=(3, 3, 12)), r"one entry per stage \(3\)"),
        (lambda: SpartanConfig(depths=(3, 0, 12, 2)), "every stage needs a block"),
        (lambda: SpartanConfig(norm="layer"), "norm must be one of map, channel, not 'layer'"),
        (lambda: small_model("spartan_tiny")(torch.zeros(1, 3, 31, 64)), "at least 32, not 31 x 64"),
        (lambda: small_model("spartan_tiny").train()(torch.zeros(1, 3, 32, 33)), "more than one image, or larger"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
