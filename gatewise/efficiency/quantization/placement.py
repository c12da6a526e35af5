"""Decide which tensors become integer codes, and which of them share a grid.

Integer kernels read and write codes, so codes are placed around them: around every convolution with the ReLU after it,
every product with a weight, and every sum, product, pool and concatenation between two of those. Operators without an
integer kernel (norms, GELU, softmax) stay float, and their results become codes where a kernel needs them. onnxruntime
and OpenVINO turn this placement into integer kernels.

Operators that only move values (max pools, reshapes, splits) keep their input's grid, and the parts of a concatenation
share one: Krishnamoorthi 2018, arXiv:1806.08342, section 2.4. Averages get their own grid, where the paper's kernels
keep that of the input: they are much smaller than their largest summand, and would keep few codes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gatewise.efficiency.quantization.graph import WEIGHTED, Graph, attribute

if TYPE_CHECKING:
    from onnx import NodeProto

POINTWISE = ("Add", "Mul")
"""Sums and products of two activations have integer kernels; with a constant they stay float."""

MOVES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice")
"""Operators that move values without changing them."""

ACTIVATIONS = ("Sigmoid", "LeakyRelu", "HardSwish", "HardSigmoid", "Relu", "Clip")
"""Functions of one value whose results become codes, with their own grid, if their inputs are codes."""

TABLES = ("Sigmoid", "LeakyRelu")
"""The subset with an integer kernel: a table of 256 entries."""

AVERAGES = ("GlobalAveragePool", "AveragePool")
CLAMPS = ("Relu", "Clip")

_REASONS = {
    "BatchNormalization": "a batch norm without a convolution to fold it into",
    **dict.fromkeys((*POINTWISE, *AVERAGES, *CLAMPS, "Concat"), "no integer kernel before it, or a norm's product"),
}

FIXED_RANGES = {"Sigmoid": (0.0, 255 / 256)}
"""Ranges of operators that do not depend on the input: a sigmoid's grid has scale 1/256 and zero point 0."""


@dataclass(frozen=True)
class Placement:
    """The tensors and layers that become integers.

    Attributes:
        roots: tensors of codes, each with the tensor that its grid is named after.
        layers: weighted nodes that run as integers, by layer name.
        clamped: outputs before a ReLU or clip, with the output after it; one integer kernel computes both.
        floats: what stays float, by name, with the reason.
    """

    roots: dict[str, str]
    layers: dict[str, NodeProto]
    clamped: dict[str, str]
    floats: dict[str, str] = field(default_factory=dict)

    def members(self, root: str) -> list[str]:
        """Return the tensors that share a grid."""
        return [tensor for tensor, own in self.roots.items() if own == root]


def place(graph: Graph, skip: Collection[str] = (), only: Collection[str] | None = None) -> Placement:
    """Return the placement for a graph.

    Args:
        skip: layers that stay float.
        only: layers that become integers, with nothing else; None for everything possible.
    """
    return _Placer(graph, set(skip), None if only is None else set(only)).place()


class _Placer:
    def __init__(self, graph: Graph, skip: set[str], only: set[str] | None) -> None:
        self.graph, self.skip, self.only = graph, skip, only
        self.parent: dict[str, str] = {}
        self.integer: set[str] = set()
        self.layers: dict[str, NodeProto] = {}
        self.clamped: dict[str, str] = {}
        self.floats: dict[str, str] = {}

    def place(self) -> Placement:
        behind = set()
        for node in self.graph.nodes:
            if node.output[0] in behind:
                continue
            if self._visit(node):
                end = self._clamp_behind(node)
                if end is not None:
                    behind.add(end)
        roots = {tensor: self._root(tensor) for tensor in self.parent}
        return Placement(roots, self.layers, self.clamped, self.floats)

    def _visit(self, node: NodeProto) -> bool:
        """Place one node, and return whether an integer kernel produces its output."""
        name = self.graph.names[node.output[0]]
        if node.op_type in WEIGHTED:
            return self._visit_weighted(node, name)
        inputs = [tensor for tensor in node.input if self.graph.is_activation(tensor)]
        arrives = [tensor in self.integer for tensor in inputs]
        if self.only is not None or not inputs:
            return False
        if node.op_type in MOVES and arrives[0]:
            for output in node.output:
                self._share(inputs[0], output)
                self.integer.add(output)
            return True
        if node.op_type in AVERAGES and arrives[0]:
            return self._through(node, inputs)
        if node.op_type in ACTIVATIONS and arrives[0]:
            if node.op_type not in TABLES:
                self.floats[name] = f"{node.op_type} has no integer kernel"
            return self._through(node, inputs)
        if node.op_type in POINTWISE and len(inputs) == 2 and any(arrives) and not self._divides(inputs):
            return self._through(node, inputs)
        if node.op_type == "Concat" and any(arrives):
            for tensor in inputs:
                self._share(tensor, node.output[0])
            return self._through(node, inputs)
        if node.op_type not in MOVES:
            self.floats[name] = _REASONS.get(node.op_type, f"{node.op_type} has no integer kernel")
        return False

    def _visit_weighted(self, node: NodeProto, name: str) -> bool:
        weight = self.graph.weight(node)
        if weight is None or not self.graph.is_activation(node.input[0]):
            self.floats[name] = f"{node.op_type} of two activations"
            return False
        if name in self.skip or (self.only is not None and name not in self.only):
            self.floats[name] = "kept float on request"
            return False
        if node.op_type == "Gemm" and (
            attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0)
        ):
            self.floats[name] = "Gemm with factors, or a transposed input"
            return False
        if node.op_type == "MatMul" and weight.values.ndim != 2:
            self.floats[name] = "MatMul with a stack of matrices"
            return False
        self.layers[name] = node
        self._add(node.input[0])
        if node.op_type != "Conv":
            # Kernels for matrix products return float results at no cost, which the next operator mostly needs.
            return False
        return self._through(node, [])

    def _divides(self, inputs: list[str]) -> bool:
        """Return whether a factor is a reciprocal. Divisors of norms span more orders of magnitude than codes do."""
        producers = [self.graph.producers[tensor] for tensor in inputs if tensor in self.graph.producers]
        return any(node.op_type == "Reciprocal" for node in producers)

    def _through(self, node: NodeProto, inputs: list[str]) -> bool:
        for tensor in inputs:
            self._add(tensor)
        end = self._clamp_behind(node) or node.output[0]
        self._add(end)
        self.integer.add(end)
        if end != node.output[0]:
            self.clamped[node.output[0]] = end
        return True

    def _clamp_behind(self, node: NodeProto) -> str | None:
        """Return the output of the ReLU or clip that is the only reader of this node's output."""
        output = node.output[0]
        readers = self.graph.consumers.get(output, [])
        if node.op_type in MOVES or len(readers) != 1 or output in self.graph.outputs:
            return None
        return readers[0].output[0] if readers[0].op_type in CLAMPS else None

    def _add(self, tensor: str) -> None:
        self.parent.setdefault(tensor, tensor)

    def _root(self, tensor: str) -> str:
        while self.parent[tensor] != tensor:
            tensor = self.parent[tensor]
        return tensor

    def _share(self, first: str, second: str) -> None:
        self._add(first)
        self._add(second)
        self.parent[self._root(second)] = self._root(first)
