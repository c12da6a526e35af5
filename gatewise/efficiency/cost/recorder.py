"""Record the operators that a network runs, below autograd, where views, copies and products are distinct.

Each operator is recorded with the module that runs it and the values (memory written once) that it reads and writes, so
that operators can later be merged into larger kernels. No tensor data is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from gatewise.efficiency.cost import operators as cost
from gatewise.efficiency.cost.operators import Kind, Operator, Phase, Role, TensorUse


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module. `parent` is the index of the calling module's call, or None for the network's own."""

    path: str
    kind: type[nn.Module]
    parent: int | None


@dataclass(frozen=True)
class Invocation:
    """An operator as it was called, with shapes in place of floating-point tensors."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class TensorShape:
    """The part of a tensor that is kept: its shape and type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Value:
    number: int
    bytes: int
    held: bool


class Recorder(TorchDispatchMode):
    """Records while it is active. `watch` must be entered around it.

    Args:
        stages: part of the network that each module belongs to.
        unit_bytes: bytes per floating-point number; None for each tensor's own.
        keep_invocations: keep how each operator was called (shapes, and the values of integers).
    Raises:
        ValueError: during the run, for tensors or operators that cannot be counted.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[nn.Module, str],
        unit_bytes: int | None = None,
        keep_invocations: bool = False,
    ) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.invocations: list[Invocation] | None = [] if keep_invocations else None
        self.calls: list[ModuleCall] = []
        self.saved: dict[int, int] = {}
        self._model, self._stages, self._unit = model, stages, unit_bytes
        self._stack: list[int] = []
        self._stage_stack: list[str] = []
        self._values: dict[int, _Value] = {}
        self._numbers = 0
        # Autograd numbers its nodes in forward order: node number -> call that made it.
        self._made_in: dict[int, int] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self._check(tensor, "the network")
            self._new_value(tensor, held=True)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Track which module runs, within the block."""
        handles = []
        for path, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(_Enter(self, path)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_module(self, path: str, module: nn.Module) -> None:
        parent = self._stack[-1] if self._stack else None
        self.calls.append(ModuleCall(path, type(module), parent))
        self._stack.append(len(self.calls) - 1)
        above = self._stage_stack[-1] if self._stage_stack else ""
        self._stage_stack.append(above or self._stages.get(module, ""))

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self._stack.pop()
        self._stage_stack.pop()

    def keep_for_backward(self, tensor: Tensor) -> Tensor:
        """Hook for tensors that autograd saves. It counts each storage once, unless the network holds it anyway."""
        value = self._value(tensor)
        if not value.held:
            self.saved[value.number] = value.bytes
        # Otherwise autograd would hold a node's own output in a cycle.
        return tensor.detach()

    def outputs(self, tensors: list[Tensor]) -> frozenset[int]:
        """Return the values that these tensors hold."""
        return frozenset(self._value(tensor).number for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            if not cost.has_formula(func):
                raise ValueError(f"the network runs {func} with its own code inside, which cannot be counted")
        elif not cost.has_formula(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if torch.is_grad_enabled() and self._stack:
            # This operator's node is the last one created.
            self._made_in.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._stack[-1])
        out = func(*args, **kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        inputs = list(cost.arguments(func, args, kwargs))
        results = cost.tensors_in(out)
        for tensor in (*(tensor for _, tensor, _ in inputs), *results):
            self._check(tensor, f"the operator {cost.packet_name(func)}")
        mutated = [tensor for _, tensor, written in inputs if written]
        known = {_address(tensor) for _, tensor, _ in inputs}
        fresh = [tensor for tensor in results if _address(tensor) not in known]
        if not fresh and not mutated:
            return  # A view, or a number that is returned to Python.
        if cost.packet_name(func) in cost.UNINITIALISED:
            for tensor in fresh:
                self._new_value(tensor)
            return
        if cost.packet_name(func) == "convolution_backward":
            self._record_convolution_backward(args, out)
        else:
            macs = cost.count_macs(func, args, kwargs, out)
            reads = self._reads(func, inputs, macs, sum(self._bytes(tensor) for tensor in fresh))
            largest = max([*fresh, *mutated], key=Tensor.numel)
            adds_bias = any(name == _bias_name(func) for name, _, _ in inputs) if macs else self._adds_bias(func)
            bias_macs = 0.5 * largest.numel() if adds_bias else 0.0
            role: Role = ""
            if self._in_backward():
                role = _role(func, reads, macs)
                bias_macs = 0.5 * inputs[0][1].numel() if role == "grad-bias" else bias_macs
            self._append(func, macs, bias_macs, reads, fresh, mutated, role)
        if self.invocations is not None:
            self.invocations.append(Invocation(func, *torch.utils._pytree.tree_map(_shape_of, (tuple(args), kwargs))))

    def _record_convolution_backward(self, args: Any, out: Any) -> None:
        """Record up to three kernels: the gradients of the input, the weight and the bias."""
        dy, x, weight, _, *options, wanted = args
        macs = cost.convolution_macs(x, weight, options, dy)
        parts: list[tuple[Role, list[tuple[Tensor, Kind]], int, float]] = [
            ("grad-input", [(dy, "activation"), (weight, "weight")], macs, 0.0),
            ("grad-weight", [(x, "activation"), (dy, "activation")], macs, 0.0),
            ("grad-bias", [(dy, "activation")], 0, 0.5 * dy.numel()),
        ]
        for (role, tensors, products, bias_macs), gradient, asked in zip(parts, out, wanted, strict=True):
            if asked:
                reads = [self._use(tensor, kind) for tensor, kind in tensors]
                function = torch.ops.aten.convolution_backward.default
                self._append(function, products, bias_macs, reads, [gradient], [], role)

    def _append(
        self,
        func: Any,
        macs: int,
        bias_macs: float,
        reads: list[TensorUse],
        fresh: list[Tensor],
        mutated: list[Tensor],
        role: Role,
    ) -> None:
        writes = {}
        for tensor in fresh:
            if _address(tensor) not in writes:
                self._new_value(tensor)
                writes[_address(tensor)] = self._use(tensor, "activation")
        for tensor in mutated:
            self._overwrite(tensor)
            writes[_address(tensor)] = self._use(tensor, "activation")
        phase: Phase = "backward" if self._in_backward() else "forward"
        call, stage = self._place()
        largest = max([*fresh, *mutated], key=Tensor.numel)
        self.operators.append(
            Operator(
                name=cost.packet_name(func),
                module=self.calls[call].path if call >= 0 else "",
                stage=stage,
                macs=macs,
                bias_macs=bias_macs,
                bytes_read=distinct_bytes(reads),
                bytes_written=sum(use.bytes for use in writes.values()),
                weight_bytes=sum(use.bytes for use in reads if use.kind == "weight"),
                element_size=self._element_size(largest),
                phase=phase,
                role=role,
                fusible=macs == 0 and cost.is_fusible(func),
                call=call,
                reads=tuple(reads),
                writes=tuple(writes.values()),
            )
        )

    def _reads(self, func: Any, inputs: list[tuple[str, Tensor, bool]], macs: int, written: int) -> list[TensorUse]:
        uses: dict[tuple[int, tuple[Any, ...]], TensorUse] = {}
        for name, tensor, mutated in inputs:
            if mutated and cost.is_overwritten(func, name):
                continue
            held = self._value(tensor).held
            kind: Kind = "activation"
            if macs and name == _bias_name(func):
                kind = "vector"
            elif macs and name == "weight":
                kind = "weight"
            elif held:
                kind = "vector" if not macs and tensor.numel() == max(tensor.shape, default=1) else "weight"
            use = self._use(tensor, kind, cost.read_limit(func, name, written))
            uses.setdefault((use.value, use.view), use)
        return list(uses.values())

    def _use(self, tensor: Tensor, kind: Kind, limit: int | None = None) -> TensorUse:
        value = self._value(tensor)
        size = min(self._bytes(tensor), value.bytes)
        if limit is not None:
            size = min(size, limit)
        view = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return TensorUse(value.number, view, size, value.bytes, kind)

    def _element_size(self, tensor: Tensor) -> int:
        if self._unit is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.element_size()
        return self._unit * (2 if tensor.is_complex() else 1)

    def _bytes(self, tensor: Tensor) -> int:
        """Return the bytes of distinct elements; an expanded axis counts once."""
        elements = self._element_size(tensor)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= 1 if stride == 0 and size > 0 else size
        return elements

    def _value(self, tensor: Tensor) -> _Value:
        found = self._values.get(_address(tensor))
        return self._new_value(tensor) if found is None else found

    def _new_value(self, tensor: Tensor, held: bool = False) -> _Value:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() * self._element_size(tensor)
        self._numbers += 1
        value = self._values[_address(tensor)] = _Value(self._numbers, size, held)
        return value

    def _overwrite(self, tensor: Tensor) -> None:
        """Assign a new value if the whole memory is written; writing a part (a slice of a buffer) keeps the value."""
        old = self._value(tensor)
        if self._bytes(tensor) >= old.bytes:
            self._numbers += 1
            self._values[_address(tensor)] = _Value(self._numbers, old.bytes, old.held)

    def _in_backward(self) -> bool:
        return torch._C._current_autograd_node() is not None

    def _place(self) -> tuple[int, str]:
        """Return the call that an operator belongs to, and its part of the network."""
        node = torch._C._current_autograd_node()
        if node is None or self._stack:
            # During the backward pass modules run only to recompute activations.
            return (self._stack[-1], self._stage_stack[-1]) if self._stack else (-1, "")
        call = self._made_in.get(node._sequence_nr(), -1)
        return call, self.stage_of(call)

    def stage_of(self, call: int) -> str:
        """Return the part of the network that a call belongs to: that of its outermost enclosing module with one."""
        stage, index = "", call if call >= 0 else None
        while index is not None:
            entry = self.calls[index]
            stage = self._stages.get(self._model.get_submodule(entry.path), "") or stage
            index = entry.parent
        return stage

    def _adds_bias(self, func: Any) -> bool:
        """Return whether this is the separate addition kernel of a linear layer's bias."""
        inside = self._stack and issubclass(self.calls[self._stack[-1]].kind, nn.Linear)
        return bool(inside) and cost.packet_name(func) in ("add", "add_")

    def _check(self, tensor: Tensor, where: str) -> None:
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"{where} holds tensors of the type {type(tensor).__name__}, whose cost is unknown")
        if tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
            what = tensor.dtype if tensor.is_quantized else "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{where} holds tensors that are {what}, whose cost is unknown; count it in plain ones")


class _Enter:
    """A hook that knows the path of its module."""

    def __init__(self, recorder: Recorder, path: str) -> None:
        self._recorder, self._path = recorder, path

    def __call__(self, module: nn.Module, inputs: object) -> None:
        self._recorder.enter_module(self._path, module)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bias_name(func: Any) -> str:
    return cost.BIASES.get(cost.packet_name(func), "bias")


def _role(func: Any, reads: list[TensorUse], macs: int) -> Role:
    """Return which gradient this product or sum of the backward pass computes, if its node tells."""
    node = torch._C._current_autograd_node()
    name = node.name() if node is not None else ""
    if not name.startswith(("Addmm", "Mm")):
        return ""
    if macs:
        return "grad-input" if any(use.kind == "weight" for use in reads) else "grad-weight"
    return "grad-bias" if cost.packet_name(func) == "sum" else ""


def distinct_bytes(reads: Iterable[TensorUse]) -> int:
    """Return the bytes of all uses; several views of a value never count more than the value."""
    totals: dict[int, tuple[int, int]] = {}
    for use in reads:
        total, whole = totals.get(use.value, (0, use.value_bytes))
        totals[use.value] = (min(total + use.bytes, whole), whole)
    return sum(total for total, _ in totals.values())


def _shape_of(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return TensorShape(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return leaf.clone()
