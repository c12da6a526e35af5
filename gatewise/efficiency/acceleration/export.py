"""ONNX export: write a network as a file for other runtimes, and check it against the network before it is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.fold import fold
from gatewise.efficiency.inputs import check_example, check_inference, run
from gatewise.errors import Failure
from gatewise.files import temporary_folder

TOLERANCE = 1e-4
"""Largest accepted difference of onnxruntime's output from the network's, over the largest output."""

LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights that fit into the file, since protobuf ends at 2 GiB. Larger weights go into a second file."""

INPUT, OUTPUT = "images", "output"


@dataclass(frozen=True)
class ExportReport:
    """An exported file and the result of its check.

    Attributes:
        files: files written; for networks above 2 GiB a second one holds the weights.
        error: largest relative error of onnxruntime against the network, over all `batch_sizes` checked.
        dynamic_batch: whether the file accepts any number of samples.
    """

    files: tuple[Path, ...]
    bytes: int
    opset: int
    input_shape: tuple[int | str, ...]
    output_shape: tuple[int | str, ...]
    dynamic_batch: bool
    batch_sizes: tuple[int, ...]
    error: float


def export_onnx(model: nn.Module, path: str | Path, example: Tensor, dynamic_batch: bool = True) -> ExportReport:
    """Write the folded network as ONNX. The file must pass a run in onnxruntime before it replaces what is at `path`.

    Args:
        example: a batch as the network takes it; its shape, except for the number of samples, becomes the file's.
        dynamic_batch: let the file accept any number of samples; another number than the example's is checked too.
    Raises:
        ValueError: if the network is in training mode or cannot run on the example, or the path's folder is missing.
        Failure: if an operator has no ONNX form (the message names it), the file's outputs differ from the network's,
            or the file cannot be written.
    """
    path = Path(path)
    check_inference(model, "export")
    check_example(model, example)
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {path} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as {path / 'network.onnx'}")
    batches = [example, torch.cat([example, example[:1]])] if dynamic_batch else [example]
    expected = [run(model, batch) for batch in batches]
    program = _to_onnx(fold(model), example, dynamic_batch)
    try:
        # A folder beside the target keeps the final renames within one file system, and so atomic.
        with temporary_folder(path) as folder:
            written = _save(program, model, folder / path.name)
            error = _check(written[0], batches, expected)
            shapes = _shapes(program)
            size = sum(file.stat().st_size for file in written)
            # Weights first: the file that refers to them appears last.
            for file in reversed(written):
                os.replace(file, path.parent / file.name)
    except OSError as failure:
        raise Failure(f"cannot write {path}: {failure.strerror or failure}") from failure
    return ExportReport(
        files=tuple(path.parent / file.name for file in written),
        bytes=size,
        opset=program.model.opset_imports[""],
        input_shape=shapes[0],
        output_shape=shapes[1],
        dynamic_batch=dynamic_batch,
        batch_sizes=tuple(batch.shape[0] for batch in batches),
        error=error,
    )


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """Return the network as the bytes of an ONNX file for any batch size.

    Raises:
        Failure: if an operator has no ONNX form (the message names it), or the weights are too large for one file.
    """
    if _weight_bytes(model) > LARGEST_FILE:
        raise Failure("a network of more than 2 GiB does not fit into one ONNX file in memory")
    buffer = BytesIO()
    _to_onnx(model, example, dynamic_batch=True).save(buffer)
    return buffer.getvalue()


def onnx_session(model: bytes | Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Return a thread-safe function that runs an ONNX model on the CPU, float32 batch in, output out.

    Raises:
        Failure: if onnxruntime rejects the model. The function raises it too.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Workers spin for quick starts within a run. After it they must not, or they would take the cores from others.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        # onnxruntime raises a dozen kinds of errors, whose only common base is Exception.
        raise Failure(f"onnxruntime rejects the network: {_first_line(error)}") from error
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise Failure(f"the network must have one input and one output, not {len(inputs)} and {len(outputs)}")
    name = inputs[0].name

    def call(x: Tensor) -> Tensor:
        try:
            (output,) = session.run(None, {name: x.contiguous().numpy()})
        except Exception as error:
            # As above.
            raise Failure(f"onnxruntime cannot run the network: {_first_line(error)}") from error
        return torch.from_numpy(output)

    return call


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _to_onnx(model: nn.Module, example: Tensor, dynamic_batch: bool) -> Any:
    # The exporter would treat a single sample as a constant of the network.
    batch = torch.cat([example, example[:1]]) if dynamic_batch and example.shape[0] == 1 else example
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with torch.no_grad():
            return torch.onnx.export(
                model,
                (batch,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise Failure(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """Return one line that names the operator, if the exporter's message (or that of its cause) does."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(chain)
    missing = re.search(r"No (?:ONNX function|decompositions?) .*?OpOverload\(op='([^']+)'", text) or re.search(
        r"OpOverload\(op='([^']+)'", text
    )
    if missing:
        return f"ONNX has no form of the operator {missing[1]}; replace the module that uses it before exporting"
    first = next((line.strip() for line in chain[-1].splitlines() if line.strip()), type(error).__name__)
    return f"the network cannot be exported to ONNX: {first}"


def _save(program: Any, model: nn.Module, target: Path) -> list[Path]:
    external = _weight_bytes(model) > LARGEST_FILE
    program.save(target, external_data=external)
    return [target, *sorted(target.parent.glob(f"{target.name}.*"))]


def _check(file: Path, batches: list[Tensor], expected: list[Tensor]) -> float:
    session = onnx_session(file, torch.get_num_threads())
    worst = 0.0
    for batch, output in zip(batches, expected, strict=True):
        found = session(batch.cpu())
        scale = output.abs().max().clamp_min(torch.finfo(output.dtype).tiny).item()
        error = (found - output.cpu()).abs().max().item() / scale if found.shape == output.shape else float("inf")
        if not error <= TOLERANCE:
            raise Failure(
                f"the exported network differs from the original by {error:.1e} on {batch.shape[0]} samples, more than "
                f"{TOLERANCE:g}; nothing was written"
            )
        worst = max(worst, error)
    return worst


def _shapes(program: Any) -> tuple[tuple[int | str, ...], tuple[int | str, ...]]:
    def shape(value: Any) -> tuple[int | str, ...]:
        return tuple(size if isinstance(size, int) else str(size) for size in value.shape)

    graph = program.model.graph
    return shape(graph.inputs[0]), shape(graph.outputs[0])


def _weight_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
