"""Quantized networks: the options, files, sizes and errors of `quantize`."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.quantization.quantize import QuantizedModel, load_quantized, quantize
from gatewise.efficiency.quantization.weights import quantize_weights
from gatewise.errors import UserError
from gatewise.fidelity.fingerprint import fill, make_input
from gatewise.ops.quantize import signal_to_noise
from tests.conftest import FINGERPRINTS
from tests.efficiency.conftest import Tiny, settle
from tests.efficiency.quantized import Residual, batches, operators

pytestmark = pytest.mark.untyped


def record(name):
    return json.loads((FINGERPRINTS / "quantization" / f"{name}.json").read_text())


def test_the_file_is_a_quarter_and_comes_back_the_same(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    sizes = {}
    x = batches(1)[0]
    for name, options in {"int8": {}, "weights": {"weights_only": True}, "int4": {"weight_bits": 4}}.items():
        network = quantize(model, batches(), **options)
        path = network.save(tmp_path / f"{name}.onnx")
        sizes[name] = path.stat().st_size
        assert sizes[name] == network.report.bytes_after
        again = load_quantized(path)
        assert again.report == network.report
        torch.testing.assert_close(again(x), network(x), rtol=0, atol=0)
    floats = sum(parameter.numel() for parameter in model.parameters()) * 4
    # What is not weights: names, scales and the report, some 10 kB.
    assert sizes["int8"] < floats / 4 + 14_000
    assert sizes["weights"] < floats / 4 + 8_000
    assert sizes["int4"] < floats / 8 + 14_000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["int4.onnx", "int8.onnx", "weights.onnx"]


@pytest.mark.parametrize("options", [{}, {"weight_bits": 4}, {"per_channel": False}, {"weight_scheme": "affine"}])
def test_weights_alone_equal_their_simulation(tiny, options):
    with pytest.warns(UserWarning, match="depthwise") if "per_channel" in options else _nothing():
        network = quantize(tiny, batches(), weights_only=True, **options)
    symmetric = options.get("weight_scheme", "symmetric") == "symmetric"
    simulated = quantize_weights(
        tiny, options.get("weight_bits", 8), per_channel=options.get("per_channel", True), symmetric=symmetric
    )
    x = batches(1)[0]
    torch.testing.assert_close(network(x), simulated(x).detach(), rtol=1e-4, atol=1e-5)
    assert network.report.ranges == ()
    assert "all arithmetic is float" in network.report.execution


def test_mobilenet_loses_what_it_should():
    torchvision = pytest.importorskip("torchvision")
    worked = record("mobilenetv2-weights")
    model = torchvision.models.mobilenet_v2()
    state = {key: fill(key, shape) for key, shape in worked["keys"].items()}
    model.load_state_dict(state, strict=False)
    x = make_input(**worked["inputs"]["x"])
    model.eval()
    with torch.no_grad():
        expected = model(x)
        for name, noise in worked["sqnr_db"].items():
            bits = 8 if "int8" in name else 4
            found = quantize_weights(model, bits, per_channel=name.endswith("channel"))(x)
            # Ties between codes fall either way with another order of folding: the record asks for 0.5 dB.
            assert signal_to_noise(expected, found) == pytest.approx(noise, abs=0.5), name


def test_four_bits_run_as_eight_with_the_same_numbers(residual, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = quantize(residual, batches(), weight_bits=4)
    assert operators(network)["QLinearConv"] == 3
    assert "widened" in network.report.execution
    x = batches(1)[0]
    simulated = quantize_weights(residual, 4)(x).detach()
    # Activations of 8 bits add little to what 4-bit weights cost.
    assert signal_to_noise(simulated, network(x)) > 25


def test_fewer_bits_for_activations_lose_more(residual):
    x = batches(1)[0]
    expected = residual(x).detach()
    noise = [signal_to_noise(expected, quantize(residual, batches(), bits=bits)(x)) for bits in (8, 6, 4)]
    assert noise[0] > noise[1] + 6 > noise[2] + 12


def test_per_channel_beats_per_tensor_where_channels_differ():
    model = settle(Residual(nn.ReLU))
    factors = torch.logspace(-2, 2, 8)
    with torch.no_grad():
        # ReLU lets positive factors through: the next layer takes them back, and nothing else changes.
        folded = fold(model)
        folded.stem[0].weight.mul_(factors.view(-1, 1, 1, 1))
        folded.stem[0].bias.mul_(factors)
        folded.depthwise[0].weight.div_(factors.view(-1, 1, 1, 1))
    x = batches(1)[0]
    with torch.no_grad():
        expected = folded(x)
        fine = signal_to_noise(expected, quantize_weights(folded, 8)(x))
        coarse = signal_to_noise(expected, quantize_weights(folded, 8, per_channel=False)(x))
    assert fine > coarse + 3


def test_symmetric_activations_have_their_zero_in_the_middle(residual):
    network = quantize(residual, batches(), scheme="symmetric")
    assert {entry.zero_point for entry in network.report.ranges} == {128}
    assert signal_to_noise(residual(batches()[0]).detach(), network(batches()[0])) > 20


def test_without_vnni_weights_have_seven_bits(residual):
    import onnx

    network = quantize(residual, batches(), reduce_range=True)
    assert network.report.reduced_range
    assert "7 bits used" in str(network.report)
    codes = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(network.onnx).graph.initializer
        if tensor.name.endswith("weight_codes")
    ]
    assert max(abs(int(code.min())) for code in codes) == max(int(code.max()) for code in codes) == 63


def test_skipped_layers_stay_float(residual, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = quantize(residual, batches(), skip=["stem.0", "head"])
    assert network.report.layers == ("depthwise.0", "project")
    assert network.report.floats["head"] == "kept float on request"
    assert operators(network)["QLinearConv"] == 2
    with pytest.raises(UserError, match="unknown layer 'stem'; did you mean"):
        quantize(residual, batches(), skip=["stem"])


def test_ranges_can_come_from_elsewhere(residual):
    network = quantize(residual, batches(), ranges={"images": (-2.0, 2.0)})
    own = {entry.name: entry for entry in network.report.ranges}["images"]
    assert (own.minimum, own.maximum) == pytest.approx((-2.0, 2.0), abs=0.01)
    with pytest.raises(UserError, match="unknown tensor"):
        quantize(residual, batches(), ranges={"nothing": (0.0, 1.0)})


def test_any_batch_is_served_and_the_original_is_left_alone(residual, quantized):
    before = {key: value.clone() for key, value in residual.state_dict().items()}
    x = torch.cat(batches(4))
    whole = quantized(x)
    assert whole.shape == (8, 5)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(torch.cat([quantized(x[:1]), quantized(x[1:])]), whole, rtol=0, atol=0)
    torch.testing.assert_close(quantized.as_module()(x), whole, rtol=0, atol=0)
    assert all(torch.equal(value, before[key]) for key, value in residual.state_dict().items())


def test_openvino_gives_the_same(residual, quantized):
    pytest.importorskip("openvino")
    other = QuantizedModel(quantized.onnx, quantized.report, "openvino")
    x = torch.cat(batches(2))
    assert signal_to_noise(quantized(x), other(x)) > 30
    assert QuantizedModel(quantized.onnx, quantized.report, "fastest").runtime in ("onnxruntime", "openvino")


def test_a_layer_whose_sums_leave_32_bits_stays_float():
    layer = nn.Linear(66_400, 2)
    nn.init.constant_(layer.weight, 0.01)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(2, 2)).eval()
    network = quantize(model, [torch.rand(1, 66_400)], reduce_range=False)
    assert network.report.layers == ("2",)
    assert "beyond the 32 bits" in network.report.floats["0"]


def test_a_bias_that_dwarfs_its_weights_is_kept():
    model = nn.Conv2d(3, 4, 1).eval()
    with torch.no_grad():
        model.weight[0] *= 1e-12
        model.weight[1] = 0
    x = batches(1)[0]
    assert signal_to_noise(model(x).detach(), quantize(model, batches())(x)) > 30


@pytest.mark.parametrize("bits", [8, 6])
def test_the_output_of_a_network_can_be_codes_itself(bits):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    network = quantize(model, batches(), bits=bits)
    own = {entry.name: entry for entry in network.report.ranges}["1"]
    codes = network(batches()[0]) / own.scale
    assert codes.min() == 0
    assert codes.max() == pytest.approx(2**bits - 1, rel=1e-5)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)


# Ways to calibrate


@pytest.mark.parametrize("method", ["min-max", "averaged", "percentile", "mse", "entropy"])
def test_each_calibration_gives_a_useful_network(residual, method):
    network = quantize(residual, batches(), activations=method)
    x = torch.cat(batches())
    assert network.report.activations == method
    assert signal_to_noise(residual(x).detach(), network(x)) > 15


# Mistakes


class Breaks(nn.Module):
    """Gives NaN behind its second layer."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        with torch.no_grad():
            self.features[1].bias[0] = float("nan")

    def forward(self, x):
        return self.features(x).mean(dim=(2, 3))


def test_mistakes_are_named(tiny, images):
    with pytest.raises(ValueError, match="no calibration batches"):
        quantize(tiny, [])
    with pytest.raises(ValueError, match="calibration batch 1 must hold samples of shape"):
        quantize(tiny, [images, images[..., :8]])
    with pytest.raises(ValueError, match="cannot run on an example"):
        quantize(tiny, [images[:, :2]])
    with pytest.raises(TypeError, match="calibration must give tensors"):
        quantize(tiny, ["images"])
    with pytest.raises(ValueError, match=r"bits must be in 2..8, not 1"):
        quantize(tiny, images, weight_bits=1)
    with pytest.raises(ValueError, match=r"bits must be in 2..8, not 16"):
        quantize(tiny, images, bits=16)
    with pytest.raises(ValueError, match="activations must be one of min-max, averaged"):
        quantize(tiny, images, activations="per-channel")
    with pytest.raises(ValueError, match="affine weights have no integer kernels"):
        quantize(tiny, images, weight_scheme="affine")
    with pytest.raises(ValueError, match="runtime must be one of"):
        quantize(tiny, images, runtime="tvm")
    with pytest.raises(ValueError, match="calibration saw NaN in images"):
        quantize(tiny, torch.full_like(images, float("nan")))
    with pytest.raises(ValueError, match=r"calibration saw NaN in features.1"):
        quantize(Breaks().eval(), images)
    with pytest.raises(ValueError, match="max_loss must be 0 or more"):
        quantize(tiny, images, max_loss=-1)
    with pytest.raises(ValueError, match="float32 network"):
        quantize(tiny.double(), images.double())
    with pytest.raises(ValueError, match="call .eval"):
        quantize(Tiny(), images)


def test_a_batch_norm_without_a_convolution_is_reported():
    model = settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU()))
    assert "without a convolution" in quantize(model, batches()).report.floats["0"]


def test_other_inputs_and_files_are_refused(quantized, tmp_path):
    with pytest.raises(ValueError, match=r"quantized for batches of \(3, 16, 16\), not for shape"):
        quantized(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="takes float32 on the CPU"):
        quantized(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    with pytest.raises(ValueError, match="does not exist; create it first"):
        quantized.save(tmp_path / "missing" / "x.onnx")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not an ONNX file"):
        load_quantized(tmp_path / "x.onnx")
    from gatewise.efficiency.acceleration.export import onnx_bytes

    (tmp_path / "y.onnx").write_bytes(onnx_bytes(nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.raises(UserError, match="was not written by QuantizedModel.save"):
        load_quantized(tmp_path / "y.onnx")


def _nothing():
    from contextlib import nullcontext

    return nullcontext()
