"""Untrusted ONNX files, and the checksum that detects damage, which ONNX itself lacks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gatewise.efficiency._fields import SMALLEST
from gatewise.errors import UserError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

CHECKSUM = "gatewise.sha256"
"""Key of the checksum in a file's metadata, where it is the last entry."""

_DOMAINS = ("", "ai.onnx")


def read_onnx(content: bytes, what: str) -> ModelProto:
    """Return a self-contained model: standard operators only, with all of its weights inside.

    Args:
        content: bytes of the file.
        what: the file's name in error messages.
    Raises:
        UserError: if it is not ONNX, stores data in other files, or needs custom operators.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(content)
    # For a field that is not UTF-8 some versions of protobuf raise UnicodeDecodeError.
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what} is not an ONNX file, or is damaged: {' '.join(str(error).split())}") from error
    own = {(function.domain, function.name) for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in own:
            raise UserError(
                f"{what} is not accepted: its operator {node.op_type!r:.80} is of the domain {node.domain!r:.80}"
            )
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise UserError(f"{what} is not accepted: its tensor {tensor.name!r:.80} is in another file")
    return model


def with_checksum(content: bytes) -> bytes:
    """Return the file with its checksum appended as one more metadata entry."""
    # Protobuf messages can be concatenated: entries of repeated fields add up.
    return content + _entry(hashlib.sha256(content).hexdigest())


def require_checksum(content: bytes, what: str) -> None:
    """Compare a file with the checksum at its end.

    Args:
        content: as `with_checksum` returns it.
        what: the file's name in error messages.
    Raises:
        UserError: if there is no checksum, or it differs.
    """
    length = len(_entry(64 * "0"))
    body, entry = content[:-length], content[-length:]
    if CHECKSUM.encode() not in entry:
        raise UserError(f"{what} is damaged, or from an earlier version: it does not end in its checksum")
    if entry != _entry(hashlib.sha256(body).hexdigest()):
        raise UserError(f"{what} is damaged: its content does not agree with its checksum")


def check_quantized(model: ModelProto, shape: Sequence[int], what: str) -> None:
    """Check a quantized network against the shape of a sample, and check all of its scales.

    Args:
        model: as `read_onnx` returns it.
        shape: shape of one sample.
        what: the file's name in error messages.
    Raises:
        UserError: if it takes anything but batches of float32 samples, has more than one output, or has codes without a
            positive, finite scale and a zero point.
    """
    import onnx

    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise UserError(f"{what} is not accepted: it must have one input and one output")
    kind = model.graph.input[0].type.tensor_type
    sizes = [size.dim_value for size in kind.shape.dim]
    if kind.elem_type != onnx.TensorProto.FLOAT or sizes[1:] != list(shape):
        raise UserError(f"{what} is not accepted: it takes samples of shape {sizes[1:]}, and its report says {shape}")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            _check_scale(node, constants, what)


def _check_scale(node: NodeProto, constants: Mapping[str, TensorProto], what: str) -> None:
    import numpy as np

    if len(node.input) != 3 or not {*node.input[1:]} <= constants.keys():
        raise UserError(f"{what} is not accepted: its node {node.name!r:.80} has no constant scale and zero point")
    scale, zero_point = (_array(constants[name], what) for name in node.input[1:])
    lowest = SMALLEST if node.op_type == "QuantizeLinear" else 0.0
    if scale.dtype != np.float32 or scale.shape != zero_point.shape or scale.ndim > 1:
        raise UserError(f"{what} is not accepted: the scale {node.input[1]!r:.80} does not fit its zero point")
    if not (np.isfinite(scale) & (scale >= lowest)).all():
        raise UserError(f"{what} is not accepted: the scale {node.input[1]!r:.80} must be positive and finite")
    if scale.ndim and node.input[0] in constants:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        sizes = list(constants[node.input[0]].dims)
        if not 0 <= axis < len(sizes) or sizes[axis] != scale.size:
            raise UserError(f"{what} is not accepted: the scale {node.input[1]!r:.80} does not fit its codes")


def _array(tensor: TensorProto, what: str) -> Any:
    from onnx import numpy_helper

    try:
        return numpy_helper.to_array(tensor)
    # Sizes that disagree with the data, or an unknown data type.
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{what} is damaged in its tensor {tensor.name!r:.80}: {error}") from error


def _entry(digest: str) -> bytes:
    import onnx

    entry = onnx.StringStringEntryProto(key=CHECKSUM, value=digest)
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Yield the model's graph and those inside of nodes. Parsing has limited how deep they are nested."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _nodes(model: ModelProto) -> Iterator[NodeProto]:
    for graph in _graphs(model):
        yield from graph.node


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in _graphs(model):
        # A function has no constants outside of its nodes.
        yield from getattr(graph, "initializer", ())
        sparse = list(getattr(graph, "sparse_initializer", ()))
        for node in graph.node:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)
