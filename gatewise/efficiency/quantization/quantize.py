"""Post-training quantization: integer weights and activations, run by integer kernels.

The network is folded, calibrated on a few batches without labels, and written as ONNX with integer codes: int8 weights
with one scale per output channel, uint8 activations with one scale per tensor, int32 biases and sums. onnxruntime (or
OpenVINO) runs the file with the processor's integer instructions. The file is a quarter of the float file's size.

With `weights_only` the file is as small, but all arithmetic is in float. Weights of 4 bits or fewer halve the file
again; they are widened to 8 bits when loaded, and run by the same kernels.

Source: Krishnamoorthi 2018, arXiv:1806.08342: quantizers section 2, post-training quantization section 3.1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gatewise.efficiency._fields import SMALLEST, read_fields
from gatewise.efficiency.acceleration.onnx_file import check_quantized, read_onnx, require_checksum, with_checksum
from gatewise.efficiency.acceleration.openvino import openvino_installed, openvino_sessions
from gatewise.efficiency.acceleration.runners import PIECE, Runner, in_pieces
from gatewise.efficiency.inputs import run
from gatewise.efficiency.quantization.calibration import Calibration
from gatewise.efficiency.quantization.prepare import (
    Batches,
    Options,
    Prepared,
    Scheme,
    Written,
    images_of,
    onnxruntime_runner,
    pairs_of,
    runnable_bytes,
)
from gatewise.efficiency.quantization.sensitivity import Evaluate, Judge, keep_worst_float
from gatewise.efficiency.timing.measure import measure
from gatewise.errors import Failure, UserError
from gatewise.files import parse_json, read_bytes, write_atomically
from gatewise.ops.quantize import MAX_BITS, MIN_BITS, signal_to_noise

Runtime = Literal["onnxruntime", "openvino", "fastest"]

_NAMES_SHOWN = 3

LARGEST_FILE = 2**31
"""Largest file that is read, in bytes: the limit of protobuf."""

HEADER = "gatewise.quantization"
"""Key of the report in the file's metadata."""


_LIMITS = {
    "bits": (MIN_BITS, MAX_BITS),
    "weight_bits": (MIN_BITS, MAX_BITS),
    "input_shape": (1, 2**40),
    "batches": (1, 2**53),
    "bytes_before": (1, 2**53),
    "bytes_after": (1, 2**53),
    "scale": (SMALLEST, 3.5e38),
    "zero_point": (0, 255),
    # Infinite if the outputs are equal, minus infinite if no signal is left.
    "noise_db": (-math.inf, math.inf),
    "loss": (-math.inf, math.inf),
}


@dataclass(frozen=True)
class TensorRange:
    """The codes of a tensor: the values that they can represent, and the encoding."""

    name: str
    minimum: float
    maximum: float
    scale: float
    zero_point: int


@dataclass(frozen=True)
class QuantizationReport:
    """Summary of a quantization: what became codes, how, and what stayed float.

    Attributes:
        input_shape: shape of one sample.
        batches: number of batches used to find ranges.
        bytes_before, bytes_after: sizes of the ONNX files.
        layers: layers whose weights are stored as codes.
        ranges: tensors that are stored as codes.
        floats: operations that stayed float, and why.
        noise_db: signal-to-quantization-noise ratio of the outputs for the first batch; infinite if they are equal.
        loss: loss that was compared with `max_loss`, if a limit was given.
    """

    scheme: Scheme
    bits: int
    weight_bits: int
    weight_scheme: Scheme
    weights_only: bool
    per_channel: bool
    activations: Calibration
    reduced_range: bool
    input_shape: tuple[int, ...]
    batches: int
    bytes_before: int
    bytes_after: int
    layers: tuple[str, ...]
    ranges: tuple[TensorRange, ...]
    floats: dict[str, str]
    noise_db: float
    loss: float | None = None

    @property
    def execution(self) -> str:
        """How the file is executed."""
        if self.weights_only:
            return "weights are dequantized when loaded; all arithmetic is float"
        if self.weight_bits <= 4:
            return "weights are widened to 8 bits when loaded; integer arithmetic"
        return "integer arithmetic"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], what: str = "the report") -> QuantizationReport:
        """Rebuild the report from the output of `to_dict`.

        Args:
            content: plain data, from JSON.
            what: name of the report in error messages.
        Raises:
            UserError: if a field is missing, unknown, of the wrong type or out of range. The message names the field.
        """
        return read_fields(cls, content, what, _LIMITS)

    def __str__(self) -> str:
        granularity = "per channel" if self.per_channel else "per tensor"
        weights = f"weights int{self.weight_bits} {self.weight_scheme} {granularity}"
        if self.reduced_range:
            weights += " (7 bits used: the processor has no VNNI instructions)"
        rest = "activations float" if self.weights_only else f"activations uint{self.bits} {self.scheme}"
        method = "" if self.weights_only else f", {self.activations} over {self.batches} batches"
        lines = [
            f"{weights}, {rest}{method}; {self.execution}",
            f"size {self.bytes_before / 2**20:.2f} -> {self.bytes_after / 2**20:.2f} MiB "
            f"({self.bytes_before / self.bytes_after:.2f}x smaller); output noise {self.noise_db:.1f} dB below signal",
            f"{len(self.layers)} layers quantized, {len(self.floats)} operations float",
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.floats.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            lines.append(f"  float: {', '.join(names[:_NAMES_SHOWN])}{more}: {reason}")
        return "\n".join(lines)


class QuantizedModel:
    """A quantized network on the CPU, without gradients: float32 batches in, integers inside, float32 outputs.

    Batches of any size are accepted. `report` says what was quantized; `onnx` holds the file's bytes.
    """

    def __init__(self, content: bytes, report: QuantizationReport, runtime: Runtime = "onnxruntime") -> None:
        """Build from a file's content and its report. Use `load_quantized` or `quantize` instead.

        Raises:
            ValueError: for an unknown runtime.
            Failure: if OpenVINO is requested but not installed.
        """
        if runtime not in get_args(Runtime):
            raise ValueError(f"runtime must be one of {', '.join(get_args(Runtime))}, not {runtime!r}")
        self.onnx, self.report = content, report
        self.runtime, self._runner = _start(runnable_bytes(content, report.weights_only), report.input_shape, runtime)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs for a batch.

        Raises:
            TypeError: if `x` is not a tensor.
            ValueError: if the shape per sample, the dtype or the device differs from the calibration's, if the batch is
                empty, or if it holds values that are not finite. Those have no codes, and the answer would look valid.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"a quantized network takes a torch.Tensor, not {type(x).__name__}")
        expected = self.report.input_shape
        if tuple(x.shape[1:]) != expected or x.shape[0] < 1:
            raise ValueError(f"this network was quantized for batches of {expected}, not for shape {tuple(x.shape)}")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"a quantized network takes float32 on the CPU, not {x.dtype} on {x.device}")
        with torch.no_grad():
            # NaN propagates to both ends. This is one pass over the input, cheap beside a whole network.
            if not all(math.isfinite(end) for end in x.aminmax()):
                raise ValueError("a quantized network takes finite values, and this batch holds NaN or infinite ones")
            return self._runner(x.detach())

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file with the report as JSON in its metadata. Any ONNX runtime can read it.

        Raises:
            ValueError: if the folder does not exist.
            Failure: if the file cannot be written.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist; create it first")
        write_atomically(path, lambda file: file.write(self.onnx))
        return path

    def as_module(self) -> nn.Module:
        """Return this network wrapped in a module, for code that needs one (evaluation loops)."""
        return _QuantizedModule(self)

    def __repr__(self) -> str:
        report = self.report
        return f"QuantizedModel({len(report.layers)} layers, {report.bytes_after / 2**20:.2f} MiB, {self.runtime})"


def quantize(
    model: nn.Module,
    calibration: Batches,
    *,
    scheme: Scheme = "affine",
    bits: int = 8,
    weight_bits: int = 8,
    weight_scheme: Scheme = "symmetric",
    weights_only: bool = False,
    per_channel: bool = True,
    activations: Calibration = "min-max",
    reduce_range: bool | None = None,
    max_batches: int = 100,
    skip: Collection[str] = (),
    max_loss: float | None = None,
    evaluate: Evaluate | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    runtime: Runtime = "onnxruntime",
) -> QuantizedModel:
    """Return `model` with integer weights and activations. `model` itself is not modified.

    Args:
        model: any image network in eval mode, float32, on the CPU, with one input and one output tensor.
        calibration: a batch, or batches, as the network takes them, with or without labels (`(images, labels)`).
        scheme: quantization scheme of activations, "affine" or "symmetric".
        bits: bits per activation, 2..8.
        weight_bits: bits per weight, 2..8; up to 4 bits are stored two to a byte, and run as 8.
        weight_scheme: quantization scheme of weights. "affine" is for weight-only files; integer kernels need
            "symmetric".
        weights_only: keep activations and all arithmetic in float.
        per_channel: use one scale per output channel of a weight instead of one per weight.
        activations: method of choosing ranges (`gatewise.efficiency.quantization.calibration`).
        reduce_range: use 7 of 8 weight bits, for processors that sum products in 16 bits; None to use them only on
            such a processor.
        max_batches: number of calibration batches used at most.
        skip: layers that stay float, by module path.
        max_loss: largest permitted loss. The most sensitive layers stay float until the loss is within it. The loss is
            that of `evaluate`'s score, or of accuracy if the batches have labels, or else the ratio of noise power to
            signal power of the outputs.
        evaluate: function that scores a network (a function of batches); higher is better.
        ranges: ranges by tensor name that replace the calibrated ones, for example from training.
        runtime: runtime to use; "fastest" times onnxruntime and, if installed, OpenVINO on one sample.
    Raises:
        TypeError: if calibration yields anything but tensors.
        ValueError: if the network is in training mode, on another device or in another dtype; if there are no batches,
            or their shapes differ; if values are not finite (names the layer); if bits are not integers in 2..8; or if
            a name does not exist.
        Failure: if an operator has no ONNX form, or the network exceeds the largest possible file.
    """
    options = Options(
        scheme=scheme,
        bits=bits,
        weight_bits=weight_bits,
        weight_scheme=weight_scheme,
        weights_only=weights_only,
        per_channel=per_channel,
        activations=activations,
        reduce_range=reduce_range,
        max_batches=max_batches,
    )
    if runtime not in get_args(Runtime):
        raise ValueError(f"runtime must be one of {', '.join(get_args(Runtime))}, not {runtime!r}")
    judge = None
    if max_loss is not None:
        if not max_loss >= 0:
            raise ValueError(f"max_loss must be 0 or more, not {max_loss}")
        # These batches are read more than once. Without a limit, batches are consumed as they come.
        calibration = _some(calibration, max_batches)
        judge = Judge(calibration, evaluate)
    prepared = Prepared.of(model, images_of(calibration, max_batches), options)
    prepared.check_layers(skip)
    prepared.set_ranges(ranges or {})
    if judge is None or max_loss is None:
        return finish(model, prepared, prepared.write(skip), runtime)
    written, loss = keep_worst_float(prepared, judge, max_loss, skip)
    return finish(model, prepared, written, runtime, loss)


def load_quantized(path: str | Path, runtime: Runtime = "onnxruntime") -> QuantizedModel:
    """Load a network that `QuantizedModel.save` wrote.

    Raises:
        ValueError: for an unknown runtime.
            UserError: if the file was not written by it, or is damaged.
            Failure: if the runtime cannot run it here.
    """
    return quantized_from(read_bytes(path, "quantized network", LARGEST_FILE), runtime, str(path))


def quantized_from(content: bytes, runtime: Runtime = "onnxruntime", name: str = "the file") -> QuantizedModel:
    """Like `load_quantized`, but from the bytes of a file, which errors call `name`."""
    model = read_onnx(content, name)
    header = next((entry.value for entry in model.metadata_props if entry.key == HEADER), None)
    if header is None:
        raise UserError(f"{name} was not written by QuantizedModel.save: it has no entry {HEADER!r}")
    require_checksum(content, name)
    what = f"the report in {name}"
    report = QuantizationReport.from_dict(parse_json(header, what, allow_nonfinite=True), what)
    check_quantized(model, report.input_shape, name)
    try:
        return QuantizedModel(content, report, runtime)
    except Failure as error:
        raise Failure(f"{name} cannot be run here: {error}") from error


class _QuantizedModule(nn.Module):
    """A quantized network wrapped in a module."""

    def __init__(self, network: QuantizedModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def finish(
    model: nn.Module, prepared: Prepared, written: Written, runtime: Runtime, loss: float | None = None
) -> QuantizedModel:
    """Build the network from its file, with a report that contains the file's own size."""
    options = prepared.options
    report = QuantizationReport(
        scheme=options.scheme,
        bits=options.bits,
        weight_bits=options.weight_bits,
        weight_scheme=options.weight_scheme,
        weights_only=options.weights_only,
        per_channel=options.per_channel,
        activations=options.activations,
        reduced_range=options.reduced,
        input_shape=tuple(prepared.example.shape[1:]),
        batches=prepared.batches,
        bytes_before=len(prepared.float_onnx),
        bytes_after=len(written.onnx),
        layers=written.layers,
        ranges=tuple(
            TensorRange(name, float(grid.minimum), float(grid.maximum), float(grid.scale), int(grid.zero_point))
            for name, grid in written.grids.items()
        ),
        floats=written.floats,
        noise_db=float("inf"),
        loss=loss,
    )
    quantized = QuantizedModel(written.onnx, report, runtime)
    example = prepared.example[:PIECE]
    report = replace(report, noise_db=signal_to_noise(run(model, example), quantized(example)))
    # The report is stored in the file whose size it states; a second pass gets the number of digits right.
    for _ in range(2):
        report = replace(report, bytes_after=len(_with_header(written.onnx, report)))
    quantized.onnx, quantized.report = _with_header(written.onnx, report), report
    return quantized


def _with_header(content: bytes, report: QuantizationReport) -> bytes:
    import onnx

    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, {HEADER: json.dumps(report.to_dict())})
    return with_checksum(model.SerializeToString())


def _some(batches: Batches, limit: int) -> list[Any]:
    return [pair for _, pair in zip(range(limit), pairs_of(batches), strict=False)]


def _start(content: bytes, shape: tuple[int, ...], runtime: Runtime) -> tuple[str, Runner]:
    """Return the runtime's name and a function that runs the network."""
    if runtime == "onnxruntime" or (runtime == "fastest" and not openvino_installed()):
        return "onnxruntime", onnxruntime_runner(content)
    if runtime == "openvino":
        return "openvino", _openvino(content, shape)
    runners = {"onnxruntime": onnxruntime_runner(content), "openvino": _openvino(content, shape)}
    timings = measure(runners, torch.zeros(1, *shape), budget_s=2.0, min_rounds=5)
    best = min(timings, key=lambda timing: timing.median).name
    return best, runners[best]


def _openvino(content: bytes, shape: tuple[int, ...]) -> Runner:
    (session,) = openvino_sessions(content, (1, *shape), torch.get_num_threads())
    return in_pieces(session, 1)
