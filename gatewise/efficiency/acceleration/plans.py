"""The plans that `optimize` tries: ways to run one network faster on its device.

A plan turns a folded network into a runner: a function from a float32 batch of any size to a float32 output. If a
runner works for only one batch size, other sizes are split into chunks of that size (`in_pieces`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatewise.efficiency.acceleration.block_fusion import fused_blocks
from gatewise.efficiency.acceleration.export import onnx_session
from gatewise.efficiency.acceleration.openvino import openvino_installed, openvino_sessions
from gatewise.efficiency.acceleration.plan import Plan, PlanContext
from gatewise.efficiency.acceleration.rewrite import linears_to_convolutions, unroll_depthwise
from gatewise.efficiency.acceleration.runners import PIECE, NotApplicableError, Runner, in_pieces
from gatewise.efficiency.quantization.quantize import quantized_from

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory format of images and clips, by number of axes."""


def default_plans(precision: str, example: Tensor) -> list[Plan]:
    """Return the plans worth trying for this precision, device and batch, most promising per build time first."""
    on_cpu = example.device.type == "cpu"
    batch = example.shape[0]
    # On a CPU, running a batch larger than a piece at once is less promising.
    sizes = [PIECE, batch] if on_cpu and batch > PIECE else [batch]
    dtypes = [torch.float32] if precision == "float32" else [torch.bfloat16, torch.float32]
    plans = []
    if on_cpu and precision == "int8":
        plans += [
            Plan(f"int8, {name}", partial(integers, runtime=name), "int8", f"int8-{name}")
            for name in ("openvino", "onnxruntime")
        ]
    if on_cpu:
        for dtype in dtypes:
            name, key = f"openvino{_suffix(dtype)}", f"openvino{_key(dtype)}"
            one, many = f"{name}, one thread", f"{name}, an image per thread"
            plans.append(Plan(name, partial(openvino_session, dtype=dtype), "onnx", key))
            plans.append(Plan(many, partial(openvino_per_thread, dtype=dtype), "onnx", f"{key}-image-per-thread"))
            plans.append(Plan(one, partial(openvino_one_thread, dtype=dtype), "onnx", f"{key}-one-thread"))
        plans.append(Plan("onnxruntime", onnxruntime_session, "onnx", "onnxruntime"))
        many = "onnxruntime, an image per thread"
        plans.append(Plan(many, onnxruntime_per_thread, "onnx", "onnxruntime-image-per-thread"))
    plans += [_compiled_plan(dtype, sizes[0], batch, unroll=False) for dtype in dtypes]
    plans.append(Plan("eager, folded", lambda context: context.folded, key="eager-folded"))
    plans += [
        Plan(
            f"eager, channels-last{_suffix(dtype)}",
            partial(eager, dtype=dtype),
            key=f"eager-channels-last{_key(dtype)}",
        )
        for dtype in dtypes
    ]
    plans += [_compiled_plan(dtype, size, batch, unroll=False) for size in sizes[1:] for dtype in dtypes]
    if on_cpu:
        plans += [
            Plan(f"blocks fused{_suffix(dtype)}", partial(fused_blocks, dtype=dtype), "modules") for dtype in dtypes
        ]
    if on_cpu:
        plans += [_compiled_plan(dtype, sizes[0], batch, unroll=True) for dtype in dtypes]
    return plans


def _compiled_plan(dtype: torch.dtype, size: int, batch: int, unroll: bool) -> Plan:
    pieces = f", pieces of {size}" if size < batch else ""
    taps = ", depthwise by taps" if unroll else ""
    key = f"compiled{_key(dtype)}{f'-pieces-{size}' if pieces else ''}{'-taps' if unroll else ''}"
    name = f"compiled{_suffix(dtype)}{pieces}{taps}"
    return Plan(name, partial(compiled, dtype=dtype, size=size, unroll=unroll), key=key)


def _key(dtype: torch.dtype) -> str:
    return "-bf16" if dtype is torch.bfloat16 else ""


def _suffix(dtype: torch.dtype) -> str:
    return " in bf16" if dtype is torch.bfloat16 else ""


def eager(context: PlanContext, dtype: torch.dtype) -> Runner:
    """Run the folded network in channels-last memory, with weights and activations of `dtype`."""
    if dtype is torch.float32 and context.example.ndim not in _CHANNELS_LAST:
        raise NotApplicableError("channels-last memory is for images and clips")
    network = deepcopy(context.folded).to(dtype)
    _to_channels_last(network, context.example)
    return _with_casts(network, dtype)


def compiled(context: PlanContext, dtype: torch.dtype, size: int, unroll: bool) -> Runner:
    """Run the folded network through `torch.compile` with frozen weights, for batches of `size`.

    The exported graph is compiled instead of the module. It carries no guards on hundreds of modules, has its own code
    object (the compiler keeps a bounded number of versions per code object), and can be rewritten.
    """
    # Imported lazily: the compiler takes as long to import as torch itself.
    from torch._inductor import config as inductor_config

    network = deepcopy(context.folded).to(dtype).requires_grad_(False)
    _to_channels_last(network, context.example)
    sample = _laid_out(_cast(context.example[:size], dtype))
    graph: Any = torch.export.export(network, (sample,)).module()
    if context.example.device.type == "cpu":
        linears_to_convolutions(graph)
    if unroll and not unroll_depthwise(graph):
        raise NotApplicableError("no small depthwise convolution")
    # Frozen weights are constants to the compiler, which packs them once for the kernels that it chose. Tracing and
    # compiling happen in the first call, and both read this setting; `options=` would only reach the second.
    with inductor_config.patch(freezing=True), torch.no_grad():
        function = torch.compile(graph, dynamic=False)
        function(sample)
    return in_pieces(_with_casts(function, dtype), size)


def onnxruntime_session(context: PlanContext) -> Runner:
    """Run onnxruntime with as many threads as torch uses."""
    session = onnx_session(context.onnx, torch.get_num_threads())
    return lambda x: session(x) if x.shape[0] <= PIECE else torch.cat([session(piece) for piece in x.split(PIECE)])


def onnxruntime_per_thread(context: PlanContext) -> Runner:
    """Spread images over torch's number of threads, each of which runs whole images, so that none waits for another."""
    threads = _threads_for_images(context.example)
    session = onnx_session(context.onnx, 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gatewise")
    return lambda x: torch.cat(list(pool.map(session, x.split(1))))


def integers(context: PlanContext, runtime: Literal["onnxruntime", "openvino"]) -> Runner:
    """Run weights and activations as 8-bit integers, in one of the runtimes that have kernels for them."""
    if runtime == "openvino":
        _needs_openvino()
    return quantized_from(context.int8, runtime)


def openvino_session(context: PlanContext, dtype: torch.dtype) -> Runner:
    """Run OpenVINO with as many threads as torch uses, in pieces of `PIECE` for larger batches."""
    _needs_openvino()
    size = min(context.example.shape[0], PIECE)
    shape = (size, *context.example.shape[1:])
    (session,) = openvino_sessions(context.onnx, shape, torch.get_num_threads(), dtype=dtype)
    return in_pieces(session, size)


def openvino_one_thread(context: PlanContext, dtype: torch.dtype) -> Runner:
    """Run OpenVINO on a single thread: in small networks, several threads cost more in waiting than they gain."""
    _needs_openvino()
    if torch.get_num_threads() == 1 or context.example.shape[0] > 1:
        raise NotApplicableError("is for one image where there are several threads")
    (session,) = openvino_sessions(context.onnx, context.example.shape, threads=1, dtype=dtype)
    return in_pieces(session, 1)


def openvino_per_thread(context: PlanContext, dtype: torch.dtype) -> Runner:
    """Like `onnxruntime_per_thread`, with one OpenVINO execution stream per thread."""
    _needs_openvino()
    threads = _threads_for_images(context.example)
    sessions = openvino_sessions(context.onnx, (1, *context.example.shape[1:]), threads, count=threads, dtype=dtype)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gatewise")

    def run(x: Tensor) -> Tensor:
        images = x.split(1)
        outputs: list[Tensor] = [x] * len(images)

        def work(first: int) -> None:
            for position in range(first, len(images), threads):
                outputs[position] = sessions[first](images[position])

        list(pool.map(work, range(threads)))
        return torch.cat(outputs)

    return run


def _needs_openvino() -> None:
    if not openvino_installed():
        raise NotApplicableError("OpenVINO is not installed: pip install 'gatewise[openvino]'")


def _threads_for_images(example: Tensor) -> int:
    threads = torch.get_num_threads()
    if example.shape[0] < 2 * threads or threads == 1:
        raise NotApplicableError("needs two images or more per thread, and more than one thread")
    return threads


def _with_casts(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Runner:
    return lambda x: run(_laid_out(_cast(x, dtype))).to(torch.float32)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast `x` to another dtype; tokens keep theirs."""
    return x.to(dtype) if x.is_floating_point() else x


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_CHANNELS_LAST.get(x.ndim, torch.contiguous_format))


def _to_channels_last(network: nn.Module, example: Tensor) -> None:
    if example.ndim not in _CHANNELS_LAST:
        return
    for parameter in network.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
