"""The dilated re-parameterized block and its merge."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gatewise.catalog.keys import KeyLayout
from gatewise.layers.dilated_reparam import DilatedReparam, reparam_rules

TABLE = {3: (), 7: ((5, 1), (3, 2), (3, 3)), 13: ((5, 1), (7, 1), (7, 2), (3, 5)), 17: ((5, 1), (9, 1), (9, 2), (3, 7))}


def trained(kernel_size=13, dim=4, dtype=torch.float64, **options):
    """A block with norms as after training, in eval mode."""
    block = DilatedReparam(dim, kernel_size, TABLE, **options)
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight, 1, 0.2)
            nn.init.normal_(norm.bias)
    return block.to(dtype).eval()


def by_the_equation(block, x):
    def normed(conv, norm):
        size, dilation = conv.weight.shape[-1], conv.dilation
        y = F.conv2d(x, conv.weight, padding=dilation[0] * (size // 2), dilation=dilation, groups=x.shape[1])
        y = (y - norm.running_mean[:, None, None]) / (norm.running_var + norm.eps).sqrt()[:, None, None]
        return y * norm.weight[:, None, None] + norm.bias[:, None, None]

    branches = [normed(branch.conv, branch.norm) for branch in block.branches.values()]
    return normed(block.large, block.large_norm) + sum(branches, torch.zeros_like(x))


@settings(max_examples=20, deadline=None)
@given(kernel=st.sampled_from(sorted(TABLE)), height=st.integers(1, 20), width=st.integers(1, 20))
def test_it_follows_the_equation_and_merges_exactly(kernel, height, width):
    torch.manual_seed(0)
    block = trained(kernel)
    x = torch.randn(2, 4, height, width, dtype=torch.float64)
    expected = by_the_equation(block, x)
    assert torch.allclose(block(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(block.merged()(x), expected, rtol=1e-10, atol=1e-10)


def test_the_merged_form_is_one_convolution_and_merging_twice_changes_nothing():
    block = trained()
    before = copy.deepcopy(block.state_dict())
    merged = block.merged()
    assert merged.is_merged
    assert {key: tuple(value.shape) for key, value in merged.state_dict().items()} == {
        "large.weight": (4, 1, 13, 13),
        "large.bias": (4,),
    }
    again = merged.merged()
    assert again is not merged
    assert all(torch.equal(again.state_dict()[key], value) for key, value in merged.state_dict().items())
    assert all(torch.equal(block.state_dict()[key], value) for key, value in before.items())


def test_the_deploy_form_has_the_merged_forms_parameters():
    deploy = DilatedReparam(4, 13, TABLE, deploy=True).double().eval()
    merged = trained().merged()
    deploy.load_state_dict(merged.state_dict())
    x = torch.randn(1, 4, 8, 9, dtype=torch.float64)
    assert torch.equal(deploy(x), merged(x))


def test_half_precision_is_merged_in_float64_and_rounded_once():
    block = trained(dtype=torch.bfloat16)
    weight, bias = block.merged_kernel()
    assert weight.dtype == bias.dtype == torch.float64
    merged = block.merged()
    assert torch.equal(merged.large.weight, weight.bfloat16())
    exact = copy.deepcopy(block).double().merged()
    assert torch.allclose(weight, exact.large.weight, rtol=1e-12, atol=1e-12)


def test_frozen_kernels_stay_frozen():
    block = trained().requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in block.merged().parameters())


def test_merging_is_refused_in_training_mode_and_a_kernel_of_the_merged_form():
    with pytest.raises(ValueError, match=r"only be merged in eval mode.*call \.eval\(\) first"):
        trained().train().merged()
    with pytest.raises(ValueError, match="merged already"):
        trained().merged().merged_kernel()


def test_training_gives_every_branch_its_own_statistics_and_gradients():
    block = trained(dtype=torch.float32).train()
    before = {key: value.clone() for key, value in block.named_buffers()}
    block(torch.randn(3, 4, 9, 7)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())
    assert all(not torch.equal(value, before[key]) for key, value in block.named_buffers())


def test_gradients_in_float64():
    block = trained(7, dim=2)
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradcheck(block.merged(), x)


@pytest.mark.parametrize("kernel", [7, 13, 17])
def test_channels_last_gives_the_same(kernel):
    block = trained(kernel, dtype=torch.float32)
    x = torch.randn(2, 4, 11, 9)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(block(last), block(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(block.merged()(last), block(x), rtol=1e-4, atol=1e-5)


def test_published_keys_map_both_ways():
    layout = KeyLayout("official", (("dwconv", "depthwise"), *reparam_rules("depthwise")))
    pairs = {
        "blocks.0.dwconv.lk_origin.weight": "blocks.0.depthwise.large.weight",
        "blocks.0.dwconv.origin_bn.running_var": "blocks.0.depthwise.large_norm.running_var",
        "blocks.0.dwconv.dil_conv_k5_1.weight": "blocks.0.depthwise.branches.k5_1.conv.weight",
        "blocks.0.dwconv.dil_bn_k7_2.bias": "blocks.0.depthwise.branches.k7_2.norm.bias",
    }
    for theirs, ours in pairs.items():
        assert layout.to_ours(theirs) == ours
        assert layout.to_theirs(ours) == theirs


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("kernel", "table", "message"),
    [
        (8, TABLE, "must have one of the sizes 3, 7, 13, 17, not 8"),
        (7, {7: ((5, 2),)}, "at most 7 positions, not 9 with kernel 5 and dilation 2"),
        (7, {7: ((4, 1),)}, "odd kernel .* with kernel 4"),
        (7, {7: ((3, 0),)}, "dilation 0"),
    ],
)
def test_impossible_blocks_are_refused(kernel, table, message):
    with pytest.raises(ValueError, match=message):
        DilatedReparam(4, kernel, table)
