"""Turn a float network and batches into a graph that can be quantized in any placement.

The expensive steps (export, calibration) happen once. Every choice of integer and float layers is then written from the
same ranges. Quantizing a network takes one such choice; finding its sensitive layers takes many.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.export import onnx_bytes, onnx_session
from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.acceleration.runners import PIECE, Runner
from gatewise.efficiency.inputs import check_example, check_inference, run, takes_tokens
from gatewise.efficiency.quantization.calibration import Calibration, make_observer
from gatewise.efficiency.quantization.graph import Graph, attribute
from gatewise.efficiency.quantization.onnx_qdq import WeightScheme, runnable, write_codes, write_weights
from gatewise.efficiency.quantization.placement import FIXED_RANGES, Placement, place
from gatewise.errors import unknown_name
from gatewise.ops.quantize import Grid, affine_grid, code_range

Scheme = Literal["affine", "symmetric"]
Batches: TypeAlias = Tensor | Iterable[Any]


@dataclass(frozen=True)
class Options:
    """Quantization options.

    Attributes:
        scheme: quantization scheme of activations. "affine" spreads codes from the smallest to the largest value;
            "symmetric" has as many codes for negative as for positive values.
        bits: bits per activation, 2..8.
        weight_bits: bits per weight, 2..8; up to 4 bits are stored two to a byte, and run as 8.
        weight_scheme: quantization scheme of weights. "affine" is for weight-only files; integer kernels need
            "symmetric".
        weights_only: keep activations and all arithmetic in float.
        per_channel: use one scale per output channel of a weight instead of one per weight.
        activations: method of choosing ranges (`gatewise.efficiency.quantization.calibration`).
        reduce_range: use 7 bits for 8-bit weights, whose products overflow on processors that add them in 16 bits; None
            to use them only on such a processor.
        max_batches: number of calibration batches used at most; ranges hardly change after 100 (arXiv:1806.08342,
            section 3.1).
    """

    scheme: Scheme = "affine"
    bits: int = 8
    weight_bits: int = 8
    weight_scheme: Scheme = "symmetric"
    weights_only: bool = False
    per_channel: bool = True
    activations: Calibration = "min-max"
    reduce_range: bool | None = None
    max_batches: int = 100

    def __post_init__(self) -> None:
        for name in ("bits", "weight_bits", "max_batches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, not {value!r}")
        code_range(self.bits)
        code_range(self.weight_bits)
        for name in ("scheme", "weight_scheme"):
            if getattr(self, name) not in get_args(Scheme):
                raise ValueError(f"{name} must be one of {', '.join(get_args(Scheme))}, not {getattr(self, name)!r}")
        make_observer(self.activations, self.bits)
        if self.weight_scheme == "affine" and not self.weights_only:
            raise ValueError("affine weights have no integer kernels: take weights_only=True, or symmetric weights")
        if self.max_batches < 1:
            raise ValueError(f"max_batches must be 1 or more, not {self.max_batches}")

    @property
    def reduced(self) -> bool:
        """Whether 8-bit weights are reduced to 7 bits."""
        if self.weights_only or self.weight_bits < 8:
            return False
        return saturates_products() if self.reduce_range is None else self.reduce_range

    @property
    def weights(self) -> WeightScheme:
        """Return the rule for weights."""
        bits = self.weight_bits - 1 if self.reduced else self.weight_bits
        return WeightScheme(bits, self.per_channel, self.weight_scheme == "symmetric")


@dataclass(frozen=True)
class Written:
    """A quantized network as an ONNX file, and its contents.

    Attributes:
        onnx: the compact file as it is saved.
        layers: layers whose weights are codes.
        grids: grids of the tensors of codes, by name.
        floats: what stayed float, with the reason.
    """

    onnx: bytes
    layers: tuple[str, ...]
    grids: dict[str, Grid]
    floats: dict[str, str]

    def runnable(self, weights_only: bool) -> bytes:
        """Return the file as runtimes run it."""
        return runnable_bytes(self.onnx, weights_only)


def runnable_bytes(content: bytes, weights_only: bool) -> bytes:
    """Convert a saved file to the form that runtimes run (`onnx_qdq.runnable`)."""
    import onnx

    return runnable(onnx.load_from_string(content), weights_only).SerializeToString()


class Prepared:
    """A folded float network as a graph, with the range of every tensor that can become codes."""

    def __init__(self, graph: Graph, float_onnx: bytes, example: Tensor, options: Options) -> None:
        self.graph, self.float_onnx, self.example, self.options = graph, float_onnx, example, options
        self.ranges: dict[str, tuple[float, float]] = {}
        self.batches = 0
        self._activations: Mapping[str, Grid] = {}
        self._weights: Mapping[str, Grid] = {}

    @classmethod
    def of(cls, model: nn.Module, batches: Iterator[Tensor], options: Options) -> Prepared:
        """Export the folded network and calibrate it. Raises the errors of `gatewise.efficiency.quantize`."""
        check_inference(model, "quantizing")
        first = next(batches, None)
        if first is None:
            raise ValueError("there are no calibration batches; pass at least one")
        _check_network(model, first)
        float_onnx = onnx_bytes(fold(model), first[:1])
        prepared = cls(Graph(float_onnx), float_onnx, first, options)
        _warn_of_coarse_depthwise(prepared.graph, options)
        if options.weights_only:
            prepared.batches = 1
            return prepared
        prepared._calibrate(_chain(first, batches))
        return prepared

    @property
    def layers(self) -> list[str]:
        """The layers that can become integers."""
        return list(place(self.graph).layers)

    def check_layers(self, names: Collection[str]) -> None:
        """Raise UnknownNameError unless all names are layers of the network."""
        known = self.graph.layers()
        for name in names:
            if name not in known:
                raise unknown_name("layer", name, known)

    def set_ranges(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Replace ranges by tensor name.

        Raises:
            UnknownNameError: if a name does not belong to a tensor that becomes codes.
        """
        tensors: dict[str, list[str]] = {}
        for tensor in self.ranges:
            # A mean that became a pool and a reshape has one name.
            tensors.setdefault(self.graph.names[tensor], []).append(tensor)
        for name, (low, high) in ranges.items():
            if name not in tensors:
                raise unknown_name("tensor", name, tensors)
            self.ranges |= dict.fromkeys(tensors[name], (float(low), float(high)))

    def set_grids(self, activations: Mapping[str, Grid], weights: Mapping[str, Grid]) -> None:
        """Use these grids instead of those derived from ranges and weights.

        Args:
            activations: grids by tensor name.
            weights: grids by layer name, with one scale or one per output channel; their axis is determined here.
        Raises:
            UnknownNameError: if a name does not belong to a tensor that becomes codes, or to a layer.
        """
        self.check_layers(weights)
        known = {self.graph.names[tensor] for tensor in self.ranges}
        for name in activations:
            if name not in known:
                raise unknown_name("tensor", name, known)
        self._activations, self._weights = activations, weights

    def write(self, skip: Collection[str] = (), only: Collection[str] | None = None) -> Written:
        """Return the network with some of its layers as integers (`placement.place`)."""
        placement = place(self.graph, skip, only)
        if self.options.weights_only:
            model = write_weights(self.graph, placement, self._scheme)
            floats = {name: reason for name, reason in placement.floats.items() if name in self.graph.layers()}
            return Written(model.SerializeToString(), tuple(placement.layers), {}, floats)
        grids = self._grids(placement)
        model, refused = write_codes(self.graph, placement, grids, self._scheme)
        layers = tuple(name for name in placement.layers if name not in refused)
        named = {self.graph.names[tensor]: grids[root] for tensor, root in placement.roots.items()}
        return Written(model.SerializeToString(), layers, named, placement.floats | refused)

    @property
    def _scheme(self) -> WeightScheme:
        return replace(self.options.weights, given=self._weights)

    def _grids(self, placement: Placement) -> dict[str, Grid]:
        ends: dict[str, tuple[float, float]] = {}
        for tensor, root in placement.roots.items():
            low, high = self.ranges[tensor]
            before = ends.get(root, (low, high))
            ends[root] = min(low, before[0]), max(high, before[1])
        computed = {root: self._grid(*own, self.graph.names[root]) for root, own in ends.items()}
        return {root: self._activations.get(self.graph.names[root], grid) for root, grid in computed.items()}

    def _grid(self, low: float, high: float, name: str) -> Grid:
        """Return an unsigned grid. A symmetric one has its zero point in the middle, and omits the lowest code."""
        if self.options.scheme == "affine":
            return affine_grid(torch.tensor(low), torch.tensor(high), self.options.bits, name=name)
        smallest, largest = code_range(self.options.bits)
        middle = 2 ** (self.options.bits - 1)
        scale = affine_grid(torch.tensor(0.0), torch.tensor(max(-low, high)), self.options.bits, name=name).scale
        scale = scale * (largest / (largest - middle))
        return Grid(scale, torch.tensor(middle, dtype=torch.int32), smallest, largest)

    def _calibrate(self, batches: Iterator[Tensor]) -> None:
        tensors = list(place(self.graph).roots)
        observers = {tensor: make_observer(self.options.activations, self.options.bits) for tensor in tensors}
        look = _reader(self.graph, tensors)
        for batch in batches:
            for piece in batch.split(PIECE):
                for tensor, values in look(piece).items():
                    _check_finite(values, self.graph.names[tensor])
                    observers[tensor].observe(values)
            for observer in observers.values():
                observer.end_batch()
            self.batches += 1
        self.ranges = {tensor: observer.range() for tensor, observer in observers.items()}
        for tensor in tensors:
            kind = self.graph.producers[tensor].op_type if tensor in self.graph.producers else ""
            self.ranges[tensor] = FIXED_RANGES.get(kind, self.ranges[tensor])


def onnxruntime_runner(content: bytes) -> Runner:
    """Return a function that runs an ONNX model in onnxruntime, a few images at a time."""
    session = onnx_session(content, torch.get_num_threads())
    return lambda x: session(x) if x.shape[0] <= PIECE else torch.cat([session(part) for part in x.split(PIECE)])


def images_of(batches: Batches, limit: int) -> Iterator[Tensor]:
    """Yield the checked images of up to `limit` batches, without labels.

    Raises:
        TypeError, ValueError: if a batch is not a floating-point tensor with the first one's shape per sample.
    """
    shape: tuple[int, ...] | None = None
    for position, (images, _) in enumerate(pairs_of(batches)):
        if position == limit:
            return
        shape = tuple(images.shape[1:]) if shape is None else shape
        if tuple(images.shape[1:]) != shape or images.ndim < 2 or not images.numel():
            raise ValueError(
                f"calibration batch {position} must hold samples of shape {shape}, not be of shape "
                f"{tuple(images.shape)}"
            )
        yield images.detach()


def pairs_of(batches: Batches) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images and labels (None if absent) of each batch; a single tensor is one batch."""
    for batch in [batches] if isinstance(batches, Tensor) else batches:
        images, labels = (batch[0], batch[1]) if isinstance(batch, tuple | list) and len(batch) > 1 else (batch, None)
        images = images[0] if isinstance(images, tuple | list) and len(images) == 1 else images
        if not isinstance(images, Tensor):
            raise TypeError(
                f"calibration must give tensors, or pairs of images and labels, not {type(images).__name__}"
            )
        yield images, labels


def saturates_products() -> bool:
    """Return whether this processor adds pairs of 8-bit products in 16 bits: x86 without VNNI instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86"):
        return False
    return not torch.cpu._is_vnni_supported()


def _check_network(model: nn.Module, example: Tensor) -> None:
    if takes_tokens(model):
        raise ValueError("quantize takes networks of images; this one takes tokens")
    check_example(model, example)
    if example.device.type != "cpu" or example.dtype != torch.float32:
        raise ValueError(
            f"quantize takes a float32 network and batches on the CPU, not {example.dtype} on {example.device}"
        )
    run(model, example[:1])


def _warn_of_coarse_depthwise(graph: Graph, options: Options) -> None:
    if options.per_channel:
        return
    depthwise = [
        name
        for name, node in graph.layers().items()
        if node.op_type == "Conv" and 1 < attribute(node, "group", 1) == graph.constant(node.input[1]).shape[0]
    ]
    if depthwise:
        warnings.warn(
            f"one scale for all channels of depthwise convolutions ({depthwise[0]} and {len(depthwise) - 1} more): "
            "their ranges differ by orders of magnitude, and small ones lose all codes; per_channel=True is safe",
            stacklevel=4,
        )


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _reader(graph: Graph, tensors: list[str]) -> Any:
    """Return a function from a batch to the values of these tensors, in this order."""
    import onnx
    import onnxruntime

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    present = {output.name for output in model.graph.output}
    for tensor in tensors:
        if tensor not in present and tensor != graph.input:
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [tensor for tensor in tensors if tensor != graph.input]

    def look(images: Tensor) -> dict[str, np.ndarray]:
        values = images.contiguous().numpy()
        # An empty list of names would request all outputs.
        found = dict(zip(names, session.run(names, {graph.input: values}), strict=True)) if names else {}
        return {tensor: values if tensor == graph.input else found[tensor] for tensor in tensors}

    return look


def _check_finite(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        what = "NaN" if np.isnan(values).any() else "infinite values"
        raise ValueError(f"calibration saw {what} in {name}")
