"""Write codes into an ONNX graph: QuantizeLinear and DequantizeLinear pairs, with weights and biases as integers.

A tensor of codes gets a pair after its producer, and everything that reads it reads the pair's output. A runtime finds
kernels between pairs and replaces dequantize-compute-quantize with integer arithmetic. Activations are unsigned, since
x86 processors multiply uint8 with int8 weights fast. Weights are int8 with a scale per output channel, or int4 (two to
a byte) for 4 bits or fewer. Biases are int32 at the scale of the products.

Source: Krishnamoorthi 2018, arXiv:1806.08342, section 2; ONNX operators of version 21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gatewise.efficiency.quantization.graph import Graph, attribute, drop_unread
from gatewise.efficiency.quantization.integer import INT32_MAX, largest_accumulator, quantize_bias
from gatewise.efficiency.quantization.placement import Placement
from gatewise.errors import Failure
from gatewise.ops.quantize import Grid, quantize, weight_grid

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSET, IR_VERSION = 21, 10
"""The first opset with 4-bit codes."""

_CHANGED_IN_OPSET = ("GroupNormalization",)
"""Operators whose meaning changes from opset 21 on."""

_QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class WeightScheme:
    """The rule that turns weights into codes.

    Attributes:
        bits: bits per weight, 2..8; up to 4 are stored two to a byte.
        symmetric: whether the zero point is 0, as integer kernels require; affine weights are for weight-only files.
        given: grids by layer name that replace those derived from the weights.
    """

    bits: int = 8
    per_channel: bool = True
    symmetric: bool = True
    given: Mapping[str, Grid] = field(default_factory=dict)

    def grid(self, weight: Tensor, axis: int, name: str) -> Grid:
        """Return the grid of a layer's weight.

        Raises:
            ValueError: if a given grid has another number of scales than the layer has channels, or cannot represent
                one of its weights.
        """
        if name in self.given:
            return _fitting(self.given[name], weight, axis, name)
        return weight_grid(
            weight, self.bits, symmetric=self.symmetric, per_channel=self.per_channel, axis=axis, name=f"{name}.weight"
        )


def _fitting(grid: Grid, weight: Tensor, axis: int, name: str) -> Grid:
    """Return a given grid along the axis of the output channels."""
    grid = replace(grid, axis=axis if grid.scale.ndim else None)
    scale, zero_point = grid.along(weight)
    codes = (weight / scale).round() + zero_point
    if not ((codes >= grid.low) & (codes <= grid.high)).all():
        raise ValueError(
            f"{name}.weight has values without a code: they would need the codes {codes.min():g}..{codes.max():g}, and "
            f"its scale has {grid.low}..{grid.high}"
        )
    return grid


def write_weights(graph: Graph, placement: Placement, scheme: WeightScheme) -> ModelProto:
    """Return the graph with the weights of the placement's layers as codes, each dequantized where it is read."""
    writer = _Writer(graph)
    for name, node in placement.layers.items():
        weight = graph.weight(node)
        assert weight is not None
        values = torch.from_numpy(weight.values.copy())
        grid = scheme.grid(values, weight.axis, name)
        writer.replace_input(node, 1, writer.store_codes(f"{name}.weight", quantize(values, grid), grid))
    return writer.finish()


def write_codes(
    graph: Graph, placement: Placement, grids: Mapping[str, Grid], scheme: WeightScheme
) -> tuple[ModelProto, dict[str, str]]:
    """Return the graph with codes as placed, and the layers that had to stay float, with the reason.

    Args:
        grids: grid of each root of the placement.
    """
    writer, floats = _Writer(graph), {}
    for tensor, root in placement.roots.items():
        writer.add_pair(tensor, root, grids[root])
    for inner, outer in placement.clamped.items():
        grid = grids[placement.roots[outer]]
        if not _clamps_as(graph, graph.producers[outer], grid):
            # A kernel that ends in these codes does not clamp by itself: it ends before the clamp, which gets codes.
            writer.add_pair(inner, placement.roots[outer], grid)
    for name, node in placement.layers.items():
        reason = writer.write_layer(node, name, grids[placement.roots[node.input[0]]], scheme)
        if reason:
            floats[name] = reason
    return writer.finish(), floats


def _clamps_as(graph: Graph, node: NodeProto, grid: Grid) -> bool:
    """Return whether a ReLU or clip leaves all values of the grid unchanged, and so is part of rounding to it."""
    if node.op_type == "Relu":
        return float(grid.minimum) >= 0
    # An omitted bound does not clamp; the largest value of a grid is off by float32's rounding.
    bounds = [graph.constant(name) if name in graph.constants else None for name in list(node.input)[1:3]]
    low, high = (*bounds, None, None)[:2]
    slack = 1e-5 * float(grid.scale)
    return (low is None or float(grid.minimum) >= float(low) - slack) and (
        high is None or float(grid.maximum) <= float(high) + 255 * slack
    )


def runnable(model: ModelProto, weights_only: bool) -> ModelProto:
    """Return the model as runtimes run it best, with 4-bit codes widened to int8 for their integer kernels.

    If only weights are codes, nothing is computed in integers, so they become float numbers once instead of per call.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    new = onnx.ModelProto()
    new.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in new.graph.initializer}
    for tensor in constants.values():
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            wide = np.int8 if tensor.data_type == TensorProto.INT4 else np.uint8
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(wide), tensor.name))
    if weights_only:
        _dequantize_constants(new, constants)
    return new


def _dequantize_constants(model: ModelProto, constants: Mapping[str, TensorProto]) -> None:
    from onnx import numpy_helper

    nodes = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            nodes.append(node)
            continue
        codes, scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input)
        shape = [1] * codes.ndim
        if scale.ndim:
            shape[attribute(node, "axis", 1)] = -1
        values = (codes.astype(np.int32) - zero_point.reshape(shape)) * scale.reshape(shape)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unread(model)


class _Writer:
    """Adds nodes and constants to a copy of a graph, and rewires it at the end."""

    def __init__(self, graph: Graph) -> None:
        import onnx

        found = {node.op_type for node in graph.nodes}.intersection(_CHANGED_IN_OPSET)
        if found:
            raise Failure(f"{', '.join(sorted(found))} cannot be written at ONNX opset {OPSET} as it is")
        self.graph = graph
        self.model = onnx.ModelProto()
        self.model.CopyFrom(graph.model)
        self.pairs: dict[str, list[NodeProto]] = {}
        self.read_as: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.grids: dict[str, tuple[str, Grid]] = {}
        self.replaced: dict[tuple[str, int], str] = {}
        self.first: list[NodeProto] = []
        self.parameters: set[str] = set()

    def add_pair(self, tensor: str, root: str, grid: Grid) -> None:
        """Add codes for a tensor. Tensors with one grid share its constants, so that runtimes recognize the grid."""
        from onnx import helper

        scale, zero_point = self._store_grid(root, grid, np.uint8)
        # An output of the graph keeps its name after the pair.
        is_output = tensor in self.graph.outputs
        source, result = (f"{tensor}_float", tensor) if is_output else (tensor, f"{tensor}_quantized")
        codes = f"{tensor}_codes"
        nodes = []
        if (grid.low, grid.high) != (0, 255):
            # The operator saturates at 8 bits only.
            inputs, source = [source, *self._store_bounds(root, grid)], f"{tensor}_clipped"
            nodes.append(helper.make_node("Clip", inputs, [source], name=f"{tensor}_clip"))
        nodes += [
            helper.make_node("QuantizeLinear", [source, scale, zero_point], [codes], name=f"{tensor}_quantize"),
            helper.make_node("DequantizeLinear", [codes, scale, zero_point], [result], name=f"{tensor}_dequantize"),
        ]
        self.pairs[tensor] = nodes
        self.read_as[tensor] = result
        self.tensors[result] = tensor
        self.grids[tensor] = root, grid

    def write_layer(self, node: NodeProto, name: str, input_grid: Grid, scheme: WeightScheme) -> str | None:
        """Write a layer's weight and bias as codes, or return why that is impossible."""
        weight = self.graph.weight(node)
        assert weight is not None
        values = torch.from_numpy(weight.values.copy())
        grid = scheme.grid(values, weight.axis, name)
        bias = self._bias(node)
        if bias is not None:
            grid = _wide_enough(grid, bias, input_grid, weight.axis)
        codes = quantize(values, grid)
        bias_codes = torch.zeros(1, dtype=torch.int64) if bias is None else quantize_bias(bias, input_grid, grid)
        reach = largest_accumulator(codes, bias_codes, input_grid, weight.axis)
        if reach > INT32_MAX:
            return f"its sums could reach {reach:.4g}, beyond the 32 bits of integer kernels"
        self.replace_input(node, 1, self.store_codes(f"{name}.weight", codes, grid))
        if bias is not None:
            bias_grid = Grid(grid.scale * input_grid.scale, torch.zeros_like(grid.zero_point), -INT32_MAX, INT32_MAX, 0)
            self.replace_input(node, 2, self.store_codes(f"{name}.bias", bias_codes, bias_grid))
        return None

    def store_codes(self, name: str, codes: Tensor, grid: Grid) -> str:
        """Store a constant's codes and the node that dequantizes them. Return the name of the result."""
        from onnx import TensorProto, helper, numpy_helper

        kind: type = np.int32 if grid.high > 255 else np.int8 if grid.low < 0 else np.uint8
        packed = grid.high - grid.low < 16
        data: TensorProto
        if packed:
            element = TensorProto.INT4 if grid.low < 0 else TensorProto.UINT4
            data = helper.make_tensor(f"{name}_codes", element, list(codes.shape), _pack(codes.numpy()), raw=True)
        else:
            data = numpy_helper.from_array(codes.numpy().astype(kind), f"{name}_codes")
        self.model.graph.initializer.append(data)
        scale, zero_point = self._store_grid(name, grid, kind, packed)
        inputs, result = [data.name, scale, zero_point], f"{name}_dequantized"
        # A single scale has no axis; a vector of scales needs one.
        axes: dict[str, Any] = {} if grid.axis is None or not grid.scale.ndim else {"axis": grid.axis}
        self.first.append(helper.make_node("DequantizeLinear", inputs, [result], name=f"{name}_dequantize", **axes))
        return result

    def replace_input(self, node: NodeProto, position: int, tensor: str) -> None:
        """Make a node of the original graph read another tensor."""
        self.replaced[node.output[0], position] = tensor

    def finish(self) -> ModelProto:
        """Return the rewired model."""
        nodes: list[NodeProto] = [*self.first, *self.pairs.get(self.graph.input, [])]
        for node in list(self.model.graph.node):
            key = node.output[0]
            # The exporter's traces, as large as the weights of a small network.
            del node.metadata_props[:]
            for position, name in enumerate(node.input):
                node.input[position] = self.replaced.get((key, position), self.read_as.get(name, name))
            nodes += [*self._guard(node), node]
            for position, output in enumerate(list(node.output)):
                if output in self.pairs and output in self.graph.outputs:
                    node.output[position] = f"{output}_float"
                nodes += self.pairs.get(output, [])
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)
        for entry in self.model.opset_import:
            if entry.domain in ("", "ai.onnx"):
                entry.version = max(entry.version, OPSET)
        self.model.ir_version = max(self.model.ir_version, IR_VERSION)
        drop_unread(self.model)
        # Recorded shapes include dtypes, some of which have changed.
        del self.model.graph.value_info[:]
        return self.model

    def _guard(self, node: NodeProto) -> list[NodeProto]:
        """Return nodes that keep a float layer float, since onnxruntime would quantize its weights with one scale.

        It does so between a DequantizeLinear and a QuantizeLinear. A clip to the range that the codes have anyway
        changes nothing, but takes the layer out of that pattern.
        """
        from onnx import helper

        tensor = self.tensors.get(node.input[0]) if node.input else None
        if tensor is None or node.op_type not in _QUANTIZED_UNASKED or (node.output[0], 1) in self.replaced:
            return []
        root, grid = self.grids[tensor]
        guarded = f"{node.output[0]}_guarded"
        inputs = [node.input[0], *self._store_bounds(root, grid)]
        node.input[0] = guarded
        return [helper.make_node("Clip", inputs, [guarded], name=f"{guarded}_clip")]

    def _bias(self, node: NodeProto) -> Tensor | None:
        if node.op_type == "MatMul" or len(node.input) < 3 or node.input[2] not in self.graph.constants:
            return None
        bias = torch.from_numpy(self.graph.constant(node.input[2]).copy()).flatten()
        weight = self.graph.weight(node)
        assert weight is not None
        # A Gemm may add one number to all outputs; that stays a float constant.
        return bias if bias.numel() == weight.values.shape[weight.axis] else None

    def _store_grid(self, name: str, grid: Grid, kind: type, packed: bool = False) -> tuple[str, str]:
        from onnx import TensorProto, helper

        scale = self._store(f"{name}_scale", grid.scale.numpy().astype(np.float32))
        zero_point = f"{name}_zero_point"
        if not packed:
            return scale, self._store(zero_point, grid.zero_point.numpy().astype(kind))
        if zero_point not in self.parameters:
            element = TensorProto.INT4 if grid.low < 0 else TensorProto.UINT4
            content = _pack(grid.zero_point.numpy())
            shape = list(grid.zero_point.shape)
            self.model.graph.initializer.append(helper.make_tensor(zero_point, element, shape, content, raw=True))
            self.parameters.add(zero_point)
        return scale, zero_point

    def _store_bounds(self, name: str, grid: Grid) -> tuple[str, str]:
        """Store the smallest and the largest value of an activation's grid."""
        low = self._store(f"{name}_minimum", np.asarray(grid.minimum, dtype=np.float32))
        return low, self._store(f"{name}_maximum", np.asarray(grid.maximum, dtype=np.float32))

    def _store(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if name not in self.parameters:
            self.model.graph.initializer.append(numpy_helper.from_array(values, name))
            self.parameters.add(name)
        return name


def _wide_enough(grid: Grid, bias: Tensor, input_grid: Grid, axis: int) -> Grid:
    """Enlarge the scales of the weight's grid where a bias would not fit into 31 bits at the scale of the products.

    This affects a channel whose weights are tiny beside its bias. The codes that they lose made no difference.
    """
    needed = bias.abs() / (2**30 * input_grid.scale)
    if not (needed > grid.scale).any():
        return grid
    zero_point = grid.zero_point.expand(needed.shape).contiguous()
    return Grid(torch.maximum(grid.scale, needed), zero_point, grid.low, grid.high, axis)


def _pack(codes: np.ndarray) -> bytes:
    """Pack 4-bit codes two to a byte, the first in the lower half."""
    flat = codes.astype(np.uint8).ravel() & 15
    flat = np.pad(flat, (0, flat.size % 2))
    return (flat[::2] | flat[1::2] << 4).tobytes()
