"""A quantised network as a state dict: the float weights under their own keys, and beside them how they are rounded.

    features.0.weight              as in the float network, which any PyTorch code can load
    features.0.weight_scale        (C_out,), or () for one scale; of the folded weight, as the integer network has it
    features.0.weight_zero_point   as weight_scale, int32; zeros for symmetric weights
    features.0.input_scale, input_zero_point, output_scale, output_zero_point     ()

A layer whose output is not rounded has no output entries, and one that was quantised with `weights_only` no input
entries either. The file is safetensors; its metadata holds the report as JSON. Deployment takes the ONNX file instead
(`QuantizedModel.save`), which holds codes and is a quarter as large.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gatewise.efficiency.export import onnx_bytes
from gatewise.efficiency.fold import fold
from gatewise.efficiency.inputs import eval_mode
from gatewise.efficiency.quantization.graph import Graph
from gatewise.efficiency.quantize import HEADER, QuantizationReport, QuantizedModel, Runtime, quantize
from gatewise.errors import UserError

if TYPE_CHECKING:
    from onnx import NodeProto

_PARTS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "output_scale", "output_zero_point")
_CLAMPS = ("Relu", "Clip")


def quantized_state(model: nn.Module, quantized: QuantizedModel) -> dict[str, Tensor]:
    """The state dict of the float network that `quantized` was made from, with scales and zero points.

    Raises:
        ValueError: if `model` has a tensor under the name of one of those.
    """
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in _Reader(quantized.onnx).parameters(quantized.report.layers).items():
        if name in state:
            raise ValueError(f"the network has a tensor of its own under the name {name}")
        state[name] = tensor
    return state


def save_quantized_state(model: nn.Module, quantized: QuantizedModel, path: str | Path) -> Path:
    """Write `quantized_state` and the report to a safetensors file.

    Raises:
        ValueError: as `quantized_state`; if the folder is missing.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; create it first")
    save_file(quantized_state(model, quantized), path, {HEADER: json.dumps(quantized.report.to_dict())})
    return path


def load_quantized_state(path: str | Path, model: nn.Module, runtime: Runtime = "onnxruntime") -> QuantizedModel:
    """The quantised network of a file of `save_quantized_state`; `model` takes the float weights.

    Args:
        model: a network of the same architecture, in eval mode.
    Raises:
        UserError: if the file is not one of those, or of another architecture (names what is missing or too many).
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file") from error
    if header is None:
        raise UserError(f"{path} was not written by save_quantized_state: it has no entry {HEADER!r}")
    report = QuantizationReport.from_dict(json.loads(header))
    own = model.state_dict().keys()
    added = {f"{layer}.{part}" for layer in report.layers for part in _PARTS}
    missing, extra = own - state.keys(), state.keys() - own - added
    if missing or extra:
        raise UserError(f"{path} is of another network: missing {sorted(missing)[:3]}, too many {sorted(extra)[:3]}")
    model.load_state_dict({name: state[name] for name in own})
    return _quantize_as(model, report, runtime)


def _quantize_as(model: nn.Module, report: QuantizationReport, runtime: Runtime) -> QuantizedModel:
    """`model` quantised with the choices and the ranges of a report."""
    # A symmetric grid's lowest code, one more than there are positive ones, is not used.
    symmetric = report.scheme == "symmetric"
    ranges = {entry.name: (-entry.maximum if symmetric else entry.minimum, entry.maximum) for entry in report.ranges}
    example = torch.zeros(1, *report.input_shape)
    with eval_mode(model):
        layers = Graph(onnx_bytes(fold(model), example)).layers()
    return quantize(
        model,
        example,
        scheme=report.scheme,
        bits=report.bits,
        weight_bits=report.weight_bits,
        weight_scheme=report.weight_scheme,
        weights_only=report.weights_only,
        per_channel=report.per_channel,
        activations=report.activations,
        reduce_range=report.reduced_range,
        skip=[name for name in layers if name not in report.layers],
        ranges=ranges,
        runtime=runtime,
    )


class _Reader:
    """Finds scales and zero points in a quantised ONNX file."""

    def __init__(self, content: bytes) -> None:
        import onnx

        graph = onnx.load_from_string(content).graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def parameters(self, layers: tuple[str, ...]) -> dict[str, Tensor]:
        """By the names of the state dict."""
        found: dict[str, Tensor] = {}
        for layer in layers:
            (node,) = self.consumers[f"{layer}.weight_dequantized"]
            pairs: dict[str, Any] = {
                "weight": self.producers[f"{layer}.weight_dequantized"],
                "input": self._dequantizer(node.input[0]),
                "output": self._quantizer(node.output[0]),
            }
            for place, pair in pairs.items():
                if pair is not None:
                    found[f"{layer}.{place}_scale"] = self._values(pair.input[1])
                    found[f"{layer}.{place}_zero_point"] = self._values(pair.input[2]).to(torch.int32)
        return found

    def _dequantizer(self, tensor: str) -> NodeProto | None:
        node = self.producers.get(tensor)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _quantizer(self, tensor: str) -> NodeProto | None:
        """What makes codes of a layer's output, or of what a ReLU or clip leaves of it."""
        consumers = self.consumers.get(tensor, [])
        if len(consumers) == 1 and consumers[0].op_type in _CLAMPS:
            return self._quantizer(consumers[0].output[0])
        return next((node for node in consumers if node.op_type == "QuantizeLinear"), None)

    def _values(self, name: str) -> Tensor:
        from onnx import numpy_helper

        values = numpy_helper.to_array(self.constants[name])
        # Codes of 4 bits have a NumPy type of their own.
        return torch.from_numpy(values.astype("int32" if values.dtype.kind not in "f" else "float32").copy())
