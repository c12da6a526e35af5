"""Quantized networks: exact against integer arithmetic and simulation, small, near the original, safe to use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from gatewise.efficiency.quantization.integer import (
    integer_conv2d,
    quantize_bias,
)
from gatewise.efficiency.quantization.quantize import quantize
from gatewise.ops.quantize import dequantize, fake_quantize, signal_to_noise, weight_grid
from gatewise.ops.quantize import quantize as to_codes
from tests.conftest import small_model
from tests.efficiency.quantized import batches, grids, operators

pytestmark = pytest.mark.untyped


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6()),
        nn.Conv2d(3, 3, (1, 5), padding=(0, 2), groups=3, bias=False),
    ],
    ids=["conv", "relu", "relu6", "depthwise"],
)
def test_a_convolution_equals_its_simulation_and_integer_arithmetic(layer):
    network = quantize(layer.eval(), batches())
    own = grids(network.report)
    conv = layer[0] if isinstance(layer, nn.Sequential) else layer
    input_grid, output_grid = own["images"], list(own.values())[-1]
    x = batches(1)[0]
    grid = weight_grid(conv.weight, 7 if network.report.reduced_range else 8)
    with torch.no_grad():
        z = conv._conv_forward(fake_quantize(x, input_grid), fake_quantize(conv.weight, grid), conv.bias)
        simulated = fake_quantize(z if conv is layer else layer[1](z), output_grid)
    found = network(x)
    # Values at a tie fall to either side.
    assert (found - simulated).abs().max() <= 1.01 * output_grid.scale
    assert ((found - simulated).abs() > 0.01 * output_grid.scale).float().mean() < 0.01
    bias = torch.zeros(len(conv.weight)) if conv.bias is None else conv.bias.detach()
    _, codes = integer_conv2d(
        to_codes(x, input_grid),
        input_grid,
        to_codes(conv.weight, grid),
        grid,
        quantize_bias(bias, input_grid, grid),
        output_grid,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
    )
    assert (found - dequantize(codes, output_grid)).abs().max() <= 1.01 * output_grid.scale


@pytest.mark.parametrize("weight_bits", [8, 4, 3])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_linear_map_equals_its_simulation(weight_bits, rank):
    layer = nn.Linear(12, 7).eval()
    data = batches(3, (2, 12) if rank == 2 else (2, 5, 12))
    network = quantize(layer, data, weight_bits=weight_bits)
    input_grid = grids(network.report)["images"]
    grid = weight_grid(layer.weight, min(weight_bits, 7) if network.report.reduced_range else weight_bits)
    weight = fake_quantize(layer.weight, grid)
    x = data[0]
    expected = nn.functional.linear(fake_quantize(x, input_grid), weight, layer.bias)
    # The output is float; the bias has codes of its own in a Gemm: half a step of the sums.
    step = input_grid.scale * grid.scale.max()
    assert (network(x) - expected).abs().max() <= step


def test_everything_runs_as_integers(quantized, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = operators(quantized)
    assert found["QLinearConv"] == 3
    assert found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Relu", "Clip", "GlobalAveragePool"} & set(found)
    assert quantized.report.floats == {}
    assert quantized.report.layers == ("stem.0", "depthwise.0", "project", "head")


def test_weights_are_signed_per_channel_activations_unsigned_and_biases_int32(quantized):
    import onnx

    model = onnx.load_from_string(quantized.onnx)
    onnx.checker.check_model(model, full_check=True)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {name: codes for name, codes in constants.items() if name.endswith("weight_codes")}
    assert len(weights) == 4
    for name, codes in weights.items():
        assert codes.dtype == np.int8
        assert codes.min() >= -127
        assert constants[name.replace("codes", "scale")].shape == (codes.shape[0],)
        assert not constants[name.replace("codes", "zero_point")].any()
        biases = constants[name.replace("weight_codes", "bias_codes")]
        assert biases.dtype == np.int32
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {constants[node.input[2]].dtype for node in quantizers} == {np.dtype(np.uint8)}
    assert {constants[node.input[1]].shape for node in quantizers} == {()}


@pytest.mark.parametrize("name", ["mobilenetv2_035", "inception_next_atto", "focalnet_tiny_srf"])
def test_networks_of_the_library_stay_near(name):
    model = small_model(name)
    network = quantize(model, batches(2, (2, 3, 32, 32)))
    assert len(network.report.layers) > 5
    x = batches(1, (3, 3, 32, 32))[0]
    with torch.no_grad():
        expected = model(x)
    assert nn.functional.cosine_similarity(network(x), expected).min() > 0.97


class Gated(nn.Module):
    """Squeeze-excitation and hard-swish, as in small mobile networks: (B, 3, H, W) -> (B, 4, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up, self.last = (nn.Conv2d(*shape, 1) for shape in ((3, 8), (8, 4), (4, 8), (8, 4)))

    def forward(self, x):
        x = nn.functional.hardswish(self.conv(x))
        gate = torch.relu(self.down(x.mean(dim=(2, 3), keepdim=True)))
        return self.last(x * torch.sigmoid(self.up(gate)))


def test_gates_have_codes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Gated().eval()
    network = quantize(model, batches())
    own = {entry.name: entry for entry in network.report.ranges}
    assert (own["sigmoid"].scale, own["sigmoid"].zero_point) == (1 / 256, 0)
    assert list(network.report.floats) == ["hardswish"]
    found = operators(network)
    assert found["QLinearConv"] == 4
    assert found["QLinearSigmoid"] == found["QLinearMul"] == 1
    x = batches(1)[0]
    assert signal_to_noise(model(x).detach(), network(x)) > 30


class Branches(nn.Module):
    """Split, one part a convolution with a clamp, concatenation: (B, 4, H, W) -> (B, 4, H, W)."""

    def __init__(self, act):
        super().__init__()
        self.first, self.branch, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act = act

    def forward(self, x):
        kept, changed = self.first(x).split(2, dim=1)
        return self.last(torch.cat([kept, self.act(self.branch(changed))], dim=1))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardtanh(-0.1, 0.1)], ids=["relu", "clip"])
def test_the_parts_of_a_concatenation_share_a_grid(tmp_path, monkeypatch, act):
    monkeypatch.chdir(tmp_path)
    model = Branches(act).eval()
    network = quantize(model, batches())
    found = Counter((entry.scale, entry.zero_point) for entry in network.report.ranges)
    # The first convolution, both parts of the split, the clamp and the concatenation are one; input and output are two.
    assert sorted(found.values()) == [1, 1, 5]
    x = batches(1)[0]
    assert signal_to_noise(model(x).detach(), network(x)) > 30
    assert "Conv" not in operators(network)
