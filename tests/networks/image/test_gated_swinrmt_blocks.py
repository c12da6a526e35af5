"""The mixer of Gated-SwinRMT: its equations, its special case, what it sees, its rotary positions and its gates."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from gatewise.networks.image.gated_swinrmt import FORMS, Mixer, rotate_pairs, window_rotation
from tests.conftest import FINGERPRINTS


def mixer(dim=32, num_heads=4, **options):
    module = Mixer(dim, num_heads, **options).double().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[-1] ** -0.5)
    return module


def form(name):
    return {key: value for key, value in FORMS[name].items() if key not in ("decomposed", "shift", "window")}


def shared_weights(target, source):
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    assert not [key for key in (*missing, *unexpected) if not key.startswith(("out_gate", "value_gate", "out_norm"))]


def test_an_open_gate_and_a_large_window_make_rmt():
    """As the definition says: gate of weight 0 and bias 50, window as large as the map."""
    gated, plain = mixer(out_gate="elementwise"), mixer(**form("rmt"), window=None)
    shared_weights(plain, gated)
    torch.nn.init.zeros_(gated.out_gate.weight)
    torch.nn.init.constant_(gated.out_gate.bias, 50.0)
    x = torch.randn(2, 7, 9, 32, dtype=torch.float64)
    assert (gated(x) - plain(x)).abs().max() < 1e-6


def test_a_mixer_follows_the_equations_of_both_forms():
    """With one position per window, attention is the value itself, or its share by two sigmoids."""
    x = torch.randn(2, 3, 4, 32, dtype=torch.float64)

    def linear(layer):
        return x @ layer.weight.T + layer.bias

    def parts(module):
        q, k, v = linear(module.qkv).chunk(3, dim=-1)
        return q, k, v if module.value_gate is None else F.silu(linear(module.value_gate)) * v

    def local(module, v):
        patches = F.pad(v.permute(0, 3, 1, 2), [2] * 4).unfold(2, 5, 1).unfold(3, 5, 1)
        return torch.einsum("bchwij,cij->bhwc", patches, module.local.weight[:, 0]) + module.local.bias

    retention = mixer(**form("retention"), window=1)
    q, k, v = parts(retention)
    y = (v + local(retention, v)) * linear(retention.out_gate).sigmoid()
    expected = y @ retention.project_out.weight.T + retention.project_out.bias
    assert torch.allclose(retention(x), expected)

    swat = mixer(**form("swat"), window=1)
    q, k, v = parts(swat)
    share = (q * k).unflatten(-1, (4, 8)).sum(dim=-1).mul(8**-0.5).sigmoid().repeat_interleave(8, dim=-1)
    y = F.layer_norm(share**2 * v, (32,), swat.out_norm.weight, swat.out_norm.bias, 1e-6) + local(swat, v)
    expected = y @ swat.project_out.weight.T + swat.project_out.bias
    assert torch.allclose(swat(x), expected)


@pytest.mark.parametrize("name", ["swat", "retention"])
@pytest.mark.parametrize("is_shifted", [False, True])
def test_attention_stays_in_its_window_and_behind_the_seam(name, is_shifted):
    module = mixer(**form(name), is_shifted=is_shifted)
    torch.nn.init.zeros_(module.local.weight)
    x = torch.randn(1, 16, 14, 32, dtype=torch.float64, requires_grad=True)
    rows, columns = (slice(0, 3), slice(3, 10)) if is_shifted else (slice(7, 14), slice(7, 14))
    here = torch.zeros(16, 14, dtype=torch.bool)
    here[rows, columns] = True
    (gradient,) = torch.autograd.grad(module(x)[0, rows, columns].square().sum(), x)
    assert (gradient[0, ~here] == 0).all()
    assert (gradient[0, here].abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize(("size", "window", "shift"), [((5, 6), (5, 6), (0, 0)), ((9, 15), (4, 7), (2, 3))])
def test_rotary_angles_count_positions_within_the_window(size, window, shift):
    cos, sin = window_rotation(size, window, shift, 8)
    theta = 10000.0 ** -torch.linspace(0, 1, 4)
    for row in range(size[0]):
        for column in range(size[1]):
            inside = ((row - shift[0]) % window[0]) * window[1] + (column - shift[1]) % window[1]
            assert torch.allclose(cos[row, column], (inside * theta).cos(), atol=1e-5)
            assert torch.allclose(sin[row, column], (inside * theta).sin(), atol=1e-5)


def test_rotary_angles_are_those_worked_out():
    worked = json.loads((FINGERPRINTS / "gated-swinrmt" / "decay_and_slopes.json").read_text())
    cos, _ = window_rotation((1, 2), (1, 2), (0, 0), 8)
    assert torch.allclose(cos[0, 1].repeat_interleave(2), torch.tensor(worked["rotary_angle_headdim8"]).cos())


def test_neighboring_channels_rotate_together():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 1, 4)
    angles = torch.tensor([[[0.5, 0.2]]])
    expected = torch.tensor([0.5, 0.5, 0.2, 0.2])
    expected = torch.stack([expected[0].cos(), expected[1].sin(), -expected[2].sin(), expected[3].cos()])
    assert torch.allclose(rotate_pairs(x, angles.cos(), angles.sin()).flatten(), expected)


def test_gates_are_read_as_they_are_used():
    module = mixer(out_gate="elementwise", value_gate=True)
    x = torch.randn(2, 5, 4, 32, dtype=torch.float64)
    maps = module.read_gates(x)
    assert {name: gate.shape for name, gate in maps.items()} == {"value": (2, 5, 4), "output": (2, 5, 4)}
    assert torch.allclose(maps["output"], module.out_gate(x).sigmoid().mean(dim=-1))
    torch.nn.init.zeros_(module.out_gate.weight)
    torch.nn.init.constant_(module.out_gate.bias, -100.0)
    assert module.read_gates(x)["output"].max() < 1e-30
    assert torch.allclose(module(x), module.project_out.bias.expand(2, 5, 4, -1))
