"""ConvFirst and MBConv blocks and ConvFirstNet, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gatewise
from gatewise.catalog.checkpoint import export_state, load_state
from gatewise.efficiency.acceleration.export import export_onnx
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.cost.count import count
from gatewise.networks.image.convfirst import BenchmarkStage, ConvFirst, ConvFirstConfig, MBConv
from tests.conftest import small_model

SMALL = {
    "convfirstnet_small": {"embed_dims": (8, 16, 24, 32), "depths": (1, 2, 2, 1), "num_classes": 5},
}

CARDS = {
    "convfirstnet_small": (4_331_872, 1.129e9),
    "convfirstnet_medium": (11_622_024, 2.980e9),
    "convfirstnet_large": (24_935_896, 6.496e9),
}


@pytest.mark.parametrize("block", [ConvFirst, MBConv])
@pytest.mark.parametrize(("in_dim", "dim", "expand_ratio", "kernel_size"), [(16, 16, 4, 3), (16, 24, 6, 5)])
def test_parameters_are_the_formulas(block, in_dim, dim, expand_ratio, kernel_size):
    made = block(in_dim, dim, kernel_size=kernel_size, expand_ratio=expand_ratio)
    hidden, taps = expand_ratio * in_dim, 8 * kernel_size**2
    spatial, norms = (in_dim, in_dim + hidden + dim) if block is ConvFirst else (hidden, 2 * hidden + dim)
    expected = taps * spatial + in_dim * hidden + hidden * dim + 2 * norms
    assert sum(p.numel() for p in made.parameters()) == expected


@pytest.mark.parametrize("block", [ConvFirst, MBConv])
def test_a_shortcut_needs_one_shape(block):
    assert block(16, 16).residual
    assert not block(16, 24).residual
    assert not block(16, 16, 2).residual


def test_the_convolution_has_no_activation_behind_it():
    block = ConvFirst(8, 8, kernel_size=1, group_width=8).eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(block.spatial(x), -block.spatial(-x))


def test_a_fresh_block_is_an_identity():
    model = gatewise.create_model("convfirstnet_small", embed_dims=(8, 16, 24, 32)).eval()
    x = torch.randn(1, 24, 6, 6)
    assert torch.equal(model.stages[2].blocks[0](x), x)


def test_stage_puts_the_larger_half_of_perceptrons_first():
    stage = BenchmarkStage(16, depth=2, extra_depth=3)
    assert (len(stage.pre), len(stage.blocks), len(stage.post)) == (2, 2, 1)


@pytest.mark.parametrize("group_width", [1, 4, 16])
def test_other_group_widths(group_width):
    block = ConvFirst(16, 16, group_width=group_width)
    assert block.spatial.conv.groups == 16 // group_width
    assert count(block, torch.randn(1, 16, 6, 6)).macs == 36 * (9 * group_width * 16 + 2 * 16 * 64)


def test_weights_go_both_ways_under_the_published_names():
    model, other = small_model("convfirstnet_small"), small_model("convfirstnet_small")
    state = export_state(model, "official")
    assert {"stages.1.downsample.layers.2.weight", "stages.2.blocks.0.layers.4.weight"} <= set(state)
    for parameter in other.parameters():
        parameter.data.zero_()
    load_state(other, state)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))


def test_folding_leaves_three_convolutions_per_block():
    folded = fold(small_model("convfirstnet_small"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.untyped
def test_exports_to_onnx(tmp_path):
    report = export_onnx(small_model("convfirstnet_small"), tmp_path / "network.onnx", torch.randn(2, 3, 64, 64))
    assert report.error < 1e-5


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvFirst(20, 20), "ConvFirst: 20 channels are not a multiple of group width 8"),
        (lambda: MBConv(5, 8, expand_ratio=3), "MBConv: 15 channels are not a multiple of group width 8"),
        (lambda: ConvFirstConfig(depths=(1, 1)), r"one entry per stage \(2\)"),
        (
            lambda: ConvFirstConfig(blocks=("mbconv",) * 3 + ("dense",)),
            "of convfirst, mbconv, not dense",
        ),
        (lambda: ConvFirstConfig(embed_dims=(47, 96, 192, 384)), "must be even, not 47"),
        (lambda: ConvFirstConfig(depths=(2, 0, 6, 2)), "every stage needs a block"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
