"""A quantized network as a state dict: the float weights under their own keys, with the parameters of their rounding.

    features.0.weight              as in the float network, which any PyTorch code can load
    features.0.weight_scale        (C_out,), or () for one scale; of the folded weight, as the integer network has it
    features.0.weight_zero_point   as weight_scale, int32; zeros for symmetric weights
    features.0.input_scale, input_zero_point, output_scale, output_zero_point     ()

A layer whose output is not rounded has no output entries, and one that was quantized with `weights_only` has no input
entries either. The file is safetensors; its metadata holds the report as JSON. Use the ONNX file for deployment
instead (`QuantizedModel.save`), which holds codes and is a quarter as large.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from gatewise.efficiency.inputs import check_inference
from gatewise.efficiency.quantization.prepare import Options, Prepared
from gatewise.efficiency.quantization.quantize import HEADER, QuantizationReport, QuantizedModel, Runtime, finish
from gatewise.errors import UserError
from gatewise.files import parse_json, require_regular, write_atomically
from gatewise.ops.quantize import MAX_BITS, Grid, code_range

if TYPE_CHECKING:
    from onnx import NodeProto

_PARTS = ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "output_scale", "output_zero_point")
_CLAMPS = ("Relu", "Clip")


def quantized_state(model: nn.Module, quantized: QuantizedModel) -> dict[str, Tensor]:
    """Return the state dict of the float network that `quantized` was made from, with scales and zero points.

    Raises:
        ValueError: if `model` already has a tensor with the name of a scale or zero point.
    """
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in _Reader(quantized.onnx).parameters(quantized.report.layers).items():
        if name in state:
            raise ValueError(f"the network already has a tensor named {name}")
        state[name] = tensor
    return state


def save_quantized_state(model: nn.Module, quantized: QuantizedModel, path: str | Path) -> Path:
    """Write `quantized_state` and the report to a safetensors file.

    Raises:
        ValueError: as for `quantized_state`; or if the folder does not exist.
        Failure: if the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; create it first")
    content = save(quantized_state(model, quantized), {HEADER: json.dumps(quantized.report.to_dict())})
    write_atomically(path, lambda file: file.write(content))
    return path


def load_quantized_state(path: str | Path, model: nn.Module, runtime: Runtime = "onnxruntime") -> QuantizedModel:
    """Load the quantized network from a file of `save_quantized_state`; `model` takes the float weights.

    Weights and activations are rounded by the scales and zero points in the file.

    Args:
        model: a network of the same architecture, in eval mode.
    Raises:
        ValueError: if `model` is in training mode.
        UserError: if the file was not written by it, belongs to another architecture (names missing and unexpected
            entries), or holds values that are not finite, have another dtype or shape, or weights that its scales
            cannot represent (names the tensor). `model` is not modified in these cases.
    """
    check_inference(model, "quantizing")
    header, state = _read(path)
    report = QuantizationReport.from_dict(header, f"the report in {path}")
    own = model.state_dict()
    added = {f"{layer}.{part}" for layer in report.layers for part in _PARTS}
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys() - added
    if missing or extra:
        raise UserError(
            f"{path} belongs to another network: missing {sorted(missing)[:3]}, too many {sorted(extra)[:3]}"
        )
    for name, tensor in own.items():
        _check_weight(state[name], tensor, f"{path}: {name}")
    stored = _Stored.of(state, report, str(path))
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        model.load_state_dict({name: state[name] for name in own})
        return _quantize_as(model, report, stored, runtime, str(path))
    except BaseException:
        model.load_state_dict(before)
        raise


def _read(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the report as plain data, and the tensors."""
    require_regular(path, "quantized state")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        state = load_file(path)
    # A dtype that this version of PyTorch lacks raises KeyError.
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    if header is None:
        raise UserError(f"{path} was not written by save_quantized_state: it has no entry {HEADER!r}")
    return parse_json(header, f"the report in {path}", allow_nonfinite=True), state


def _check_weight(found: Tensor, expected: Tensor, what: str) -> None:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise UserError(
            f"{what} must be {expected.dtype} of shape {tuple(expected.shape)}, not {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    if found.is_floating_point() and not found.isfinite().all():
        raise UserError(f"{what} holds NaN or infinite values")


@dataclass(frozen=True)
class _Stored:
    """The scales and zero points in a file.

    Attributes:
        tensors: tensors by their names in the file.
        weights: grid of each layer's weight in the file's form, which has no axis yet.
        activations: grid of each tensor of codes.
    """

    tensors: dict[str, Tensor]
    weights: dict[str, Grid]
    activations: dict[str, Grid]

    @classmethod
    def of(cls, state: Mapping[str, Tensor], report: QuantizationReport, path: str) -> _Stored:
        """Check the entries of each layer in a file.

        Raises:
            UserError: if a scale or zero point is missing, has another dtype or shape, or is out of range.
        """
        tensors: dict[str, Tensor] = {}
        weights: dict[str, Grid] = {}
        symmetric = report.weight_scheme == "symmetric"
        bits = report.weight_bits - 1 if report.reduced_range and report.weight_bits == MAX_BITS else report.weight_bits
        codes = {
            "weight": code_range(bits, signed=symmetric, narrow=symmetric),
            "input": code_range(report.bits),
            "output": code_range(report.bits),
        }
        for layer in report.layers:
            for place, (low, high) in codes.items():
                names = f"{layer}.{place}_scale", f"{layer}.{place}_zero_point"
                given = [name for name in names if name in state]
                needed = place == "weight" or (place == "input" and not report.weights_only)
                if not given and not needed:
                    continue
                if len(given) < 2:
                    raise UserError(f"{path} lacks {next(name for name in names if name not in given)}")
                grid = Grid(state[names[0]], state[names[1]], low, high)
                _check_grid(grid, path, names, per_channel=place == "weight" and report.per_channel)
                tensors |= {name: state[name] for name in names}
                if place == "weight":
                    weights[layer] = grid
        low, high = code_range(report.bits)
        activations = {
            entry.name: Grid(torch.tensor(entry.scale), torch.tensor(entry.zero_point, dtype=torch.int32), low, high)
            for entry in report.ranges
        }
        return cls(tensors, weights, activations)


def _check_grid(grid: Grid, path: str, names: tuple[str, str], per_channel: bool) -> None:
    scale, zero_point = grid.scale, grid.zero_point
    if scale.dtype != torch.float32 or scale.ndim != int(per_channel):
        form = "one per channel" if per_channel else "one number"
        raise UserError(f"{path}: {names[0]} must be float32, {form}, not {scale.dtype} of shape {tuple(scale.shape)}")
    if not (scale.isfinite() & (scale > 0)).all():
        raise UserError(f"{path}: {names[0]} must be positive and finite")
    if zero_point.dtype != torch.int32 or zero_point.shape != scale.shape:
        raise UserError(
            f"{path}: {names[1]} must be int32 of shape {tuple(scale.shape)}, not {zero_point.dtype} of shape "
            f"{tuple(zero_point.shape)}"
        )
    if not ((zero_point >= grid.low) & (zero_point <= grid.high)).all():
        raise UserError(f"{path}: {names[1]} must be in {grid.low}..{grid.high}")


def _quantize_as(
    model: nn.Module, report: QuantizationReport, stored: _Stored, runtime: Runtime, path: str
) -> QuantizedModel:
    """Quantize `model` with the options of a report and the grids of a file."""
    options = Options(
        scheme=report.scheme,
        bits=report.bits,
        weight_bits=report.weight_bits,
        weight_scheme=report.weight_scheme,
        weights_only=report.weights_only,
        per_channel=report.per_channel,
        activations=report.activations,
        reduce_range=report.reduced_range,
    )
    try:
        prepared = Prepared.of(model, iter([torch.zeros(1, *report.input_shape)]), options)
        prepared.set_grids(stored.activations, stored.weights)
        skip = [name for name in prepared.graph.layers() if name not in report.layers]
        quantized = finish(model, prepared, prepared.write(skip), runtime)
    except ValueError as error:
        raise UserError(f"{path} does not fit the network: {error}") from error
    if quantized.report.layers != report.layers:
        raise UserError(f"{path} belongs to another network: its layers are not those that can be quantized here")
    for name, tensor in _Reader(quantized.onnx).parameters(report.layers).items():
        if name not in stored.tensors or not torch.equal(stored.tensors[name], tensor):
            raise UserError(f"{path} contradicts itself: {name} is not what its weights and its report give")
    return quantized


class _Reader:
    """Finds scales and zero points in a quantized ONNX file."""

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
        """Return scales and zero points by their names in the state dict."""
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
        """Return the node that quantizes a layer's output, directly or after a ReLU or clip."""
        consumers = self.consumers.get(tensor, [])
        if len(consumers) == 1 and consumers[0].op_type in _CLAMPS:
            return self._quantizer(consumers[0].output[0])
        return next((node for node in consumers if node.op_type == "QuantizeLinear"), None)

    def _values(self, name: str) -> Tensor:
        from onnx import numpy_helper

        values = numpy_helper.to_array(self.constants[name])
        # 4-bit codes have their own NumPy type.
        return torch.from_numpy(values.astype("int32" if values.dtype.kind not in "f" else "float32").copy())
