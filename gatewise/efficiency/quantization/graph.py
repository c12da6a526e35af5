"""The float network as an ONNX graph ready for quantization: named layers, and averages as pools."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Operators with integer kernels whose second input is a weight."""

_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Weight:
    """A weighted node's constant: its values and the axis of its output channels."""

    values: np.ndarray
    axis: int


class Graph:
    """A float ONNX model with the lookups needed to quantize it. The model is not changed after construction."""

    def __init__(self, model: bytes) -> None:
        """Read a model as `gatewise.efficiency.acceleration.export.onnx_bytes` writes it."""
        import onnx

        self.model: ModelProto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in self.model.graph.initializer}
        _means_to_pools(self)
        # Removing entries shifts the others.
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}

    @property
    def nodes(self) -> list[NodeProto]:
        return list(self.model.graph.node)

    @property
    def input(self) -> str:
        return self.model.graph.input[0].name

    @property
    def outputs(self) -> set[str]:
        return {value.name for value in self.model.graph.output}

    @cached_property
    def producers(self) -> dict[str, NodeProto]:
        return {output: node for node in self.nodes for output in node.output}

    @cached_property
    def consumers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    def constant(self, name: str) -> np.ndarray:
        """Return the values of a constant."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def is_activation(self, name: str) -> bool:
        """Return whether this tensor depends on the input, so is neither a constant nor an omitted input."""
        return name == self.input or name in self.producers

    def weight(self, node: NodeProto) -> Weight | None:
        """Return the node's weight, if it is an operator of `WEIGHTED` with a constant one."""
        if node.op_type not in WEIGHTED or node.input[1] not in self.constants:
            return None
        values = self.constant(node.input[1])
        if node.op_type == "Gemm":
            return Weight(values, 0 if attribute(node, "transB", 0) else 1)
        return Weight(values, 0 if node.op_type == "Conv" else values.ndim - 1)

    def layers(self) -> dict[str, NodeProto]:
        """The weighted nodes by the paths of their modules, in order."""
        return {self.names[node.output[0]]: node for node in self.nodes if self.weight(node) is not None}

    @cached_property
    def names(self) -> dict[str, str]:
        """Readable name of each tensor: the path of the module that outputs it.

        If a module holds several nodes, its weighted one gets the plain path, and the others append the operation's
        name. If an operation became several nodes, the last one gets the name, and the inner ones append what they do
        (the sigmoid of a SiLU). A mean that became a pool and a reshape has one name.
        """
        paths = {node.output[0]: _scopes(node) for node in self.nodes if node.output}
        often = Counter(path for path, _ in paths.values())
        weighted = Counter(paths[node.output[0]][0] for node in self.nodes if self.weight(node) is not None)
        last = {paths[node.output[0]]: node.output[0] for node in self.nodes}
        names = {self.input: self.input}
        for node in self.nodes:
            path, operation = paths[node.output[0]]
            if last[path, operation] != node.output[0] and node.op_type not in (*WEIGHTED, "GlobalAveragePool"):
                operation = f"{operation}.{node.op_type.lower()}"
            alone = often[path] == 1 or (weighted[path] == 1 and self.weight(node) is not None)
            own = path if path and alone else ".".join(part for part in (path, operation) if part)
            for position, output in enumerate(node.output):
                names[output] = own if position == 0 else f"{own}:{position}"
        return names


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default if it is omitted."""
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def drop_unread(model: ModelProto) -> None:
    """Remove the constants that nothing reads."""
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _scopes(node: NodeProto) -> tuple[str, str]:
    """Return the path of the module that a node comes from, and the name of the operation in it."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if text is None:
        return "", node.name or node.output[0]
    *modules, operation = ast.literal_eval(text)
    return (modules[-1] if modules else ""), operation


def _means_to_pools(graph: Graph) -> None:
    """Replace averages over height and width by global pools, for which there is an integer kernel."""
    from onnx import helper

    shapes = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.model.graph.value_info}
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        if not _averages_positions(graph, node, shapes):
            nodes.append(node)
            continue
        keeps = bool(attribute(node, "keepdims", 1))
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        new = [helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=f"{node.name}_pool")]
        if not keeps:
            new.append(helper.make_node("Flatten", [pooled], list(node.output), name=f"{node.name}_flatten", axis=1))
        for made in new:
            made.metadata_props.extend(node.metadata_props)
        nodes += new
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    drop_unread(graph.model)


def _averages_positions(graph: Graph, node: NodeProto, ranks: dict[str, int]) -> bool:
    if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4 or len(node.input) < 2:
        return False
    if node.input[1] not in graph.constants:
        return False
    return sorted(axis % 4 for axis in graph.constant(node.input[1]).tolist()) == [2, 3]
