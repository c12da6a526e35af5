"""The integer network of a prepared one computes what that does, layer by layer and as a whole."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
import torch

from gatewise.efficiency.acceleration.export import onnx_bytes
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.quantization.graph import Graph
from gatewise.efficiency.quantization.placement import place
from gatewise.efficiency.quantization.prepare import runnable_bytes
from gatewise.efficiency.quantization.training.simulation import Simulation
from gatewise.methods import quantization_aware
from gatewise.methods.quantization_aware import code_tensors, convert, float_network, prepare_qat
from gatewise.ops.quantize import dequantize, quantize, signal_to_noise
from tests.conftest import needs_eight_bit_products, small_model
from tests.methods.quantization import Small, images, prepared, ranges, task, train, train_aware


@pytest.fixture(scope="module")
def trained():
    """A small network, trained in float and then for integers."""
    torch.manual_seed(0)
    network = Small().train()
    train(network, 40)
    return train_aware(network)


class Forced(Simulation):
    """Feeds each layer with the integer network's codes, and notes where its own differ.

    `differences` has by how many codes, and how far (in codes) the value is from the border between two, largest first.
    """

    def __init__(self, model, codes):
        super().__init__(model)
        self.codes, self.differences = codes, {}

    def _round(self, x, site):
        codes, grid = self.codes[site], self._grid(self.plan.groups[site])
        # A mean is a map of one position there.
        codes = codes.reshape(x.shape) if codes.numel() == x.numel() else codes
        if codes.shape != x.shape:
            # Padded already, which in the integer network is a part of the convolution.
            return super()._round(x, site)
        difference = (quantize(x, grid) - codes).abs()
        position = x.double() / grid.scale.double()
        to_border = ((position - position.floor()) - 0.5).abs()[difference > 0]
        self.differences[site] = difference.max().item(), to_border.max().item() if to_border.numel() else 0.0
        return dequantize(codes, grid)


def codes_of(model, quantized, x):
    """Codes of the integer network for `x`, by the ranges of the prepared one, and its outputs in the same run."""
    graph = Graph(onnx_bytes(fold(float_network(model).eval()), x[:1]))
    tensors = code_tensors(model, graph, place(graph))
    file = onnx.load_from_string(runnable_bytes(quantized.onnx, False))
    names = sorted({f"{tensor}_codes" for tensor in tensors.values()})
    file.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [session.get_outputs()[0].name, *names]
    found = dict(zip(names, session.run(names, {session.get_inputs()[0].name: x.numpy()}), strict=True))
    outputs = torch.from_numpy(found[names[0]])
    return {site: torch.from_numpy(found[f"{tensor}_codes"]).int() for site, tensor in tensors.items()}, outputs


@pytest.mark.untyped
@pytest.mark.filterwarnings("error:training has no ranges")
@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("resnet50", False),
        ("focalnet_tiny_srf", False),
        ("unireplknet_a", True),
        ("tiny_moat_0", True),
        ("spartan_tiny", True),
    ],
)
@needs_eight_bit_products
def test_fed_with_the_same_codes_each_layer_gives_the_same_codes(name, folded, monkeypatch):
    shape = (3, 64, 64)
    network = small_model(name)
    model = prepare_qat(network, activation_delay=0, freeze_after=0, input_shape=shape, folded=folded).train()
    x = images(2, shape=shape)
    with torch.no_grad():
        model(x)
    quantized = convert(model.eval(), x)
    codes, outputs = codes_of(model, quantized, x)
    assert codes.keys() == model.plan.groups.keys()
    passes = []
    monkeypatch.setattr(
        quantization_aware, "Simulation", lambda model: passes.append(Forced(model, codes)) or passes[-1]
    )
    with torch.no_grad():
        simulated = model(x)
    differences = passes[0].differences
    assert len(differences) > 0.8 * len(codes)
    for site, (codes_apart, to_border) in differences.items():
        # Float32 puts values on the border of two codes to either side.
        assert codes_apart <= 1, site
        assert to_border < 1e-3, site
    # What stands behind the last codes is float: equal to the last bits.
    assert signal_to_noise(outputs, simulated) > 100


@pytest.mark.untyped
def test_the_prepared_network_in_eval_mode_can_be_exported(trained):
    program = torch.export.export(trained, (images(2),))
    torch.testing.assert_close(program.module()(images(2)), trained(images(2)))


@pytest.mark.untyped
@pytest.mark.filterwarnings("error:training has no ranges")
@needs_eight_bit_products
def test_the_integer_network_computes_what_the_prepared_one_does(trained):
    quantized = convert(trained, task(1000)[0])
    pictures, labels = task(1001, 256)
    with torch.no_grad():
        simulated, plain = trained(pictures), float_network(trained).eval()(pictures)
    integer = quantized(pictures)
    # Both compute with the same codes, and agree to the last bits of float32 (143 dB on one processor); on another, a
    # value that lies halfway between two codes may fall to either side.
    assert signal_to_noise(simulated, integer) > 60
    assert signal_to_noise(simulated, plain) < 50
    assert (simulated.argmax(1) == integer.argmax(1)).float().mean() >= 0.99
    assert (integer.argmax(1) == labels).float().mean() > 0.8
    spans = ranges(trained)
    found = {entry.name: entry for entry in quantized.report.ranges}
    low, high = spans["stem.input_range"].tolist()
    scale = (high - low) / 255
    assert any(entry.scale == pytest.approx(scale, rel=1e-6) for entry in found.values())


@pytest.mark.untyped
def test_weights_of_four_bits_convert(trained):
    network = train_aware(float_network(trained), weight_bits=4)
    quantized = convert(network, [task(1000)[0]])
    pictures, _ = task(1001, 128)
    with torch.no_grad():
        assert signal_to_noise(network(pictures), quantized(pictures)) > 40
    assert quantized.report.weight_bits == 4


def test_only_a_prepared_and_trained_network_converts():
    with pytest.raises(ValueError, match="must be a network that prepare_qat has prepared"):
        convert(Small(), images())
    with pytest.raises(ValueError, match="has not seen a batch"):
        convert(prepared(), images())
