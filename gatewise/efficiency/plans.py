"""The plans that `optimize` tries: ways to run one network faster on the device that it is on.

A plan turns a folded network into a runner: a function from a float32 batch of any size to a float32 output. Where a
runner exists for one batch size only, it serves other sizes in pieces of that size (`in_pieces`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from gatewise.efficiency.export import onnx_bytes, onnx_session
from gatewise.efficiency.fold import fold
from gatewise.efficiency.rewrite import linears_to_convolutions, unroll_depthwise

Runner = Callable[[Tensor], Tensor]

PIECE = 4
"""Images at a time, where a larger batch is cut: beyond it the activations of usual networks leave the caches, and
buffers grow past the size up to which the C library reuses memory without asking the system for fresh pages."""


class NotApplicableError(Exception):
    """The plan has nothing to do for this network, device or batch; the message says why."""


class Workshop:
    """The network that plans start from, and what several plans share."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.example = example

    @cached_property
    def folded(self) -> nn.Module:
        """The folded network; a plan that changes it takes a copy."""
        return fold(self.model)

    @cached_property
    def onnx(self) -> bytes:
        return onnx_bytes(self.folded, self.example)


@dataclass(frozen=True)
class Plan:
    """A way to run a network. `build` may raise anything; the plan then counts as failed, with the error as reason."""

    name: str
    build: Callable[[Workshop], Runner]


def default_plans(precision: str, example: Tensor) -> list[Plan]:
    """What is worth trying for this precision, device and batch, the most promising first."""
    on_cpu = example.device.type == "cpu"
    batch = example.shape[0]
    plans: list[Plan] = []
    if precision == "bf16":
        plans += _compiled_plans(torch.bfloat16, batch, on_cpu)
        plans.append(Plan("eager bf16", lambda shop: eager(shop, torch.bfloat16)))
    if on_cpu:
        plans.append(Plan("onnxruntime", onnxruntime_session))
        plans.append(Plan("onnxruntime, an image per thread", onnxruntime_per_thread))
    plans += _compiled_plans(torch.float32, batch, on_cpu)
    plans.append(Plan("eager, folded", lambda shop: shop.folded))
    plans.append(Plan("eager, channels-last", lambda shop: eager(shop, torch.float32)))
    return plans


def _compiled_plans(dtype: torch.dtype, batch: int, on_cpu: bool) -> list[Plan]:
    label = "compiled" if dtype is torch.float32 else "compiled bf16"
    sizes = [min(batch, PIECE), batch] if on_cpu and batch > PIECE else [batch]
    plans = []
    for size in sizes:
        pieces = f", pieces of {size}" if size < batch else ""
        unroll_choices = [True, False] if on_cpu else [False]
        for unroll in unroll_choices:
            name = label + (", depthwise by taps" if unroll else "") + pieces
            plans.append(Plan(name, _compiled_plan(dtype, size, unroll)))
    return plans


def _compiled_plan(dtype: torch.dtype, size: int, unroll: bool) -> Callable[[Workshop], Runner]:
    return lambda shop: compiled(shop, dtype, size, unroll)


def eager(shop: Workshop, dtype: torch.dtype) -> Runner:
    """The folded network in channels-last memory, with weights and activations of `dtype`."""
    if dtype is torch.float32 and shop.example.ndim != 4:
        raise NotApplicableError("channels-last memory is for images")
    network = deepcopy(shop.folded).to(dtype)
    _to_channels_last(network, shop.example)
    return _with_casts(network, dtype)


def compiled(shop: Workshop, dtype: torch.dtype, size: int, unroll: bool) -> Runner:
    """The folded network through `torch.compile` with frozen weights, for batches of `size`.

    The exported graph is compiled, not the module: it carries no guards on hundreds of modules, its code object is its
    own (the compiler keeps a bounded number of versions per code object), and it can be rewritten.
    """
    network = deepcopy(shop.folded).to(dtype).requires_grad_(False)
    _to_channels_last(network, shop.example)
    sample = _laid_out(shop.example[:size].to(dtype))
    graph: Any = torch.export.export(network, (sample,)).module()
    if shop.example.device.type == "cpu":
        linears_to_convolutions(graph)
    if unroll and not unroll_depthwise(graph):
        raise NotApplicableError("no small depthwise convolution")
    # Frozen weights are constants to the compiler, which packs them once for the kernels that it chose. Tracing and
    # compiling happen in the first call, and both read this setting; `options=` would reach the second alone.
    with inductor_config.patch(freezing=True), torch.no_grad():
        function = torch.compile(graph, dynamic=False)
        function(sample)
    return in_pieces(_with_casts(function, dtype), size)


def onnxruntime_session(shop: Workshop) -> Runner:
    """An onnxruntime session with as many threads as torch has."""
    session = onnx_session(shop.onnx, torch.get_num_threads())
    return lambda x: session(x) if x.shape[0] <= PIECE else torch.cat([session(piece) for piece in x.split(PIECE)])


def onnxruntime_per_thread(shop: Workshop) -> Runner:
    """Images spread over torch's number of threads, each of which runs whole images: no thread waits for another."""
    threads = torch.get_num_threads()
    if shop.example.shape[0] < 2 * threads or threads == 1:
        raise NotApplicableError("needs two images or more per thread, and more than one thread")
    session = onnx_session(shop.onnx, 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gatewise")
    return lambda x: torch.cat(list(pool.map(session, x.split(1))))


def in_pieces(run: Runner, size: int) -> Runner:
    """A runner for any batch from one for batches of `size`: in pieces, the last one filled up with copies."""

    def run_any(x: Tensor) -> Tensor:
        if x.shape[0] == size:
            return run(x)
        outputs = []
        for piece in x.split(size):
            missing = size - piece.shape[0]
            filled = torch.cat([piece, piece[-1:].expand(missing, *piece.shape[1:])]) if missing else piece
            outputs.append(run(filled)[: piece.shape[0]])
        return torch.cat(outputs)

    return run_any


def _with_casts(run: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Runner:
    return lambda x: run(_laid_out(x.to(dtype))).to(torch.float32)


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.contiguous()


def _to_channels_last(network: nn.Module, example: Tensor) -> None:
    if example.ndim == 4:
        network.to(memory_format=torch.channels_last)
