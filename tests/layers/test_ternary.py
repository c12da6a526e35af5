"""Ternary maps: the definition's numbers, training, packing."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gatewise.fidelity.fingerprint import make_input, relative_error
from gatewise.layers.ternary import HybridGatedLinear, PackedTernaryLinear, TernaryLinear
from gatewise.ops.fake_quantize import TERNARY, fake_quantize, quantize
from tests.conftest import FINGERPRINTS

HGF = FINGERPRINTS / "hgf"


def hybrid(weight, lora_a, lora_b, gate, int8) -> HybridGatedLinear:
    layer = HybridGatedLinear(weight.shape[1], weight.shape[0], lora_a.shape[0], activation_bits=8 if int8 else None)
    layer = layer.double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.lora_a.copy_(lora_a)
        layer.lora_b.copy_(lora_b)
        layer.gate.fill_(gate)
    return layer


def worked_cases():
    return json.loads((HGF / "hgf_linear_worked.json").read_text())["cases"]


@pytest.mark.parametrize("case", worked_cases(), ids=lambda case: case["name"])
def test_worked_values_and_gradients(case):
    case = {
        key: torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value
        for key, value in case.items()
    }
    layer = hybrid(case["W"], case["A"], case["B"], case["gate_raw"], case["activation_int8"])
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(case["cotangent"])
    codes, scale = quantize(layer.weight.detach(), TERNARY)
    assert torch.equal(codes, case["ternary"])
    assert scale.item() == pytest.approx(case["weight_scale"], rel=1e-12)
    found = {
        "y": y,
        "correction": layer.correction(x),
        "grad_x": x.grad,
        "grad_W": layer.weight.grad,
        "grad_A": layer.lora_a.grad,
        "grad_B": layer.lora_b.grad,
        "grad_gate_raw": layer.gate.grad,
    }
    for name, value in found.items():
        expected = torch.as_tensor(case[name], dtype=torch.float64)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", ["hgf_linear_medium", "hgf_linear_medium_int8"])
def test_digests_of_a_larger_map(name):
    record = json.loads((HGF / f"{name}.json").read_text())
    scaling = record["config"]["input_scaling"]
    tensors = {key: make_input(**spec).double() * scaling.get(key, 1.0) for key, spec in record["inputs"].items()}
    config = record["config"]
    layer = hybrid(tensors["W"], tensors["A"], tensors["B"], config["gate_raw"], config["activation_int8"])
    x = tensors["x"].requires_grad_()
    y = layer(x)
    assert relative_error(y, record["outputs"]["y"]) < 1e-6
    assert relative_error(y - layer.gamma * layer.correction(x), record["outputs"]["base"]) < 1e-6
    assert layer.zero_share() == pytest.approx(record["ternary_zero_fraction"])
    y.backward(tensors["cot"])
    stated = float(record["notes"].split("raw gate: ")[1].split(". ")[0].rstrip("."))
    assert layer.gate.grad.item() == pytest.approx(stated, rel=1e-6)


def test_training_starts_as_pure_ternary_and_moves_b_first():
    layer = HybridGatedLinear(16, 12, 4)
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), TernaryLinear.forward(layer, x))
    layer(x).square().sum().backward()
    assert layer.lora_b.grad.abs().max() > 0
    assert not layer.lora_a.grad.any()
    assert not layer.gate.grad.any()


def test_a_closed_gate_leaves_the_ternary_map():
    layer = HybridGatedLinear(16, 12, 4, gate_init=0.0)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(5, 16)
    assert torch.equal(layer(x), TernaryLinear.forward(layer, x))


def test_error_against_the_latent_map_falls_with_the_rank():
    torch.manual_seed(0)
    weight = torch.randn(24, 24, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight - fake_quantize(weight, TERNARY))
    x = torch.randn(50, 24, dtype=torch.float64)
    errors = []
    for rank in (1, 6, 12, 24):
        layer = hybrid(weight, vh[:rank], u[:, :rank] * s[:rank], 0.5, False)
        with torch.no_grad():
            layer.lora_b /= layer.gamma
        errors.append((layer(x) - x @ weight.T).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10


def test_a_frozen_gate_gets_no_gradient_and_the_ramp_scales_it():
    layer = HybridGatedLinear(8, 8, 2, gate_init=1.0)
    nn.init.normal_(layer.lora_b)
    layer.frozen, layer.ramp = True, 0.5
    layer(torch.randn(3, 8)).sum().backward()
    assert layer.gate.grad is None
    assert layer.gamma.item() == pytest.approx(0.5 * torch.tanh(torch.tensor(1.0)).item())


@pytest.mark.parametrize("int8", [False, True])
def test_packed_equals_unpacked_bit_for_bit_on_integers(int8):
    layer = TernaryLinear(32, 18, activation_bits=8 if int8 else None)
    x = torch.randint(-127, 128, (4, 32)).float()
    x[:, 0] = 127
    packed = layer.packed()
    if int8:
        # 127 is the largest magnitude, so the codes are the integers themselves; the layer sums them scaled.
        torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-4)
        return
    codes, scale = quantize(layer.weight.detach(), TERNARY)
    assert torch.equal(packed(x), (x @ codes.T) * scale)
    torch.testing.assert_close(packed(x), layer(x))


def test_packed_correction_holds_its_gate():
    layer = HybridGatedLinear(32, 20, 4, gate_init=0.7)
    nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 32)
    # The correction is kept in float16: 11 bits.
    torch.testing.assert_close(layer.packed()(x), layer(x), rtol=5e-3, atol=5e-3)


def test_packed_bytes_are_an_eighth_of_half_precision():
    layer = TernaryLinear(64, 64)
    assert layer.packed().nbytes == 64 * 64 // 4 + 4
    assert layer.packed().nbytes / (2 * layer.weight.numel()) == pytest.approx(0.125, abs=1e-3)


def test_packed_maps_refuse_training_and_survive_a_state_dict():
    layer = HybridGatedLinear(16, 12, 4)
    packed = layer.packed()
    with pytest.raises(ValueError, match="cannot be trained"):
        packed.train()
    with pytest.raises(ValueError, match="cannot be trained"):
        nn.Sequential(packed).train()
    other = HybridGatedLinear(16, 12, 4).packed()
    other.load_state_dict(packed.state_dict())
    x = torch.randn(2, 16)
    assert torch.equal(other(x), packed(x))
    assert isinstance(packed, PackedTernaryLinear)


@pytest.mark.parametrize("rank", [0, 13])
def test_impossible_ranks_are_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be 1 to 12 .*, not {rank}"):
        HybridGatedLinear(16, 12, rank)


def test_only_eight_bits_for_activations():
    with pytest.raises(ValueError, match="activation_bits must be 8 or None, not 4"):
        TernaryLinear(4, 4, activation_bits=4)


def test_read_gates_tells_the_gate_and_its_share():
    layer = HybridGatedLinear(16, 12, 4)
    nn.init.normal_(layer.lora_b)
    gates = layer.read_gates(torch.randn(2, 5, 16))
    assert gates["gamma"].item() == pytest.approx(0.0997, abs=1e-4)
    assert gates["correction over base"].shape == (2, 5)
