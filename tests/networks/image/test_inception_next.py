"""Inception depthwise convolution and InceptionNeXt, beyond what the digests show."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatewise.networks.image.inception_next import BRANCHES, InceptionDepthwise, InceptionNeXtConfig, PartialDepthwise
from tests.conftest import small_model

SMALL = {
    "inception_next_atto": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},
    "convnext_tiny_k3_par1_4": {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},
}

CARDS = {
    "inception_next_atto": (4_156_520, 503_035_040),
    "inception_next_tiny": (28_055_680, 4.189e9),
    "inception_next_small": (49_374_016, 8.356e9),
    "inception_next_base": (86_672_136, 14.841e9),
    "inception_next_base_384": (86_672_136, 43.603e9),
    "convnext_tiny_k5": (28_430_152, 4.404e9),
    "convnext_tiny_k3": (28_324_168, 4.370e9),
    "convnext_tiny_k3_par1_2": (28_291_048, 4.360e9),
    "convnext_tiny_k3_par3_8": (28_282_768, 4.358e9),
    "convnext_tiny_k3_par1_4": (28_274_488, 4.355e9),
    "convnext_tiny_k3_par1_8": (28_266_208, 4.353e9),
    "convnext_tiny_k3_par1_16": (28_262_068, 4.352e9),
}
"""Parameters (exact) and MACs (exact where an integer, else to four digits) of the published tables."""


def as_one_kernel(mixer: InceptionDepthwise) -> tuple[torch.Tensor, torch.Tensor]:
    """The same map as one 11x11 depthwise convolution: delta, embedded square, row and column kernels."""
    dim = sum(mixer.split)
    weight, bias = torch.zeros(dim, 1, 11, 11), torch.zeros(dim)
    weight[: mixer.split[0], 0, 5, 5] = 1
    start = mixer.split[0]
    for conv in mixer.convs.values():
        height, width = conv.kernel_size
        rows, columns = slice(5 - height // 2, 6 + height // 2), slice(5 - width // 2, 6 + width // 2)
        weight[start : start + conv.out_channels, :, rows, columns] = conv.weight.data
        bias[start : start + conv.out_channels] = conv.bias.data
        start += conv.out_channels
    return weight, bias


@pytest.mark.parametrize("branches", [BRANCHES, ("square", "row"), ("identity", "column")])
def test_it_is_one_sparse_large_kernel(branches):
    mixer = InceptionDepthwise(24, branches=branches)
    x = torch.randn(2, 24, 13, 9)
    weight, bias = as_one_kernel(mixer)
    expected = F.conv2d(x, weight, bias, padding=5, groups=24)
    assert torch.allclose(mixer(x), expected, atol=1e-6)


def test_one_pixel_sees_a_cross_and_its_own_channel():
    mixer = InceptionDepthwise(8)
    x = torch.randn(1, 8, 21, 21, requires_grad=True)
    seen = []
    for channel in range(8):
        gradient = torch.autograd.grad(mixer(x)[0, channel, 10, 10], x)[0][0]
        assert not gradient[[c for c in range(8) if c != channel]].any()
        seen.append(gradient[channel] != 0)
    assert [int(channel.sum()) for channel in seen] == [1, 1, 1, 1, 1, 9, 11, 11]
    assert int(torch.stack(seen).any(dim=0).sum()) == 11 + 11 - 1 + 4


@pytest.mark.parametrize(
    ("branches", "split"),
    [
        (("identity", "square", "row", "column"), [40, 8, 8, 8]),
        (("identity", "row", "column"), [48, 8, 8]),
        (("identity", "square"), [56, 8]),
        (("square", "row", "column"), [0, 22, 21, 21]),
        (("identity",), [64]),
    ],
)
def test_branches_of_the_ablation(branches, split):
    mixer = InceptionDepthwise(64, branches=branches)
    assert mixer.split == split
    assert mixer(torch.randn(1, 64, 5, 5)).shape == (1, 64, 5, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, r"7 channels at branch_ratio 0.125 give 0 to each"),
        ({"dim": 8, "branch_ratio": 0.5}, r"8 channels at branch_ratio 0.5 give 4 to each"),
        ({"dim": 8, "band_kernel_size": 10}, "odd and positive, not 10"),
        ({"dim": 8, "branches": ("diagonal",)}, "branches must be some of identity"),
        ({"dim": 8, "branches": ()}, "branches must be some of identity"),
    ],
)
def test_impossible_mixers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InceptionDepthwise(**arguments)


def test_convolutions_take_their_part_of_the_norm_when_folded():
    block = small_model("inception_next_atto").stages[0].blocks[0].eval()
    block.norm.running_var.uniform_(1e-4, 4)
    before, merged = block.mixer.convs["row"].weight, block.merged()
    start = block.mixer.split[0] + block.mixer.split[1]
    scale = (block.norm.weight * (block.norm.running_var + block.norm.eps).rsqrt())[start : start + len(before)]
    torch.testing.assert_close(merged.mixer.convs["row"].weight, before * scale[:, None, None, None])
    # Maps of the mixer are then as large as what fc1 reads, in each channel.
    torch.testing.assert_close(merged.mlp.fc1.weight[:, start:], block.mlp.fc1.weight[:, start:])


def test_another_number_of_channels_names_the_layer():
    with pytest.raises(ValueError, match="InceptionDepthwise expects 8 channels, not 9"):
        InceptionDepthwise(8)(torch.zeros(1, 9, 4, 4))


def test_kernels_and_ratios_may_differ_by_stage():
    model = small_model("inception_next_atto", band_kernel_size=(3, 5, 7, 9), branch_ratio=(0.125, 0.25, 0.25, 0.3))
    kernels = [stage.blocks[0].mixer.convs["row"].kernel_size for stage in model.stages]
    assert kernels == [(1, 3), (1, 5), (1, 7), (1, 9)]
    assert [stage.blocks[0].mixer.split[1] for stage in model.stages] == [1, 4, 6, 9]


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_levels_can_be_normalized(norm):
    model = small_model("inception_next_atto", pyramid_norm=norm, out_indices=(1, 2, 3), norm=norm)
    levels = model.forward_pyramid(torch.randn(1, 3, 64, 64))
    assert len(model.level_norms) == len(levels) == 3


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "group"}, "norm must be one of batch, layer, not 'group'"),
        ({"pyramid_norm": "group"}, "pyramid_norm must be one of"),
        ({"embed_dims": (8, 16)}, r"embed_dims must have one entry per stage \(4\)"),
        ({"band_kernel_size": (3, 5)}, "band_kernel_size must have one entry per stage"),
        ({"out_indices": (5,)}, "out_indices must be stages 0..3"),
    ],
)
def test_impossible_options_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        InceptionNeXtConfig(**fields)


def test_batch_norm_over_one_value_says_so():
    model = small_model("inception_next_atto").train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))


def test_partial_convolution_acts_on_the_last_channels():
    mixer = PartialDepthwise(8, 3, 0.25)
    x = torch.randn(1, 8, 6, 6)
    y = mixer(x)
    assert torch.equal(y[:, :6], x[:, :6])
    assert not torch.equal(y[:, 6:], x[:, 6:])
    with pytest.raises(ValueError, match="conv_ratio must leave 1 to 8"):
        PartialDepthwise(8, 3, 0.1)
