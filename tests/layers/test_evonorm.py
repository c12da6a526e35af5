"""EvoNorm layers: forms, options, running variances and errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatewise.layers.evonorm import (
    EVONORMS,
    LAYERS,
    ConvEvoNorm,
    EvoNormB0,
    EvoNormB1,
    EvoNormB2,
    EvoNormS0,
    EvoNormS0a,
    EvoNormS1,
    EvoNormS2a,
    NormActivation,
    count_groups,
)
from gatewise.ops.evonorm import evonorm_b_reference, evonorm_s_reference

B_SERIES = ("B0", "B1", "B2")
EPS = {"B0": 1e-3, "S0a": 1e-3, "S1a": 1e-3, "S2a": 1e-3}


def moved(layer: nn.Module) -> nn.Module:
    """The layer with all parameters away from their initial values, in float64."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return layer.double()


@pytest.mark.parametrize("name", EVONORMS)
def test_parameters_buffers_and_eps_are_those_of_the_definition(name):
    layer = EVONORMS[name](8)
    assert sum(parameter.numel() for parameter in layer.parameters()) == (24 if name in ("B0", "S0", "S0a") else 16)
    assert [buffer.shape for buffer in layer.buffers()] == ([(8,)] if name in B_SERIES else [])
    assert layer.eps == EPS.get(name, 1e-5)
    assert torch.equal(layer.weight, torch.ones(8))
    assert torch.equal(layer.bias, torch.zeros(8))
    assert layer.v is None or torch.equal(layer.v, torch.ones(8))


@pytest.mark.parametrize("name", EVONORMS)
@pytest.mark.parametrize("training", [True, False])
def test_layers_follow_the_definition(name, training):
    layer = moved(EVONORMS[name](8)).train(training)
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64) + 0.3
    parameters = (layer.weight, layer.bias, layer.v)
    if name in B_SERIES:
        running = None if training else layer.running_var.clone()
        options = {"member": name, "eps": layer.eps, "centered": name == "B0"}
        expected = evonorm_b_reference(x, *parameters, running, **options)[0]
    else:
        options = {"groups": 8, "eps": layer.eps, "centered": not name.startswith("S2")}
        expected = evonorm_s_reference(x, *parameters, **options)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", EVONORMS)
def test_without_the_activation_only_the_a_members_divide(name):
    layer = moved(EVONORMS[name](8, act=False))
    assert layer.v is None
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    affine = x * layer.weight[:, None, None] + layer.bias[:, None, None]
    assert layer.is_affine == (not name.endswith("a"))
    assert torch.equal(layer(x), affine) == layer.is_affine
    if name == "S2a":
        options = {"groups": 8, "eps": 1e-3, "centered": False, "gated": False}
        torch.testing.assert_close(layer(x), evonorm_s_reference(x, layer.weight, layer.bias, **options))


@pytest.mark.parametrize(("unbiased", "count"), [(True, 59), (False, 60)])
def test_running_variances_move_by_either_rule(unbiased, count):
    layer = EvoNormB0(2, momentum=0.2, unbiased=unbiased)
    x = 3 * torch.randn(3, 2, 4, 5)
    layer(x)
    variance = (x - x.mean(dim=(0, 2, 3), keepdim=True)).square().sum(dim=(0, 2, 3)) / count
    torch.testing.assert_close(layer.running_var, 0.8 + 0.2 * variance)
    kept = layer.running_var.clone()
    layer.eval()(x)
    assert torch.equal(layer.running_var, kept)


def test_without_the_activation_nothing_is_counted():
    layer = EvoNormB1(2, act=False)
    layer(torch.randn(3, 2, 4, 5))
    assert torch.equal(layer.running_var, torch.ones(2))


def test_the_instance_is_still_seen_in_inference():
    layer = EvoNormB0(2).eval()
    layer.running_var.fill_(0.01)
    x = torch.randn(1, 2, 4, 5)
    assert not torch.allclose(layer(2 * x), 2 * layer(x))


@pytest.mark.parametrize("kind", [EvoNormB1, EvoNormB2])
def test_the_papers_form_is_centered(kind):
    x = torch.randn(3, 2, 4, 5) + 2
    assert not torch.allclose(kind(2)(x), kind(2, centered=True)(x), atol=1e-2)
    zero_mean = x - x.mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(kind(2)(zero_mean), kind(2, centered=True)(zero_mean))


@pytest.mark.parametrize(
    ("dim", "groups", "size", "expected"),
    [(64, 32, None, 32), (48, 32, None, 24), (8, 32, None, 8), (7, 4, None, 1), (48, 32, 16, 3), (48, 32, 48, 1)],
)
def test_groups_are_reduced_until_they_divide_and_a_size_overrides_them(dim, groups, size, expected):
    assert count_groups(dim, groups, size) == expected
    assert EvoNormS0(dim, groups=groups, group_size=size).groups == expected


def test_what_is_active_is_shown():
    assert "groups=24 of 2" in repr(EvoNormS1(48))
    assert "unbiased=False" in repr(EvoNormB0(4, unbiased=False))
    assert "act=False" in repr(EvoNormS0a(4, act=False))


def test_half_precision_networks_keep_their_dtype():
    for name in EVONORMS:
        layer = EVONORMS[name](8).bfloat16()
        x = torch.randn(2, 8, 4, 4).bfloat16()
        assert layer(x).dtype == torch.bfloat16
        assert layer.eval()(x).dtype == torch.bfloat16


def test_parameters_in_float32_do_not_widen_half_precision_maps():
    x = torch.randn(2, 8, 4, 4).bfloat16()
    for name in EVONORMS:
        for act in (True, False):
            assert EVONORMS[name](8, act=act)(x).dtype == torch.bfloat16


@pytest.mark.parametrize("layer", LAYERS)
def test_every_choice_builds_both_forms(layer):
    choice = NormActivation(layer, groups=4)
    x = torch.randn(2, 8, 3, 3)
    with_act, without = choice.build(8), choice.build(8, act=False)
    assert with_act(x).shape == without(x).shape == x.shape
    assert sum(p.numel() for p in with_act.parameters()) >= sum(p.numel() for p in without.parameters())


def test_choices_hand_their_options_on():
    layer = NormActivation("B1", eps=1e-4, momentum=0.3, unbiased=False, centered=True).build(8)
    assert (layer.eps, layer.momentum, layer.unbiased, layer.centered) == (1e-4, 0.3, False, True)
    assert NormActivation("S2a", group_size=2).build(8).groups == 4
    assert NormActivation("GN-ReLU", groups=4).build(8).norm.num_groups == 4
    assert NormActivation("BN-SiLU", eps=1e-3, momentum=0.2).build(8).norm.momentum == 0.2


@pytest.mark.parametrize("layer", ["S0", "B0", "S0a", "BN-ReLU"])
@pytest.mark.parametrize("act", [True, False])
def test_units_fold_what_is_affine_and_compute_the_same(layer, act):
    unit = moved(ConvEvoNorm(4, 8, 3, 2, norm=NormActivation(layer), act=act)).eval()
    merged = unit.merged()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(merged(x), unit(x))
    assert isinstance(merged.norm, nn.Identity) == (layer in ("S0", "B0") and not act)
    assert unit.conv.bias is None


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EvoNormS0(48, group_size=32), "group_size must divide the 48 channels, not be 32"),
        (lambda: EvoNormS0(48, groups=0), "groups must be positive, not 0"),
        (lambda: EvoNormS2a(0), "at least one channel, not 0"),
        (lambda: EvoNormB2(4, eps=0.0), "eps must be positive, not 0.0"),
        (lambda: EvoNormB2(4, momentum=1.5), "momentum must be from 0 to 1, not 1.5"),
        (lambda: EvoNormB0(4)(torch.zeros(1, 4, 1, 1)), "more than one value per channel in training"),
        (lambda: EvoNormS0(4, act=False)(torch.zeros(1, 4)), r"EvoNormS0 takes maps .*, not \(1, 4\)"),
        (lambda: EvoNormS0(4)(torch.zeros(1, 5, 2, 2)), "one entry for each of the 5 channels"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
