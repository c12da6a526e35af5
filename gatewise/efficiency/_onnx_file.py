"""ONNX from outside, and the checksum that makes damage visible, which ONNX itself has none for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gatewise.errors import UserError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

CHECKSUM = "gatewise.sha256"
"""The key of the checksum in a file's metadata, whose last entry it is."""

_DOMAINS = ("", "ai.onnx")


def read_onnx(content: bytes, what: str) -> ModelProto:
    """Return a model that stands by itself: standard operators, and all of its weights inside.

    Args:
        content: the file.
        what: its name in error messages.
    Raises:
        UserError: if it is not ONNX, keeps data in other files, or needs operators from elsewhere.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_from_string(content)
    # A field that is no UTF-8 is a UnicodeDecodeError in some versions of protobuf.
    except (DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{what} is no ONNX file, or damaged: {' '.join(str(error).split())}") from error
    own = {function.domain for function in model.functions}
    for node in _nodes(model):
        if node.domain not in _DOMAINS and node.domain not in own:
            raise UserError(
                f"{what} is not accepted: its operator {node.op_type!r:.80} is of the domain {node.domain!r:.80}"
            )
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise UserError(f"{what} is not accepted: its tensor {tensor.name!r:.80} is in another file")
    return model


def with_checksum(content: bytes) -> bytes:
    """Return the file with its checksum appended, as one more entry of its metadata."""
    # The parts of a message in protobuf's encoding may be joined: entries of repeated fields add up.
    return content + _entry(hashlib.sha256(content).hexdigest())


def require_checksum(content: bytes, what: str) -> None:
    """Compare a file with the checksum at its end.

    Args:
        content: as `with_checksum` returns it.
        what: the file's name in error messages.
    Raises:
        UserError: if there is none, or it is another one.
    """
    length = len(_entry(64 * "0"))
    body, entry = content[:-length], content[-length:]
    if CHECKSUM.encode() not in entry:
        raise UserError(f"{what} is damaged, or from an earlier version: it does not end in its checksum")
    if entry != _entry(hashlib.sha256(body).hexdigest()):
        raise UserError(f"{what} is damaged: its content does not agree with its checksum")


def _entry(digest: str) -> bytes:
    import onnx

    entry = onnx.StringStringEntryProto(key=CHECKSUM, value=digest)
    return onnx.ModelProto(metadata_props=[entry]).SerializeToString()


def _graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The model's graph and those inside of nodes. Parsing has bounded how deep they are nested."""
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
