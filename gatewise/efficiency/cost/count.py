"""Cost of a network: parameters, multiply-accumulates and bytes, in total, by stage, by module and by operator.

MACs are those of convolutions, matrix products and attention. Norms, activations and sums are left out, as in the
papers' tables, and bias additions are counted separately. Activation bytes are the outputs of all leaf modules in
float32, roughly what training keeps. Bytes read and written count each operator as its own kernel, every tensor once.
No tensor is kept: on the `meta` device counting allocates nothing.

Source: Lavin 2024, arXiv:2404.03617, for operators, bytes and the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn

from gatewise.efficiency.cost.operators import DTYPES, Operator, dtype_name
from gatewise.efficiency.cost.recorder import Invocation, ModuleCall, Recorder
from gatewise.efficiency.inputs import check_example, eval_mode, takes_tokens

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class StageCost:
    """Cost of one part of a network; `output_shape` is None for a part that did not run."""

    name: str
    parameters: int
    macs: int
    activation_bytes: int
    output_shape: tuple[int, ...] | None
    bias_macs: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    backward_macs: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no parameters and does nothing (dropout, an empty list)."""
        return self.parameters == self.macs == self.activation_bytes == 0


@dataclass(frozen=True)
class ModuleCost:
    """Cost of a module including its submodules; the path of the network itself is empty."""

    path: str
    macs: int
    bias_macs: float
    bytes_read: int
    bytes_written: int
    weight_bytes: int
    backward_macs: int
    operators: int


@dataclass(frozen=True)
class Cost:
    """Cost of one pass over the whole example batch, and of each part of the network.

    The stages add up to the total, except for what is computed between them, outside any module. Parts that hold and do
    nothing are left out.

    Attributes:
        macs: multiply-accumulates of the forward pass, without bias additions.
        operators: operators in execution order.
        saved_bytes: what autograd keeps between forward and backward pass, each storage once, without parameters and
            buffers; None unless the backward pass was counted.
        backward_macs: multiply-accumulates of the backward pass; None unless it was counted.
    """

    parameters: int
    macs: int
    activation_bytes: int
    stages: tuple[StageCost, ...]
    operators: tuple[Operator, ...] = field(default=(), repr=False)
    saved_bytes: int | None = None
    backward_macs: int | None = None

    @property
    def bias_macs(self) -> float:
        """Half a MAC per output element that a bias is added to, in the forward pass."""
        return sum(operator.bias_macs for operator in self.operators if operator.phase == "forward")

    @property
    def ops(self) -> float:
        """Two operations per MAC, biases included, over everything counted."""
        return sum(operator.ops for operator in self.operators)

    @property
    def bytes_read(self) -> int:
        return sum(operator.bytes_read for operator in self.operators)

    @property
    def bytes_written(self) -> int:
        return sum(operator.bytes_written for operator in self.operators)

    def modules(self) -> tuple[ModuleCost, ...]:
        """Cost of each module that ran, including its submodules, in the order in which they first ran."""
        groups: dict[str, list[Operator]] = {"": []}
        for operator in self.operators:
            names = operator.module.split(".") if operator.module else []
            for depth in range(len(names) + 1):
                groups.setdefault(".".join(names[:depth]), []).append(operator)
        return tuple(_module_cost(path, members) for path, members in groups.items())


def _module_cost(path: str, operators: list[Operator]) -> ModuleCost:
    forward = [operator for operator in operators if operator.phase == "forward"]
    return ModuleCost(
        path=path,
        macs=sum(operator.macs for operator in forward),
        bias_macs=sum(operator.bias_macs for operator in forward),
        bytes_read=sum(operator.bytes_read for operator in operators),
        bytes_written=sum(operator.bytes_written for operator in operators),
        weight_bytes=sum(operator.weight_bytes for operator in operators),
        backward_macs=sum(operator.macs for operator in operators if operator.phase == "backward"),
        operators=len(operators),
    )


@dataclass(frozen=True)
class Trace:
    """A cost with the data needed to merge operators into larger kernels.

    Attributes:
        calls: module calls, which `Operator.call` indexes.
        outputs: values that the network returns.
        invocations: one entry per operator, if requested.
        actual_dtype: data type that the network computes in.
    """

    cost: Cost
    calls: tuple[ModuleCall, ...]
    outputs: frozenset[int]
    invocations: tuple[Invocation, ...]
    actual_dtype: str


def count(model: nn.Module, example: Tensor, *, dtype: str | torch.dtype | None = None, backward: bool = False) -> Cost:
    """Return the cost of `model(example)`, or of a training step on it.

    The parts are the network's children. If it has `stages`, each member of `stages` is its own part. The parameters
    of a module used twice count once, in the part that names it first. The network is run once in eval mode and left
    as it was.

    One-time work that a module caches for inference is not counted. Such a module defines
    `prepare_inference(self, dtype: torch.dtype) -> None`, which does the work in advance, for inputs of that dtype.

    Args:
        example: a batch of inputs; integers for networks that take tokens.
        dtype: data type that all floating-point tensors are counted in: "float32", "bfloat16", "float16" or "int8". By
            default each tensor counts in its own.
        backward: run the network once in training mode instead, with gradients for the parameters that require them,
            and count both passes. The gradient of the example is not computed.
    Raises:
        TypeError: if `example` is not a tensor.
        ValueError: if `example` has the wrong dtype or device, the network cannot run on it, returns no tensor or
            (for `backward`) requires no gradient, or an operator or a kind of tensor cannot be counted.
    """
    return trace(model, example, dtype=dtype, backward=backward).cost


def trace(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: str | torch.dtype | None = None,
    backward: bool = False,
    keep_invocations: bool = False,
) -> Trace:
    """Like `count`, with the module calls, the outputs and, if requested, how each operator was called."""
    _check(model, example)
    unit_bytes = None if dtype is None else DTYPES[dtype_name(dtype)].itemsize
    parts = [_Part(name, module) for name, module in parts_of(model)]
    stages = {inner: part.name for part in reversed(parts) for inner in part.module.modules()}
    recorder = Recorder(model, stages, unit_bytes, keep_invocations)
    leaves = _Leaves()
    handles = [hook for part in parts for hook in part.attach()] + leaves.attach(model)
    try:
        with recorder.watch(), _without_fast_path():
            outputs = _train(model, example, recorder) if backward else _infer(model, example, recorder)
    finally:
        for handle in handles:
            handle.remove()
    operators = tuple(recorder.operators)
    seen: set[nn.Parameter] = set()
    costs = (part.cost(leaves, seen, [entry for entry in operators if entry.stage == part.name]) for part in parts)
    cost = Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=sum(operator.macs for operator in operators if operator.phase == "forward"),
        activation_bytes=sum(leaves.bytes.values()),
        stages=tuple(cost for cost in costs if not cost.is_empty),
        operators=operators,
        saved_bytes=sum(recorder.saved.values()) if backward else None,
        backward_macs=sum(entry.macs for entry in operators if entry.phase == "backward") if backward else None,
    )
    return Trace(cost, tuple(recorder.calls), outputs, tuple(recorder.invocations or ()), _dtype_of(model, example))


def _dtype_of(model: nn.Module, example: Tensor) -> str:
    """Return the dtype of the example or, if that is integer, of the network's first floating-point tensor."""
    tensors = chain([example], model.parameters(), model.buffers())
    first = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    return str(first).removeprefix("torch.")


def _check(model: nn.Module, example: Tensor) -> None:
    if any(type(module) is torch.jit.RecursiveScriptModule for module in model.modules()):
        raise ValueError("a scripted network does not tell which of its modules runs; count the one it was made from")
    own = next(chain(model.parameters(), model.buffers()), None)
    indices = isinstance(example, Tensor) and example.dtype in (torch.int64, torch.int32)
    if indices and own is not None and not takes_tokens(model):
        # A foreign network does not declare that it takes tokens; its first layer will fail if it does not.
        check_example(model, torch.empty_like(example, dtype=own.dtype))
    else:
        check_example(model, example)


def _infer(model: nn.Module, example: Tensor, recorder: Recorder) -> frozenset[int]:
    with eval_mode(model), torch.no_grad():
        _make_ahead(model, example)
        with recorder:
            tensors = _call(model, example)
        return recorder.outputs(tensors)


def _train(model: nn.Module, example: Tensor, recorder: Recorder) -> frozenset[int]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = torch.autograd.graph.saved_tensors_hooks(recorder.keep_for_backward, lambda tensor: tensor)
    with _training_mode(model, example), torch.enable_grad():
        with recorder, hooks:
            tensors = _call(model, example)
        outputs = recorder.outputs(tensors)
        wanting = [tensor for tensor in tensors if tensor.requires_grad]
        if not wanting or not parameters:
            raise ValueError("no parameter of the network requires a gradient, so it has no backward pass to count")
        ones = [torch.ones_like(tensor) for tensor in wanting]
        with recorder, _told_as_value_error(example):
            torch.autograd.grad(wanting, parameters, ones, allow_unused=True)
    return outputs


def _call(model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return all tensors that the network returns."""
    with _told_as_value_error(example):
        output = model(example)
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"the network must return tensors, and {type(output).__name__} holds none")
    return tensors


@contextmanager
def _told_as_value_error(example: Tensor) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "; on the meta device nothing can depend on values" if example.device.type == "meta" else ""
        message = f"the network cannot run on an example of shape {tuple(example.shape)}: {reason}{hint}"
        raise ValueError(message) from error


@contextmanager
def _training_mode(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Use training mode within the block, and restore modes, buffers and random states after it."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, tensor, None if tensor is None else tensor.clone())
        for module in model.modules()
        for name, tensor in module._buffers.items()
    ]
    devices = [example.device] if example.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            with _told_as_value_error(example):
                model.train()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, tensor, before in buffers:
                module._buffers[name] = tensor
                if tensor is not None and before is not None:
                    tensor.copy_(before)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Run PyTorch's transformer layers as separate operators, not as the fused operator used at inference."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _make_ahead(model: nn.Module, example: Tensor) -> None:
    """Make what the network caches for inference before anything is counted."""
    for module in model.modules():
        prepare = getattr(module, "prepare_inference", None)
        if callable(prepare):
            prepare(example.dtype)


def parts_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the network's children by name, with the members of `stages` in place of `stages`."""
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if name == "stages" and isinstance(child, nn.ModuleList | nn.Sequential):
            parts += [(f"stages.{key}", stage) for key, stage in child.named_children()]
        else:
            parts.append((name, child))
    return parts


class _Part:
    """Records the output of a module or, where only its members are called, of the outermost of those."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.depth = 0
        self.output_shape: tuple[int, ...] | None = None

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for module in self.module.modules():
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        return handles

    def _enter(self, module: nn.Module, inputs: object) -> None:
        self.depth += 1

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None

    def cost(self, leaves: _Leaves, seen: set[nn.Parameter], operators: list[Operator]) -> StageCost:
        fresh = [parameter for parameter in self.module.parameters() if parameter not in seen]
        seen.update(fresh)
        total = _module_cost(self.name, operators)
        return StageCost(
            name=self.name,
            parameters=sum(parameter.numel() for parameter in fresh),
            macs=total.macs,
            activation_bytes=sum(leaves.bytes.get(module, 0) for module in self.module.modules()),
            output_shape=self.output_shape,
            bias_macs=total.bias_macs,
            bytes_read=total.bytes_read,
            bytes_written=total.bytes_written,
            backward_macs=total.backward_macs,
        )


class _Leaves:
    """Output bytes of the modules without children."""

    def __init__(self) -> None:
        self.bytes: dict[nn.Module, int] = {}

    def attach(self, model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        leaves = [module for module in model.modules() if not any(module.children())]
        return [leaf.register_forward_hook(self._note) for leaf in leaves]

    def _note(self, module: nn.Module, inputs: object, output: object) -> None:
        # An identity (including dropout at inference) returns its input and writes nothing.
        same = isinstance(inputs, tuple) and any(output is item for item in inputs)
        if isinstance(output, Tensor) and not same:
            self.bytes[module] = self.bytes.get(module, 0) + output.numel() * FLOAT32_BYTES
