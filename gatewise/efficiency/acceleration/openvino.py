"""Run ONNX models on the CPU with OpenVINO, where it is installed (`pip install 'gatewise[openvino]'`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from gatewise.errors import Failure

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def openvino_installed() -> bool:
    return find_spec("openvino") is not None


def openvino_sessions(
    model: bytes, shape: Sequence[int], threads: int, count: int = 1, dtype: torch.dtype = torch.float32
) -> list[Callable[[Tensor], Tensor]]:
    """Return functions that run an ONNX model on the CPU for batches of one shape, with float32 output.

    They share the weights and the `threads` threads, `threads / count` each. All `count` of them may run at a time, but
    none of them twice.

    Args:
        dtype: data type of the computation. bfloat16 is slow on processors without instructions for it.
    Raises:
        Failure: if OpenVINO is not installed, or rejects the model.
    """
    if not openvino_installed():
        raise Failure("OpenVINO is not installed: pip install 'gatewise[openvino]'")
    import openvino

    # Threads pinned to cores would wait for whatever else runs there.
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": count,
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "ENABLE_CPU_PINNING": False,
    }
    try:
        core = openvino.Core()
        network = core.read_model(model)
        network.reshape(list(shape))
        compiled = core.compile_model(network, "CPU", options)
    except Exception as error:
        # OpenVINO's readers and plugins raise all kinds of errors, over many lines.
        raise Failure(f"OpenVINO rejects the network: {_last_line(error)}") from error

    def session() -> Callable[[Tensor], Tensor]:
        request = compiled.create_infer_request()

        def call(x: Tensor) -> Tensor:
            # Inputs are read without a copy; outputs are copied, because the next call overwrites them.
            try:
                return torch.from_numpy(request.infer([x.contiguous().numpy()], share_inputs=True)[0])
            except RuntimeError as error:
                raise Failure(f"OpenVINO cannot run the network: {_last_line(error)}") from error

        return call

    return [session() for _ in range(count)]


def _last_line(error: Exception) -> str:
    """Return the reason, which follows the locations in OpenVINO's code that it went through."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
