"""Mixers against their papers' equations, written down token by token."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gatewise.networks.sequence.mixers.attention import Attention
from gatewise.networks.sequence.mixers.base_conv import BaseConv
from gatewise.networks.sequence.mixers.based import Based
from gatewise.networks.sequence.mixers.h3 import H3
from gatewise.networks.sequence.mixers.hyena import Hyena
from gatewise.networks.sequence.mixers.mamba import Mamba
from gatewise.networks.sequence.mixers.retention import Retention
from gatewise.networks.sequence.mixers.rwkv import RWKV


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """In float64 and eval mode, with every parameter away from where it starts."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.fixture
def x():
    return torch.randn(2, 9, 8, dtype=torch.float64)


def check(mixer, x, expected):
    assert torch.allclose(mixer(x)[0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [None, 3])
def test_attention_hides_what_is_ahead_or_too_far_behind(x, window):
    mixer = moved(Attention(8, 2, window=window))
    expected = torch.zeros_like(x)
    q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    for head in (slice(0, 4), slice(4, 8)):
        for t in range(9):
            seen = slice(max(0, t - window) if window else 0, t + 1)
            weights = (k[:, seen, head] @ q[:, t, head, None] / 2).softmax(dim=1)
            expected[:, t, head] = (weights * v[:, seen, head]).sum(1)
    check(mixer, x, mixer.out_proj(expected))


@pytest.mark.parametrize("use_act", [False, True])
@pytest.mark.parametrize(("kernel", "implicit"), [(3, True), (-1, True), (-1, False)])
def test_base_conv(x, use_act, kernel, implicit):
    mixer = moved(BaseConv(8, kernel, 12, implicit, use_act))
    if kernel == 3:
        taps, bias, skip = mixer.short_conv.weight[:, 0].flip(1).t(), mixer.short_conv.bias, 0
    else:
        taps, bias, skip = mixer.long_conv.filter(), 0, x
    mixed = bias + skip + direct_convolution(x, taps)
    gate = x @ mixer.projection.weight.t() + mixer.projection.bias
    check(mixer, x, (F.silu(mixed) * F.silu(gate) if use_act else mixed * gate) + x)


def direct_convolution(x, taps):
    rows = [sum(taps[j] * x[:, t - j] for j in range(min(t + 1, len(taps)))) for t in range(x.shape[1])]
    return torch.stack(rows, dim=1)


def test_hyena(x):
    mixer = moved(Hyena(8, 12, hidden_dim=5))
    short = mixer.short_conv
    mixed = direct_convolution(mixer.in_proj(x), short.weight[:, 0].flip(1).t()) + short.bias
    x1, x2, v = mixed.chunk(3, dim=-1)
    hidden = mixer.filter.positions[0]
    for linear in mixer.filter.linears[:-1]:
        hidden = torch.sin(mixer.filter.frequency[0] * linear(hidden))
    # Buffers start in float32.
    rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 8).abs().double()
    window = torch.exp(-torch.linspace(0, 1, 12).double()[:, None] * rates)
    taps = mixer.filter.linears[-1](hidden) * window
    y = direct_convolution(v * x1, taps) + v * x1 * mixer.filter.bias
    check(mixer, x, mixer.out_proj(y * x2))


def test_h3_is_two_recurrences_and_two_products(x):
    mixer = moved(H3(8, 12, d_state=6, head_dim=2))
    q, k, v = (p(x).unflatten(-1, (4, 2)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    keys = shift_recurrence(mixer, k.flatten(2)).unflatten(-1, (4, 2))
    log_a, c = mixer.diagonal.discretized()
    modes = torch.zeros(2, 4, 2, 2, 3, dtype=torch.complex128)
    outputs = []
    for t in range(9):
        product = keys[:, t, :, :, None] * v[:, t, :, None, :]
        modes = modes * log_a.exp()[:, None, None] + product[..., None]
        remembered = 2 * (modes * c[:, None, None]).sum(-1).real + mixer.diagonal_skip[:, None, None] * product
        outputs.append((remembered * q[:, t, :, :, None]).sum(2).transpose(1, 2).flatten(1))
    check(mixer, x, mixer.o_proj(torch.stack(outputs, 1)))


def shift_recurrence(mixer, k):
    """A state per channel that moves on by one place: s <- shifted s + B k, y = C s + D k."""
    state = torch.zeros(*k[:, 0].shape, 6, dtype=k.dtype)
    outputs = []
    for t in range(k.shape[1]):
        state = F.pad(state[..., :-1], (1, 0)) + mixer.shift.B * k[:, t, :, None]
        outputs.append((state * mixer.shift.C[0]).sum(-1) + mixer.shift_skip * k[:, t])
    return torch.stack(outputs, 1)


def test_rwkv(x):
    mixer = moved(RWKV(8, layer=1, depth=3))
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    k, v, r = (
        project(x * mu + before * (1 - mu))
        for project, mu in (
            (mixer.key, mixer.time_mix_k),
            (mixer.value, mixer.time_mix_v),
            (mixer.receptance, mixer.time_mix_r),
        )
    )
    w, u = -mixer.time_decay.exp(), mixer.time_first
    rows = []
    for t in range(9):
        weights = [torch.exp((t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(u + k[:, t])]
        rows.append(sum(wi * v[:, i] for i, wi in enumerate(weights)) / sum(weights))
    check(mixer, x, mixer.output(r.sigmoid() * torch.stack(rows, 1)))


def test_retention(x):
    mixer = moved(Retention(8, num_heads=2))
    q, k = (rotated(project(x).unflatten(-1, (2, 4))) for project in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x).unflatten(-1, (2, 8))
    gamma = 1 - 2.0 ** -torch.tensor([5.0, 6.0], dtype=torch.float64)
    state = torch.zeros(2, 2, 4, 8, dtype=torch.float64)
    rows = []
    for t in range(9):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append((q[:, t, :, None] @ state).squeeze(2) / 2)
    o = torch.stack(rows, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    expected = mixer.o_proj(o.flatten(2) * F.silu(mixer.gate_proj(x)))
    # Angles and decays are formed in float32.
    assert torch.allclose(mixer(x)[0], expected, rtol=0, atol=1e-5)


def rotated(x):
    first, second = x.chunk(2, dim=-1)
    angles = torch.arange(x.shape[1])[:, None, None] * 10000.0 ** (-torch.arange(2) / 2)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_based(x):
    mixer = moved(Based(8, feature_dim=3, num_heads=2))
    q, k = (project(x).unflatten(-1, (2, 3)).transpose(1, 2) for project in (mixer.q_proj, mixer.k_proj))
    v = mixer.v_proj(x).unflatten(-1, (2, 4)).transpose(1, 2)
    s = q @ k.transpose(-1, -2) / math.sqrt(3)
    weights = (1 + s + s**2 / 2).tril()
    y = weights @ v / weights.sum(-1, keepdim=True)
    check(mixer, x, mixer.o_proj(y.transpose(1, 2).flatten(2)))


def test_mamba(x):
    mixer = moved(Mamba(8, d_state=3))
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    inner = F.silu(direct_convolution(inner, mixer.conv.weight[:, 0].flip(1).t()) + mixer.conv.bias)
    dt, b, c = mixer.x_proj(inner).split([1, 3, 3], dim=-1)
    dt = F.softplus(dt @ mixer.dt_proj.weight.t() + mixer.dt_bias)
    h = torch.zeros(2, 16, 3, dtype=torch.float64)
    rows = []
    for t in range(9):
        h = torch.exp(-dt[:, t, :, None] * mixer.A_log.exp()) * h + (dt[:, t] * inner[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1) + mixer.D * inner[:, t])
    check(mixer, x, mixer.out_proj(torch.stack(rows, 1) * F.silu(z)))


def test_parameters_start_as_published():
    mamba, h3, rwkv = Mamba(64), H3(64, 64, 64), RWKV(64)
    assert torch.allclose(mamba.A_log[3].exp(), torch.arange(1, 17).float())
    steps = F.softplus(mamba.dt_bias)
    assert steps.min() >= 0.999e-3
    assert steps.max() <= 0.1001
    assert torch.allclose(h3.diagonal.inv_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(h3.diagonal.A_imag[5], math.pi * torch.arange(32))
    # With B = e_1 the taps are C.
    assert torch.allclose(h3.shift(), h3.shift.C[0].t(), atol=1e-5)
    assert (rwkv.time_decay[0].item(), rwkv.time_decay[-1].item()) == (-5, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(10, 3), "not 10 by 3"),
        (lambda: Attention(8, 1, window=0), "window must be positive, not 0"),
        (lambda: BaseConv(8, 0), "or -1 for a long convolution, not 0"),
        (lambda: Hyena(8, 12, position_dim=4), "position_dim must be odd"),
        (lambda: H3(9, 12, 8, head_dim=2), "not 9 by 2"),
        (lambda: H3(8, 12, 7), "even and positive, not 7"),
        (lambda: Based(8, 0), "feature_dim must be positive, not 0"),
        (lambda: Based(8, 4, num_heads=3), "not 8 by 3"),
        (lambda: Mamba(8, 0), "d_state must be positive, not 0"),
        (lambda: Retention(8, 2, expand_v=1.125), "not 9 by 2"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("mixer", [BaseConv(8, -1, 6), BaseConv(8, -1, 6, implicit=False), Hyena(8, 6), H3(8, 6, 6)])
def test_long_convolutions_refuse_more_than_their_filters_hold(mixer):
    with pytest.raises(ValueError, match="at most max_length=6 tokens, not 7"):
        mixer(torch.randn(1, 7, 8))


@pytest.mark.parametrize("mixer", [BaseConv(8, -1, 6), Hyena(8, 6)])
def test_long_convolutions_refuse_to_go_on_past_their_filters(mixer):
    _, state = mixer(torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match="at most max_length=6 tokens, not 7"):
        mixer(torch.randn(1, 1, 8), state)
